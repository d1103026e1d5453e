"""Preference losses: log odds at both ends, gradients against finite differences, and what flipped labels do."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from luthier.maths.preferences import PairLoss, kto_losses, log1mexp, log_odds, pair_losses

KINDS: tuple[PairLoss, ...] = ("sigmoid", "hinge", "ipo")


@pytest.mark.parametrize("x", [-1e-7, -1e-3, -0.5, -math.log(2), -0.8, -5.0, -40.0, -100.0])
def test_log1mexp_is_exact_at_both_ends(x: float) -> None:
    """Breaks when 1 - p is rounded to 0 or to 1 before its logarithm is taken."""
    given = torch.tensor([x], dtype=torch.float32, requires_grad=True)
    found = log1mexp(given)
    exact = float(given.detach())
    assert float(found.detach()) == pytest.approx(float(mpmath.log(-mpmath.expm1(exact))), rel=2e-6)
    found.sum().backward()
    assert given.grad is not None and math.isfinite(float(given.grad))
    assert float(given.grad) == pytest.approx(float(-mpmath.exp(exact) / -mpmath.expm1(exact)), rel=1e-5)


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    """Breaks when the odds of a probability of 1 become infinite, and a whole step with them."""
    certain = torch.zeros(2, requires_grad=True)
    odds = log_odds(certain)
    odds.sum().backward()
    assert odds.isfinite().all() and certain.grad is not None and certain.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: PairLoss) -> None:
    """Breaks when a loss is detached somewhere, or its derivative has another factor."""
    given = torch.tensor([0.8, -1.7, 3.0], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([0.1, 0.0, 0.4], dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return pair_losses(log_odds(-values.exp()), kind=kind, beta=0.4, margin=margin, flipped=0.1).sum()

    loss(given).backward()
    step = 1e-6
    for index in range(3):
        moved = torch.zeros(3, dtype=torch.float64)
        moved[index] = step
        with torch.no_grad():
            slope = (loss(given + moved) - loss(given - moved)) / (2 * step)
        assert given.grad is not None and float(given.grad[index]) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_is_as_likely_flipped_teaches_no_order(kind: PairLoss) -> None:
    """Breaks when a flipped pair has not the loss of its two answers exchanged."""
    difference = torch.tensor([1.3], requires_grad=True)
    one, two = (pair_losses(sign * difference, kind=kind, beta=0.5, flipped=0.5) for sign in (1, -1))
    assert float(one.detach()) == pytest.approx(float(two.detach()))
    at_zero = torch.zeros(1, requires_grad=True)
    pair_losses(at_zero, kind=kind, beta=0.5, flipped=0.5).sum().backward()
    assert at_zero.grad is not None and float(at_zero.grad) == pytest.approx(0.0, abs=1e-7)


def test_kto_is_half_at_the_point_of_reference() -> None:
    """Breaks when gains of bad answers count as gains."""
    ratio, good = torch.tensor([0.4, 0.4, 9.0, -9.0]), torch.tensor([True, False, True, False])
    found = kto_losses(ratio, good, beta=1.0, point=0.4, desirable=2.0, undesirable=3.0)
    assert found[:2].tolist() == pytest.approx([1.0, 1.5])
    assert found[2:].max() < 1e-3
