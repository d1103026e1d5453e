"""How updates grow with the rank: the closed forms against random factors and against one step of training."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.maths.adapter_scale import CASES, alpha_of_same_scale, growth, scale

IN = OUT = 256


def size_of(case: str, rank: int, gamma: float) -> float:
    """The root mean square of what an update adds to a fixed input, over random factors, made as the case says."""
    draws = torch.Generator().manual_seed(rank)
    x = torch.randn(IN, generator=draws)
    gradient = torch.randn(OUT, generator=draws)
    total = 0.0
    for _ in range(40):
        down = torch.randn(rank, IN, generator=draws) / math.sqrt(IN)
        if case == "random":
            up = torch.randn(OUT, rank, generator=draws)
        else:
            # From B = 0 the gradient of B is gamma times that of the output, times A x.
            up = gamma * torch.outer(gradient, down @ x)
            up = up if case == "sgd" else up.sign()
        total += float((gamma * up @ (down @ x)).square().mean())
    return math.sqrt(total / 40)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_sizes_grow_with_the_rank_as_the_forms_say(case: str, rslora: bool) -> None:
    """Breaks when an exponent of a case is wrong, or the square root of rsLoRA is forgotten."""
    sizes = {rank: size_of(case, rank, scale(rank, 8.0, rslora=rslora)) for rank in (4, 64)}
    wanted = {rank: growth(case, rank, scale(rank, 8.0, rslora=rslora)) for rank in (4, 64)}
    assert sizes[64] / sizes[4] == pytest.approx(wanted[64] / wanted[4], rel=0.25)


def test_the_forms_are_flat_where_the_theorem_says() -> None:
    """Breaks when rsLoRA is not stable in the case of the theorem, or LoRA falls by another power."""
    for rank in (4, 64, 512):
        assert growth("sgd", rank, scale(rank, 8.0, rslora=True)) == pytest.approx(64.0)
        assert growth("sgd", rank, scale(rank, 8.0, rslora=False)) == pytest.approx(64.0 / rank)
        assert growth("adam", rank, scale(rank, 8.0, rslora=False)) == pytest.approx(8.0)
        assert scale(rank, alpha_of_same_scale(rank, 8.0), rslora=True) == pytest.approx(8.0 / rank)
