"""The head kernel against torch's own log-softmax: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.kernels.head import Head, head_log_probs


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_of_vocabulary: list[int] = []
        self.vocabulary = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] == self.vocabulary:
            self.rows_of_vocabulary.append(result.shape[0])
        return result


def case(
    *, rows: int = 13, vocabulary: int = 29, size: int = 7, bias: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Hidden states, weight, bias, labels and an upstream gradient."""
    generator = torch.Generator().manual_seed(rows + vocabulary)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return draw(rows, size), draw(vocabulary, size), draw(vocabulary) if bias else None, labels, draw(rows)


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float | None
) -> Tensor:
    """The same in one line of torch after the other, full logits and all."""
    logits = hidden @ weight.t() * scale
    logits = logits if bias is None else logits + bias
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("chunk_rows", [1, 4, 13, 100])
def test_value_and_gradient_equal_log_softmax(
    head_trains: bool, bias: bool, scale: float, cap: float | None, chunk_rows: int
) -> None:
    """Breaks when scale, bias or cap is lost on the way back, or a chunk border drops or doubles a row."""
    hidden, weight, bias_values, labels, upstream = case(bias=bias)
    parts = [part for part in (weight, bias_values) if part is not None]
    hidden.requires_grad_()
    for part in parts:
        part.requires_grad_(head_trains)
    wanted = [hidden, *parts] if head_trains else [hidden]
    found = head_log_probs(hidden, Head(weight, bias_values, scale, cap), labels, chunk_rows=chunk_rows)
    expected = reference(hidden, weight, bias_values, labels, scale, cap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_gradcheck_in_float64(head_trains: bool, cap: float | None) -> None:
    """Breaks when the written derivative is not that of the written function; needs float64 all the way."""
    hidden, weight, bias, labels, _ = case(rows=5, vocabulary=6, size=4, bias=True)
    assert bias is not None
    hidden.requires_grad_()
    weight.requires_grad_(head_trains)
    bias.requires_grad_(head_trains)

    def function(*parts: Tensor) -> Tensor:
        return head_log_probs(parts[0], Head(parts[1], parts[2], 0.7, cap), labels, chunk_rows=2)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@given(rows=st.integers(0, 20), chunk_rows=st.integers(1, 25))
def test_the_chunk_size_changes_nothing(rows: int, chunk_rows: int) -> None:
    """Breaks when a sum over the vocabulary depends on the chunk, or no row at all is an error."""
    hidden, weight, _, labels, _ = case(rows=rows, bias=False)
    hidden.requires_grad_()
    found = head_log_probs(hidden, Head(weight), labels, chunk_rows=chunk_rows)
    torch.testing.assert_close(found, reference(hidden, weight, None, labels, 1.0, None), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("head_trains", [False, True])
def test_the_full_logits_never_exist(head_trains: bool) -> None:
    """Breaks when any operation of either pass makes a tensor of all rows times the vocabulary."""
    hidden, weight, _, labels, _ = case(rows=64, vocabulary=200, bias=False, dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(head_trains)
    with Largest() as largest:
        largest.vocabulary = 200
        head_log_probs(hidden, Head(weight), labels, chunk_rows=8).sum().backward()
    assert largest.rows_of_vocabulary
    assert max(largest.rows_of_vocabulary) == 8


def test_the_spy_sees_full_logits_where_they_are_made() -> None:
    """Guards the test above: log-softmax over everything is what it must catch."""
    hidden, weight, _, labels, _ = case(rows=64, vocabulary=200, bias=False, dtype=torch.float32)
    with Largest() as largest:
        largest.vocabulary = 200
        reference(hidden, weight, None, labels, 1.0, None)
    assert max(largest.rows_of_vocabulary) == 64


@pytest.mark.parametrize("head_trains", [False, True])
def test_bfloat16_heads_give_float32_log_probabilities(head_trains: bool) -> None:
    """Breaks when the log-sum or the sum of a head's gradient is taken in bfloat16."""
    hidden, weight, _, labels, _ = case(rows=40, vocabulary=300, size=16, bias=False, dtype=torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(head_trains)
    found = head_log_probs(hidden, Head(weight), labels, chunk_rows=4)
    wide = [part.detach().float().requires_grad_() for part in (hidden, weight)]
    logits = (hidden.detach() @ weight.detach().t()).float()
    expected = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    found.sum().backward()
    reference(wide[0], wide[1], None, labels, 1.0, None).sum().backward()
    for part, precise in zip((hidden, weight) if head_trains else (hidden,), wide, strict=False):
        assert part.grad is not None and precise.grad is not None
        error = (part.grad.float() - precise.grad).norm() / precise.grad.norm()
        assert error < 0.02


def test_a_trained_head_gives_the_same_bits_whether_slopes_were_kept_or_made_again() -> None:
    """Breaks when the two ways round differently, the second backward pass finds nothing, or all slopes are kept."""
    hidden, weight, _, labels, upstream = case(rows=40, vocabulary=50, size=8, bias=False, dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    # Eight rows are kept: two of ten chunks here, and none of chunks of 10.
    kept = head_log_probs(hidden, Head(weight), labels, chunk_rows=4)
    slopes = [each for each in kept.grad_fn.saved_tensors if each is not None and each.shape[-1] == 50]  # type: ignore[union-attr]
    assert [len(each) for each in slopes] == [4, 4]
    first = torch.autograd.grad(kept, hidden, upstream, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kept, hidden, upstream)[0])
    again = torch.autograd.grad(head_log_probs(hidden, Head(weight), labels, chunk_rows=10), hidden, upstream)[0]
    torch.testing.assert_close(first, again, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert head_log_probs(hidden, Head(weight), labels).grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    """Breaks when the Jacobian computed in the forward pass is silently taken for a constant."""
    hidden, weight, _, labels, _ = case(bias=False)
    hidden.requires_grad_()
    squares = head_log_probs(hidden, Head(weight), labels).square().sum()
    (first,) = torch.autograd.grad(squares, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
