"""Adam's moments: the closed form, and how far eight bits are from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.maths import moments

BETAS = {"beta1": 0.9, "beta2": 0.99}


def gradients(count: int, *shape: int) -> list[torch.Tensor]:
    """Gradients of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-4, 0, shape[0])[:, None]
    return [torch.randn(*shape, generator=generator) * sizes for _ in range(count)]


def test_it_is_the_equation() -> None:
    """Breaks when a mean decays by the other's rate, or epsilon is inside the root."""
    state: dict[str, Any] = {}
    first = second = torch.zeros(6, 5, dtype=torch.float64)
    for gradient in gradients(4, 6, 5):
        found = moments.direction(state, gradient, **BETAS, epsilon=1e-3, eight_bit=False)
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.99 * second + 0.01 * gradient.double() ** 2
        torch.testing.assert_close(found.double(), first / (second.sqrt() + 1e-3), rtol=1e-4, atol=1e-6)
    assert moments.correction(3, **BETAS) == pytest.approx((1 - 0.99**3) ** 0.5 / (1 - 0.9**3))


def test_eight_bits_follow_the_float32_moments() -> None:
    """Breaks when codes of one moment are read by the other's map, or a slice loses its scales."""
    wide: dict[str, Any] = {}
    narrow: dict[str, Any] = {}
    for step, gradient in enumerate(gradients(20, 40, 256), start=1):
        exact = moments.direction(wide, gradient, **BETAS, epsilon=1e-8, eight_bit=False)
        found = moments.direction(narrow, gradient, **BETAS, epsilon=1e-8, eight_bit=True)
        error = (found - exact).norm() / exact.norm()
        assert error < (1e-6 if step == 1 else 0.06), step
    assert narrow["first"].dtype == narrow["second"].dtype == torch.uint8
    kept = sum(value.nbytes for value in narrow.values())
    assert kept == moments.state_bytes(40 * 256, eight_bit=True) == 2 * 10240 + 2 * 4 * 40


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a slice ends in the middle of a block."""
    found = []
    for size in (moments._SLICE, 1024):
        monkeypatch.setattr(moments, "_SLICE", size)
        state: dict[str, Any] = {}
        knobs = {**BETAS, "epsilon": 1e-8}
        steps = [moments.direction(state, each, **knobs, eight_bit=True) for each in gradients(3, 50, 101)]
        found.append([*steps, *state.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_second_moment_is_never_rounded_to_zero() -> None:
    """Breaks when a number that moves little beside a large one is divided by epsilon alone."""
    gradient = torch.full((4096,), 1e-6)
    gradient[0] = 1.0
    state: dict[str, Any] = {}
    for _ in range(3):
        found = moments.direction(state, gradient, **BETAS, epsilon=1e-8, eight_bit=True)
    assert int(state["second"].min()) > 0 and float(found.abs().max()) < 20


def test_few_numbers_stay_wide() -> None:
    """Breaks when norms and biases are rounded too."""
    state: dict[str, Any] = {}
    moments.direction(state, torch.ones(4095), **BETAS, epsilon=1e-8, eight_bit=True)
    assert state["first"].dtype == torch.float32 and moments.state_bytes(4095, eight_bit=True) == 8 * 4095
