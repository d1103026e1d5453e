"""AdamW in eight bits: beside AdamW, and beside what bitsandbytes would keep."""

from __future__ import annotations

import torch

from luthier.optimizers.adamw import AdamW
from luthier.optimizers.adamw_8bit import AdamW8Bit


def trained(method: AdamW | AdamW8Bit, steps: int = 60) -> tuple[torch.Tensor, list[float]]:
    """A least-squares problem whose inputs differ in size; the weights and the losses."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 128, generator=generator) * 10.0 ** torch.linspace(-1, 1, 128)
    goal = inputs @ torch.randn(128, 64, generator=generator)
    weight = torch.zeros(128, 64)
    optimizer = method.build({"w": weight})
    losses = []
    for _ in range(steps):
        error = inputs @ weight - goal
        losses.append(float(error.square().mean()))
        weight.grad = inputs.t() @ error * (2 / error.numel())
        optimizer.step()
    return weight, losses


def test_the_losses_are_those_of_adamw() -> None:
    """Breaks when moments are lost on the way through their codes, or decay goes through them."""
    knobs = {"learning_rate": 0.05, "weight_decay": 0.1}
    _, wide = trained(AdamW(**knobs))
    _, narrow = trained(AdamW8Bit(**knobs))
    assert narrow[-1] < 0.5 * narrow[0]
    assert all(abs(one - other) < 0.02 * wide[0] for one, other in zip(narrow, wide, strict=True))
    assert narrow != wide


def test_the_first_step_is_exactly_adamw() -> None:
    """Breaks when the rounded moments are used in the step that makes them, or epsilon is put elsewhere."""
    wide, _ = trained(AdamW(learning_rate=0.05, epsilon=1e-2), steps=1)
    narrow, _ = trained(AdamW8Bit(learning_rate=0.05, epsilon=1e-2), steps=1)
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-7)
