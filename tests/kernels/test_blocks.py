"""The halves of a block against the same in plain torch: values, gradients by finite differences, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from luthier.kernels.blocks import added_product, gated_feed_forward, normed_products, rotated
from luthier.kernels.causal import causal_attention
from luthier.kernels.products import LowRankTerm, Product
from luthier.kernels.torch_backend import TorchBackend

TWIN = TorchBackend()
TOKENS, WIDTH, INNER, RANK, EPS = 5, 6, 10, 2, 1e-5


class Draw:
    """Tensors from a seed; all of them are trained unless `train` says otherwise."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, train: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.dtype, self.train = dtype, train

    def __call__(self, *shape: int, train: bool | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return drawn.requires_grad_(self.train if train is None else train)

    def product(self, size: int, out: int, *, bias: bool = False, term: bool = True, frozen: bool = False) -> Product:
        low = LowRankTerm(self(RANK, size), self(out, RANK), 0.7) if term else None
        weight, shift = self(out, size, train=self.train and not frozen), self(out) if bias else None
        return Product(weight, shift, low)


def plain(x: Tensor, layer: Product) -> Tensor:
    y = F.linear(x, layer.weight, layer.bias)
    return y if layer.term is None else y + F.linear(F.linear(x, layer.term.down), layer.term.up) * layer.term.scale


def plain_norm(x: Tensor, norm: Tensor) -> Tensor:
    return norm * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def tensors(*products: Product) -> list[Tensor]:
    return [tensor for each in products for tensor in each.tensors() if tensor is not None]


def same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Equal values and equal gradients, and both agree with finite differences where that is possible."""
    found, expected = ours(), theirs()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    trained = [each for each in inputs if each.requires_grad]
    left, right = (torch.autograd.grad(out, trained, upstream) for out in (found, expected))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("bias", "term", "frozen"), list(product([False, True], repeat=3)))
def test_normed_products_are_those_of_plain_torch(bias: bool, term: bool, frozen: bool) -> None:
    """Breaks when a factor's gradient lands in its neighbour, a bias or a scale is lost, or the norm's slope is off."""
    draw = Draw()
    x, norm = draw(TOKENS, WIDTH), draw(WIDTH)
    made = tuple(draw.product(WIDTH, out, bias=bias, term=term, frozen=frozen) for out in (4, 2, 3))
    mixed = (made[0], replace(made[1], term=None), made[2])
    same(
        lambda: torch.cat(normed_products(x, norm, EPS, mixed, TWIN), 1),
        lambda: torch.cat([plain(plain_norm(x, norm), each) for each in mixed], 1),
        [x, norm, *tensors(*mixed)],
    )


@pytest.mark.parametrize(("bias", "term", "frozen"), list(product([False, True], repeat=3)))
def test_an_added_product_is_that_of_plain_torch(bias: bool, term: bool, frozen: bool) -> None:
    """Breaks when the residual stream loses its gradient."""
    draw = Draw()
    x, inner = draw(TOKENS, WIDTH), draw(TOKENS, INNER)
    layer = draw.product(INNER, WIDTH, bias=bias, term=term, frozen=frozen)
    same(lambda: added_product(x, inner, layer, TWIN), lambda: x + plain(inner, layer), [x, inner, *tensors(layer)])


@pytest.mark.parametrize(("bias", "term", "frozen"), list(product([False, True], repeat=3)))
def test_the_gated_feed_forward_is_that_of_plain_torch(bias: bool, term: bool, frozen: bool) -> None:
    """Breaks when gate and up are exchanged on the way back, or what is made again differs from what was there."""
    draw = Draw()
    x, norm = draw(TOKENS, WIDTH), draw(WIDTH)
    gate, up = (draw.product(WIDTH, INNER, bias=bias, term=term, frozen=frozen) for _ in range(2))
    down = draw.product(INNER, WIDTH, bias=bias, term=term, frozen=frozen)

    def theirs() -> Tensor:
        h = plain_norm(x, norm)
        return x + plain(F.silu(plain(h, gate)) * plain(h, up), down)

    same(lambda: gated_feed_forward(x, norm, EPS, (gate, up, down), TWIN), theirs, [x, norm, *tensors(gate, up, down)])


def test_finite_differences_agree() -> None:
    """Breaks when the reference above shares a mistake with what it is compared to."""
    draw = Draw()
    x, norm = draw(TOKENS, WIDTH), draw(WIDTH)
    gate, up, down = draw.product(WIDTH, 4), draw.product(WIDTH, 4, bias=True), draw.product(4, WIDTH)
    layers = (gate, up, down)
    assert torch.autograd.gradcheck(
        lambda x, norm, *_: gated_feed_forward(x, norm, EPS, layers, TWIN), [x, norm, *tensors(*layers)]
    )
    angles = torch.randn(TOKENS, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotated(x, angles.cos(), angles.sin(), TWIN), [draw(TOKENS, 2, WIDTH)])
    given = [draw(7, 4, 8), draw(7, 2, 8), draw(7, 2, 8)]
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, [(2, 2), (1, 3)], 0.4, TWIN), given)


def test_a_head_is_rotated_as_the_zoo_does_it() -> None:
    """Breaks when neighbours are turned against each other instead of halves."""
    draw = Draw()
    x, angles = draw(TOKENS, 2, WIDTH), torch.randn(TOKENS, 3, dtype=torch.float64)
    whole = torch.cat([angles, angles], 1)[:, None]
    first, second = x.chunk(2, -1)
    expected = x * whole.cos() + torch.cat([-second, first], -1) * whole.sin()
    torch.testing.assert_close(rotated(x, angles.cos(), angles.sin(), TWIN), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_texts_that_lie_end_to_end_do_not_see_each_other(groups: int, dtype: torch.dtype) -> None:
    """Breaks when a run begins a token late, a key head serves other queries, or texts of one token are not causal."""
    draw = Draw(dtype=dtype)
    runs = [(2, 5), (1, 1), (3, 2), (1, 9)]
    total = sum(count * length for count, length in runs)
    given = [draw(total, heads, 8) for heads in (4, groups, groups)]
    lengths = [length for count, length in runs for _ in range(count)]
    parts = zip(*(tensor.split(lengths) for tensor in given), strict=True)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in text), is_causal=True, scale=0.4, enable_gqa=True
            )[0].transpose(0, 1)
            for text in parts
        ]
    )
    found = causal_attention(*given, runs, 0.4, TWIN)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(expected.shape, dtype=dtype)
    for one, other in zip(*(torch.autograd.grad(out, given, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def kept_numbers(run: Callable[[], object], known: list[Tensor]) -> int:
    """Numbers in tensors that autograd keeps, apart from those of `known`, each storage once."""
    storages: dict[int, int] = {}
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in ours:
            storages[place] = max(storages.get(place, 0), tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_no_more_is_kept_than_the_head_of_the_file_says() -> None:
    """Breaks when something that the backward pass can make again is kept."""
    draw = Draw(dtype=torch.float32)
    x, norm = draw(TOKENS, WIDTH), draw(WIDTH, train=False)
    wide = tuple(draw.product(WIDTH, INNER, frozen=True) for _ in range(2))
    down = draw.product(INNER, WIDTH, frozen=True)
    known = [x, norm, *tensors(*wide, down)]
    assert kept_numbers(lambda: normed_products(x, norm, EPS, wide, TWIN), known) == TOKENS * (1 + 2 * RANK)
    assert kept_numbers(lambda: gated_feed_forward(x, norm, EPS, (*wide, down), TWIN), known) == TOKENS * (
        1 + 2 * INNER + 3 * RANK
    )
    assert kept_numbers(lambda: added_product(x, draw(TOKENS, INNER), down, TWIN), known) == TOKENS * (INNER + RANK)


def test_nothing_is_computed_for_an_input_that_needs_no_gradient() -> None:
    """Breaks when the first block's backward pass goes on below the lowest adapter."""
    draw = Draw(dtype=torch.float32)
    x, norm = draw(TOKENS, WIDTH, train=False), draw(WIDTH, train=False)
    layers = tuple(draw.product(WIDTH, INNER, frozen=True) for _ in range(2))
    (first, second) = normed_products(x, norm, EPS, layers, TWIN)
    products: list[tuple[int, ...]] = []
    real = torch.Tensor.addmm_

    def spy(self: Tensor, *args: Tensor) -> Tensor:
        products.append(tuple(self.shape))
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "addmm_", spy)
        (first.sum() + second.sum()).backward()
    assert not products and x.grad is None
    assert all(each.term is not None and each.term.up.grad is not None for each in layers)


def test_bfloat16_rounds_no_more_than_plain_torch() -> None:
    """Breaks when a sum over the width is added up in bfloat16, or a factor is rounded before it is scaled."""
    draw = Draw(dtype=torch.bfloat16)
    x, norm = draw(64, 96), draw(96)
    gate, up, down = draw.product(96, 128), draw.product(96, 128), draw.product(128, 96)

    def plainly(dtype: torch.dtype) -> Tensor:
        wide = [
            Product(each.weight.to(dtype), None, LowRankTerm(each.term.down.to(dtype), each.term.up.to(dtype), 0.7))
            for each in (gate, up, down) if each.term is not None
        ]  # fmt: skip
        h = plain_norm(x.to(dtype), norm.to(dtype))
        return x.to(dtype) + plain(F.silu(plain(h, wide[0])) * plain(h, wide[1]), wide[2])

    exact = plainly(torch.float64)
    ours = (gated_feed_forward(x, norm, EPS, (gate, up, down), TWIN).double() - exact).abs().mean()
    theirs = (plainly(torch.bfloat16).double() - exact).abs().mean()
    assert ours.item() <= 1.1 * theirs.item()
