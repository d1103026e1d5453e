"""Out of memory: a step is done again in smaller micro-batches, and nothing of it is counted twice."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.core.errors import MemoryExhaustedError
from luthier.data.forest import Forest
from luthier.model.running.outputs import TokenOutputs
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.shortage import Split, shortage
from luthier.train.stepper import Stepper
from tests import forests
from tests.train import limited_memory

ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "full": Full,
    "lora": lambda: LoRA(rank=4),
    "prefix": lambda: PrefixTuning(prefix_tokens=3),
}
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000 bytes. Error code 12 (Cannot allocate memory)"
)
FAILURES: tuple[Exception, ...] = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(CPU_TEXT),
)
TREES = forests.rows(20, seed=3, shortest=6, longest=14, ones=True)
MICRO = 64


def stepper(
    adapter: str = "lora",
    *,
    micro_tokens: int = MICRO,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> Stepper:
    """A stepper over a tiny llama whose adapter does something; the same for the same arguments."""
    model = forests.language_model("llama", dtype=dtype)
    torch.manual_seed(0)
    made = LoRA(rank=4, dropout=dropout) if dropout else ADAPTERS[adapter]()
    attachment = model.attach(made.attach(model.sites))
    if adapter != "full":
        forests.shake(attachment.named_parameters().values())
    return Stepper(model, attachment, SFT(), AdamW(learning_rate=1e-2), micro_tokens=micro_tokens)


@contextmanager
def failing(made: Stepper, failure: Exception, *, at: int, where: str, times: int = 1) -> Iterator[list[int]]:
    """Memory runs out in the `at`-th forward pass (and the next ones, `times` in all), or midway in its backward.

    Yields the tokens of every micro-batch that was tried.
    """
    tried: list[int] = []
    real = made.model.token_outputs
    # Behind the second layer's gradients: half of the gradient is there by then.
    late = [each for name, each in made.parameters.items() if "layers.0." in name] or list(made.parameters.values())

    def now() -> bool:
        return at <= len(tried) < at + times

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        tried.append(forest.token_count)
        if now() and where == "forward":
            raise failure
        return real(forest)

    def burst(_gradient: Tensor) -> None:
        if now() and where == "backward":
            raise failure

    handles = [parameter.register_hook(burst) for parameter in late]
    # An instance attribute hides the method.
    made.model.token_outputs = outputs  # type: ignore[method-assign]
    try:
        yield tried
    finally:
        for handle in handles:
            handle.remove()
        del made.model.token_outputs


def gradients(made: Stepper) -> dict[str, Tensor]:
    return {name: master.grad.clone() for name, master in made.masters.items() if master.grad is not None}


def weights(made: Stepper) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.parameters.items()}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("adapter", "failure"), list(zip(ADAPTERS, FAILURES, strict=True)), ids=["full", "lora", "prefix"]
)
def test_a_failed_micro_batch_changes_neither_loss_nor_gradient_nor_step(
    adapter: str, failure: Exception, where: str
) -> None:
    """Breaks when a micro-batch is counted twice, or not at all, or half a backward pass stays behind."""
    whole, made, fresh = (stepper(adapter, micro_tokens=size) for size in (4096, MICRO, MICRO // 2))
    expected = whole.forward_backward(TREES)
    with failing(made, failure, at=3, where=where) as tried:
        found = made.forward_backward(TREES)
    assert made.micro_tokens == MICRO // 2 and len(tried) > 3
    assert [(split.from_tokens, split.to_tokens) for split in found.splits] == [(MICRO, MICRO // 2)]
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    counts = [(each.weight, each.tokens, each.trained_tokens) for each in (found, expected)]
    assert counts[0] == counts[1] and made.pending_weight == whole.pending_weight
    forests.assert_same_gradients(gradients(made), gradients(whole))
    # The same as if it had been cut so from the beginning: bit for bit, before the step and after it.
    fresh.forward_backward(TREES)
    assert all(torch.equal(gradient, gradients(fresh)[name]) for name, gradient in gradients(made).items())
    assert made.optim_step() == fresh.optim_step()
    assert all(torch.equal(weight, weights(fresh)[name]) for name, weight in weights(made).items())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_differ_by_less_than_a_millionth_in_double_precision(where: str) -> None:
    """Breaks when the redone step is merely close: in float32 rounding could hide a small row that is lost."""
    whole, made = stepper("full", micro_tokens=4096), stepper("full")
    expected = whole.forward_backward(TREES)
    with failing(made, MemoryError(), at=3, where=where):
        found = made.forward_backward(TREES)
    assert abs(found.loss - expected.loss) <= 1e-6 * abs(expected.loss)
    ours, theirs = gradients(made), gradients(whole)
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs) ** 0.5
    size = sum(float(gradient.double().square().sum()) for gradient in theirs.values()) ** 0.5
    assert difference <= 1e-6 * size


def test_the_comparison_fails_for_a_stepper_that_keeps_half_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without clearing, what the failed attempt left behind is counted twice."""
    whole, made = stepper(micro_tokens=4096), stepper()
    whole.forward_backward(TREES)
    monkeypatch.setattr(Stepper, "clear_gradients", lambda self: None)
    with failing(made, MemoryError(), at=3, where="backward"):
        made.forward_backward(TREES)
    with pytest.raises(AssertionError, match="is off by"):
        forests.assert_same_gradients(gradients(made), gradients(whole), tolerance=1e-2)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_trees_of_earlier_calls_of_the_same_step_are_redone_too(where: str) -> None:
    """Breaks when a failure in the second call throws the gradients of the first away, or keeps and repeats them."""
    whole, made = stepper(micro_tokens=4096), stepper()
    whole.forward_backward(TREES)
    first = made.forward_backward(TREES[:7])
    with failing(made, MemoryError(), at=1, where=where):
        second = made.forward_backward(TREES[7:])
    assert first.splits == () and len(second.splits) == 1
    assert made.pending_weight == whole.pending_weight
    assert second.weight == whole.pending_weight - first.weight
    forests.assert_same_gradients(gradients(made), gradients(whole))
    made.optim_step()
    # The next step starts anew: nothing of the last one is redone.
    with failing(made, MemoryError(), at=1, where=where) as tried:
        made.forward_backward(TREES[:3])
    assert sum(tried) <= 2 * sum(tree.token_count for tree in TREES[:3]) + MICRO


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_low_precision_gradients_that_had_not_reached_their_master_are_cleared(where: str) -> None:
    """Breaks when only the masters' gradients are cleared."""
    made, fresh = stepper("full", dtype=torch.bfloat16), stepper("full", dtype=torch.bfloat16, micro_tokens=MICRO // 2)
    stuck = next(iter(made.parameters.values()))
    with failing(made, MemoryError(), at=2, where=where) as tried:
        real = made.model.token_outputs

        def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
            if len(tried) == 1:
                stuck.grad = torch.ones_like(stuck)  # as when memory runs out while it is added to its master
            return real(forest)

        made.model.token_outputs = outputs  # type: ignore[method-assign]
        made.forward_backward(TREES)
    fresh.forward_backward(TREES)
    assert all(torch.equal(gradient, gradients(fresh)[name]) for name, gradient in gradients(made).items())
    assert all(parameter.grad is None for parameter in made.copies.values())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_redone_step_draws_the_random_numbers_of_the_first_attempt(where: str) -> None:
    """Breaks when dropout goes on where the failed attempt stopped: the same cut would then give another gradient."""
    made, fresh = stepper(dropout=0.5), stepper(dropout=0.5, micro_tokens=MICRO // 2)
    torch.manual_seed(7)
    with failing(made, MemoryError(), at=3, where=where):
        found = made.forward_backward(TREES)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    expected = fresh.forward_backward(TREES)
    assert found.loss_sum == expected.loss_sum and found.row_losses == expected.row_losses
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(gradient, gradients(fresh)[name]) for name, gradient in gradients(made).items())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_never_suffices_ends_with_the_row_and_the_biggest_consumers(where: str) -> None:
    """Breaks when the search for a smaller cut does not end, or the error does not say what to do about what."""
    made = stepper()
    made.planned_bytes = {"weights": 3_000_000, "head": 5, "optimizer": 1_200_000_000, "activations": 2_000_000_000}
    short = failing(made, FAILURES[0], at=1, where=where, times=1000)
    with short as tried, pytest.raises(MemoryExhaustedError) as caught:
        made.forward_backward(TREES)
    longest = max(TREES, key=lambda tree: tree.token_count)
    assert f"row {longest.row} alone ({longest.token_count} tokens)" in caught.value.received
    assert "activations 2 GB, optimizer 1.2 GB, weights 3 MB" in caught.value.received
    assert "head" not in caught.value.received and "data.max_tokens" in caught.value.do
    assert caught.value.exit_code == 71 and len(tried) <= 7
    assert not gradients(made) and made.pending_weight == 0
    # What was split stays split, and the stepper works on once there is memory again.
    assert made.forward_backward(TREES).splits == ()


def test_a_micro_batch_is_made_smaller_even_where_half_of_its_limit_would_change_nothing() -> None:
    """Breaks when 4096 is halved to 2048 for a step of a hundred tokens, which is then cut as before."""
    made = stepper(micro_tokens=4096)
    with failing(made, MemoryError(), at=1, where="forward") as tried:
        found = made.forward_backward(TREES)
    assert len(found.splits) == 1 and max(tried[1:]) < tried[0]
    assert made.micro_tokens == found.splits[0].to_tokens < sum(tree.token_count for tree in TREES)


def test_a_single_tree_runs_in_ever_smaller_parts() -> None:
    """Breaks when a tree that may be cut at its root counts as the smallest micro-batch."""
    tree = forests.branching(seed=1)
    whole, made = stepper(), stepper()
    expected = whole.forward_backward([tree])
    with failing(made, MemoryError(), at=1, where="forward"):
        found = made.forward_backward([tree])
    assert found.splits and found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    forests.assert_same_gradients(gradients(made), gradients(whole))
    assert made.micro_tokens < tree.token_count


def test_the_failed_attempt_is_gone_before_the_next_one_starts() -> None:
    """Breaks when the exception, its frames or the graph are still held while the smaller micro-batch runs."""
    made = stepper()
    alive: list[weakref.ref[Tensor]] = []
    seen: list[int] = []

    def note(_module: object, _given: object, output: Any) -> None:
        seen.append(sum(1 for each in alive if each() is not None))
        alive.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    handle = made.model.module.get_submodule("model.layers.0").register_forward_hook(note)
    with failing(made, MemoryError(), at=1, where="backward"):
        gc.disable()
        try:
            made.forward_backward(TREES)
        finally:
            gc.enable()
            handle.remove()
    assert seen[1] == 0


def test_an_evaluation_is_split_too_and_leaves_gradients_alone() -> None:
    """Breaks when an evaluation that fails throws away the gradients of a step, or is not repeated in smaller ones."""
    made = stepper()
    expected = made.evaluate(TREES)
    made.forward_backward(TREES[:2])
    before = gradients(made)
    with failing(made, MemoryError(), at=2, where="forward"):
        found = made.evaluate(TREES)
    assert found.splits == (Split(MICRO, MICRO // 2, "MemoryError"),)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6) and found.tokens == expected.tokens
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(made).items())


@pytest.mark.parametrize("failure", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_other_failures_are_not_taken_for_memory(failure: Exception) -> None:
    """Breaks when a bug in a model is answered by halving until nothing is left."""
    made = stepper()
    with failing(made, failure, at=1, where="forward") as tried, pytest.raises(type(failure)):
        made.forward_backward(TREES)
    assert len(tried) == 1 and made.micro_tokens == MICRO
    assert shortage(failure) is None and shortage(MemoryExhaustedError("x")) is None


def test_no_memory_for_the_optimizers_state_says_so() -> None:
    """Breaks when the first step of the optimizer ends in a bare RuntimeError of the allocator."""
    made = stepper()
    made.planned_bytes = {"optimizer": 8_000}

    def step() -> None:
        raise RuntimeError(CPU_TEXT)

    made.optimizer.step = step  # type: ignore[method-assign, assignment]
    made.forward_backward(TREES)
    with pytest.raises(MemoryExhaustedError, match="in the optimizer's step.*optimizer 8 kB"):
        made.optim_step()


def test_a_process_with_too_little_memory_finishes_its_step() -> None:
    """Breaks when torch words the failure of its CPU allocator differently, or memory is not given back in time.

    A process of its own with a real limit (RLIMIT_AS): no mock stands between the allocator and the stepper.
    """
    done = subprocess.run(
        [sys.executable, limited_memory.__file__], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "splits" in done.stdout, done.stdout
