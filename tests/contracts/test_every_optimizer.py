"""What every optimizer of the catalog promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.optimizers import Optimizer, set_factors, set_rate
from tests.contracts.resumption import Setup, assert_resumes

each = pytest.mark.parametrize("name", catalog.names("optimizers"))


def descend(method: Optimizer, steps: int = 60) -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor], list[float]]:
    """Steps on a small quadratic; the optimizer, its tensors and the losses."""
    generator = torch.Generator().manual_seed(0)
    # Large enough that a state in eight bits is one.
    tensors = {"mlp.w": torch.randn(90, 50, generator=generator), "b": torch.randn(16, generator=generator)}
    optimizer = method.build(tensors)
    losses = []
    for _ in range(steps):
        losses.append(sum(float((tensor**2).sum()) for tensor in tensors.values()))
        for tensor in tensors.values():
            tensor.grad = 2 * tensor
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
    return optimizer, tensors, losses


@each
def test_it_goes_downhill_on_every_tensor(name: str) -> None:
    """Breaks when a group of parameters is left out, or the sign is wrong."""
    _, tensors, losses = descend(choose("optimizers", Optimizer, name))
    assert losses[-1] < 0.5 * losses[0] and all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@each
def test_its_state_has_the_size_it_declares(name: str) -> None:
    """Breaks when the planner is told another number than is kept."""
    method = choose("optimizers", Optimizer, name)
    optimizer, tensors, _ = descend(method, steps=2)
    kept = sum(
        value.numel() * value.element_size()
        for tensor in tensors.values()
        for value in optimizer.state[tensor].values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert kept == method.state_bytes(shapes) and method.resident_bytes(shapes) <= kept


@each
def test_the_peak_learning_rate_is_the_knob(name: str) -> None:
    """Breaks when a schedule would scale something else."""
    assert choose("optimizers", Optimizer, {"method": name, "learning_rate": 0.125}).peak_learning_rate == 0.125


@each
def test_a_rate_of_zero_changes_nothing(name: str) -> None:
    """Breaks when an update escapes the learning rate, weight decay included."""
    method = choose("optimizers", Optimizer, name)
    tensor = torch.ones(4, 4)
    optimizer = method.build({"w": tensor})
    tensor.grad = torch.full((4, 4), 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert torch.equal(tensor, torch.ones(4, 4))


@each
def test_a_factor_of_the_learning_rate_is_another_learning_rate(name: str) -> None:
    """Breaks when an optimizer has its rate from elsewhere than its groups, or dividing them loses what they hold."""
    generator = torch.Generator().manual_seed(0)
    starts = {"mlp.a": torch.randn(90, 50, generator=generator), "mlp.b": torch.randn(90, 50, generator=generator),
              "c": torch.randn(16, generator=generator)}  # fmt: skip
    knobs = {"method": name, "weight_decay": 0.1, **({"rank": 4} if name == "galore" else {})}

    def stepped(factors: dict[str, float], rates: tuple[float, ...]) -> dict[str, torch.Tensor]:
        tensors = {key: tensor.clone() for key, tensor in starts.items()}
        optimizer = choose("optimizers", Optimizer, knobs).build(tensors)
        set_factors(optimizer, tensors, factors)
        for rate in rates:
            for key, tensor in tensors.items():
                tensor.grad = 2 * tensor + len(key)
            set_rate(optimizer, rate)
            optimizer.step()
        return tensors

    slow, fast = stepped({}, (1e-3, 2e-3, 5e-4)), stepped({}, (4e-3, 8e-3, 2e-3))
    both = stepped({"mlp.b": 4.0, "c": 4.0}, (1e-3, 2e-3, 5e-4))
    assert not torch.equal(slow["mlp.b"], fast["mlp.b"])
    assert torch.equal(both["mlp.a"], slow["mlp.a"])
    assert torch.equal(both["mlp.b"], fast["mlp.b"]) and torch.equal(both["c"], fast["c"])


@each
@pytest.mark.parametrize(("adapter", "dtype"), [("lora", torch.float32), ("full", torch.bfloat16)])
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(
    name: str, adapter: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Breaks when a moment, a counter or a number of a group is not saved."""
    assert_resumes(Setup(optimizer=name, adapter=adapter, dtype=dtype), tmp_path)


@each
def test_it_keeps_nothing_where_no_checkpoint_looks(name: str) -> None:
    """Breaks when an optimizer counts in an attribute of its own instead of its state or its groups."""
    method = choose("optimizers", Optimizer, name)
    tensor = torch.ones(4, 4)
    optimizer = method.build({"w": tensor})

    def kept() -> dict[str, Any]:
        own = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")}
        # torch counts the steps of an optimizer that a scheduler watches; it reads the count nowhere else.
        return {key: repr(value) for key, value in own.items() if key not in ("_opt_called", "_step_count")}

    before = kept()
    for _ in range(3):
        tensor.grad = torch.full((4, 4), 0.5)
        optimizer.step()
    assert kept() == before
