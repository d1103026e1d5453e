"""The suite that shows bit-exact resume sees what is forgotten; whatever an optimizer keeps is saved or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.core.errors import RecipeError
from luthier.optimizers import Optimizer
from tests.contracts.resumption import (
    BAD_STEP,
    BREAKS,
    FEW_BREAKS,
    FORGETTABLE,
    Setup,
    Trace,
    assert_resumes,
    differences,
    resumed,
    snapshots_of,
)

SETUP = Setup(adapter={"method": "lora", "dropout": 0.3})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, dict[int, Path]]:
    """A run and its snapshots."""
    return snapshots_of(SETUP, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("part", FORGETTABLE)
@pytest.mark.parametrize("step", [BREAKS["mid epoch"], BAD_STEP])
def test_a_part_that_is_forgotten_is_seen(part: str, step: int, saved: tuple[Trace, dict[int, Path]]) -> None:
    """Guards every test that uses the suite: with a part of the state unread, the comparison fails."""
    whole, places = saved
    told = differences(resumed(SETUP, places[step], forget=part), whole.since(step))
    if part == "bad_steps" and step != BAD_STEP:
        assert not told, "there was no bad step to forget"
        return
    where = {"optimizer": "optimizer", "random": "random", "cursor": "rows", "bad_steps": "loop"}[part]
    assert any(text.startswith(where) for text in told), told


def test_a_step_that_comes_twice_is_seen(saved: tuple[Trace, dict[int, Path]]) -> None:
    """Guards the comparison itself: the right numbers at the wrong step are wrong."""
    whole, places = saved
    found = resumed(SETUP, places[2])
    assert differences(found, whole.since(2)) == []
    assert differences(found, whole.since(1)) != [] and differences(found, whole.since(3)) != []


@pytest.mark.parametrize("began", [0, 2])
def test_a_run_goes_on_whatever_is_recomputed(began: int, tmp_path: Path) -> None:
    """Breaks when memory that is short at the second start makes another run of the same one."""
    setup = replace(SETUP, recomputed=began)
    whole, places = snapshots_of(setup, tmp_path)
    assert differences(whole, snapshots_of(SETUP, tmp_path / "kept")[0]) == []
    for count in range(3):
        assert differences(resumed(replace(setup, recomputed=count), places[2]), whole.since(2)) == []


class Toy(TorchOptimizer):
    """Gradient descent whose rate depends on something it keeps; `keep` says where."""

    def __init__(self, tensors: list[Tensor], keep: Callable[[Toy, Tensor], float], *, rate: float) -> None:
        super().__init__(tensors, {"lr": rate})
        self.keep = keep

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor.add_(tensor.grad, alpha=-group["lr"] * self.keep(self, tensor))


class Keeping(Optimizer):
    """A method around it."""

    learning_rate: float = 1e-2
    where: str

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        return Toy(list(parameters.values()), KEEP[self.where], rate=self.learning_rate)

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 0


def _state_number(optimizer: Toy, tensor: Tensor) -> float:
    calls = optimizer.state[tensor]["calls"] = optimizer.state[tensor].get("calls", 0) + 1
    return 1.0 + 0.1 * calls


def _state_text(optimizer: Toy, tensor: Tensor) -> float:
    phase = optimizer.state[tensor]["phase"] = {"": "odd", "odd": "even"}.get(
        optimizer.state[tensor].get("phase", ""), "odd"
    )
    return 1.0 if phase == "odd" else 1.5


def _state_scalar_tensor(optimizer: Toy, tensor: Tensor) -> float:
    before = optimizer.state[tensor].get("scale", torch.tensor(1.0, dtype=torch.float64))
    optimizer.state[tensor]["scale"] = before * 1.125
    return float(before)


def _state_infinite(optimizer: Toy, tensor: Tensor) -> float:
    first = optimizer.state[tensor].get("best", float("inf"))
    optimizer.state[tensor]["best"] = min(first, 3.0)
    return 1.0 if first == float("inf") else 1.5


def _group_number(optimizer: Toy, tensor: Tensor) -> float:
    group = optimizer.param_groups[0]
    group["calls"] = group.get("calls", 0) + 1
    return 1.0 + 0.01 * float(group["calls"])


def _group_text(optimizer: Toy, tensor: Tensor) -> float:
    group = optimizer.param_groups[0]
    group["phase"] = "b" if group.get("phase", "a") == "a" else "a"
    return 1.0 if group["phase"] == "a" else 1.5


def _group_tuple(optimizer: Toy, tensor: Tensor) -> float:
    group = optimizer.param_groups[0]
    first, second = group.get("betas", (0.5, 0.9))
    group["betas"] = (first * 1.01, second)
    return float(1.0 + first)


def _group_tensor(optimizer: Toy, tensor: Tensor) -> float:
    group = optimizer.param_groups[0]
    group["scale"] = group.get("scale", torch.ones(())) * 1.01
    return float(group["scale"])


def _state_list(optimizer: Toy, tensor: Tensor) -> float:
    history = optimizer.state[tensor].setdefault("history", [])
    history.append(len(history))
    return 1.0 + 0.01 * len(history)


def _shared_state(optimizer: Toy, tensor: Tensor) -> float:
    shared = optimizer.state["shared"]
    shared["calls"] = shared.get("calls", 0) + 1
    return 1.0 + 0.01 * float(shared["calls"])


KEEP: dict[str, Callable[[Toy, Tensor], float]] = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if name.startswith(("_state_", "_group_", "_shared_"))
}


@pytest.mark.parametrize("where", KEEP)
def test_whatever_an_optimizer_keeps_is_restored_or_refused(where: str, tmp_path: Path) -> None:
    """Breaks when a checkpoint leaves out, without a word, something the next step depends on."""
    try:
        assert_resumes(Setup(adapter="ia3", optimizer=Keeping(where=where)), tmp_path, breaks=FEW_BREAKS)
    except RecipeError as refused:
        assert "the optimizer keeps" in str(refused) and refused.allowed
        assert where in ("state_list", "shared_state", "group_tensor", "group_tuple", "group_text"), refused
