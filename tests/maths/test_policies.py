"""Clipped policy losses, the distance to a reference, values and the leash, against brute force."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.maths.policies import adapted_leash, clipped_losses, is_clipped, k3, value_losses


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.85, 1.0, 1.1, 1.5])
def test_no_gradient_comes_from_beyond_the_band(ratio: float, advantage: float) -> None:
    """Breaks when the band is on the wrong side, or one sign of advantage is not held back."""
    given = torch.tensor([ratio], requires_grad=True)
    pull = torch.tensor([advantage])
    loss = clipped_losses(given, pull, low=0.2, high=0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), given)
    held = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    assert gradient.item() == (0.0 if held else -advantage)
    assert bool(is_clipped(given.detach(), pull, low=0.2, high=0.28).item()) is held
    kept = min(max(ratio, 0.8), 1.28)
    assert loss.item() == pytest.approx(max(-ratio * advantage, -kept * advantage))


def test_k3_is_an_unbiased_estimate_of_the_kl() -> None:
    """Breaks when the ratio is upside down: the mean under the policy is then another divergence."""
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    each = k3(policy.log(), reference.log())
    assert (each >= 0).all()
    assert (policy * each).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item())


def test_values_gain_nothing_from_moving_too_far() -> None:
    """Breaks when the smaller of both errors is taken, which would let values jump."""
    values = torch.tensor([1.0, 0.1, 3.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 1.0])
    loss = value_losses(values, old, returns, clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 4])
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([0.0, -1.9, 2.0])


def test_the_leash_is_shortened_where_the_policy_runs_away() -> None:
    """Breaks when the sign is wrong, or one wild step may change everything."""
    assert adapted_leash(0.1, 6.0, target=6.0, rate=0.1) == 0.1
    assert adapted_leash(0.1, 60.0, target=6.0, rate=0.1) == pytest.approx(0.1 * math.exp(0.02))
    assert adapted_leash(0.1, 0.0, target=6.0, rate=0.1) == pytest.approx(0.1 * math.exp(-0.02))
