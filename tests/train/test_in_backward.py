"""Steps in the backward pass: the same to the bit, one gradient at a time, and what stops them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from luthier.adapters import Adapter
from luthier.core.chosen import choose
from luthier.core.errors import MemoryExhaustedError, NumericError, RecipeError
from luthier.core.knobs import validate
from luthier.data.forest import Tree
from luthier.objectives.sft import SFT
from luthier.optimizers import Optimizer
from luthier.optimizers.adamw import AdamW
from luthier.optimizers.galore import GaLore
from luthier.optimizers.lion import Lion
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.train.diagnosis import find_bad_number
from luthier.train.rehearsal import rehearse
from luthier.train.source import DataSource
from luthier.train.state import LoopState
from luthier.train.stepper import Stepper, StepReport
from luthier.train.watch import Watch
from tests import forests

GALORE = GaLore(rank=4, update_every=2, learning_rate=1e-2, weight_decay=0.1)
KINDS = ["galore", "lion", "adamw_8bit", "paged_adamw"]


def made(
    method: Optimizer,
    *,
    adapter: str = "full",
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    recomputed: int = 0,
    **more: Any,
) -> Stepper:
    """A stepper over a tiny model, the same for the same arguments."""
    model = forests.language_model(architecture, dtype=dtype)
    torch.manual_seed(0)
    attachment = model.attach(choose("adapters", Adapter, adapter).attach(model.sites))
    model.recompute(recomputed)
    return Stepper(model, attachment, SFT(), method, **{"max_grad_norm": None, **more})


def trees(step: int = 0) -> list[Tree]:
    return forests.rows(4, seed=step)


def both(method: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Stepper, Stepper]:
    """A stepper that steps in the backward pass, and one that does not."""
    knobs = {"method": method, "learning_rate": 1e-2}
    chosen = GALORE if method == "galore" else choose("optimizers", Optimizer, knobs)
    plain = made(chosen, **more)
    with monkeypatch.context() as patch:
        patch.setattr(type(chosen), "steps_in_backward", property(lambda self: True))
        return made(chosen, **more), plain


def assert_same(one: Stepper, other: Stepper) -> None:
    for name, master in other.masters.items():
        assert torch.equal(one.masters[name], master), name
        assert torch.equal(one.parameters[name], other.parameters[name]), name
        ours, theirs = one.optimizer.state[one.masters[name]], other.optimizer.state[master]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("adapter", "architecture", "recomputed"), [
    ("full", "llama", 0), ("full", "llama", 2), ("full", "qwen2", 0), ("full", "gpt2", 0), ("full", "gemma2", 0),
    ("lora", "llama", 0), ("lora", "mistral", 1),
])  # fmt: skip
@pytest.mark.parametrize("method", KINDS)
def test_it_is_the_ordinary_step_bit_for_bit(
    method: str, adapter: str, architecture: str, recomputed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a gradient is stepped before it is whole, divided by another weight, or stepped at another rate."""
    ours, plain = both(
        method, monkeypatch, adapter=adapter, architecture=architecture, dtype=dtype, recomputed=recomputed
    )
    assert ours.in_backward is not None and plain.in_backward is None
    start = {name: master.clone() for name, master in ours.masters.items()}
    for step, factor in enumerate((0.5, 1.0, 0.25)):
        ours.set_rate(factor)
        assert ours.forward_backward(trees(step)) == plain.forward_backward(trees(step))
        found, expected = ours.optim_step(factor=factor), plain.optim_step(factor=factor)
        assert found == expected and found.applied and found.stepped_before == 0
        assert_same(ours, plain)
    assert any(not torch.equal(start[name], master) for name, master in ours.masters.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_let_go_one_by_one(dtype: torch.dtype) -> None:
    """Breaks when the whole gradient is there at some moment."""
    stepper = made(GALORE.model_copy(update={"per_layer": True}), dtype=dtype)
    held: list[int] = []

    def look(_parameter: torch.Tensor) -> None:
        tensors = [*stepper.parameters.values(), *stepper.masters.values()]
        held.append(sum(tensor.grad is not None for tensor in tensors))

    for parameter in stepper.parameters.values():
        parameter.register_post_accumulate_grad_hook(look)
    stepper.forward_backward(trees())
    assert len(held) == len(stepper.parameters) and max(held) == 0
    assert stepper.optim_step().applied


def spoil(stepper: Stepper, name: str) -> None:
    stepper.parameters[name].register_hook(lambda gradient: gradient * math.nan)


def test_a_bad_gradient_stops_the_step_where_it_comes() -> None:
    """Breaks when it is applied, when something behind it is, or when nobody is told that the rest was."""
    stepper = made(GALORE.model_copy(update={"per_layer": True}))
    before = {name: master.clone() for name, master in stepper.masters.items()}
    order: list[str] = []
    for name, parameter in stepper.parameters.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    bad = next(name for name in stepper.parameters if "layers.0" in name and "down" in name)
    spoil(stepper, bad)
    passed = stepper.forward_backward(trees())
    report = stepper.optim_step()
    place = order.index(bad)
    assert 0 < place < len(order) - 1
    moved = {name for name, master in stepper.masters.items() if not torch.equal(master, before[name])}
    assert moved == set(order[:place])
    assert report == StepReport(report.grad_norm, False, (bad,), stepped_before=place) and math.isnan(report.grad_norm)
    recorded: list[Any] = []

    class Diary:
        def record(self, event: Any) -> None:
            recorded.append(event)

    watch = Watch(Diary(), lambda: "", max_bad_steps=2, diagnose=None)
    watch.bad_gradient(state := LoopState(), passed, trees(), report)
    assert recorded[0].values["stepped_before"] == place
    with pytest.raises(NumericError, match=rf"to the tensors below it \({place} above it had been stepped\)"):
        watch.bad_gradient(state, passed, trees(), report)


def test_a_bad_loss_steps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a backward pass of a loss that is not finite is a step."""
    stepper = made(GALORE.model_copy(update={"per_layer": True}))
    before = {name: master.clone() for name, master in stepper.masters.items()}
    loss = SFT.loss
    monkeypatch.setattr(SFT, "loss", lambda self, outputs, forest: _times(loss(self, outputs, forest), math.inf))
    assert not math.isfinite(stepper.forward_backward(trees()).loss_sum)
    with pytest.raises(RecipeError, match="without a gradient"):
        stepper.optim_step()
    stepper.zero_grad()
    assert all(torch.equal(master, before[name]) for name, master in stepper.masters.items())


def _times(report: Any, factor: float) -> Any:
    from dataclasses import replace

    return replace(report, sum=report.sum * factor)


def test_a_rehearsal_and_a_diagnosis_step_nothing() -> None:
    """Breaks when what only looks moves weights."""
    stepper = made(GALORE.model_copy(update={"per_layer": True}))
    before = {name: master.clone() for name, master in stepper.masters.items()}
    views = forests.views(12)
    source = DataSource(views, SFT(), lengths=forests.lengths(views), seed=0, rows=2)
    rehearsal = rehearse(stepper, source, 6)
    assert rehearsal.splits == () and rehearsal.tokens > 0
    assert find_bad_number(stepper, trees()).what == "unknown"
    assert all(torch.equal(master, before[name]) for name, master in stepper.masters.items())
    assert not stepper.optimizer.state and all(each.grad is None for each in stepper.parameters.values())
    stepper.forward_backward(trees())
    assert stepper.optim_step().applied


@pytest.mark.parametrize("when", [0, 5])
def test_a_step_that_ran_out_of_memory_is_not_made_again(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when layers that were stepped are stepped again in smaller micro-batches."""
    stepper = made(GALORE.model_copy(update={"per_layer": True}))
    optimizer: Any = stepper.optimizer
    update, done = optimizer.update, [0]

    def short(*given: Any) -> None:
        if done[0] == when:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done[0] += 1
        update(*given)

    monkeypatch.setattr(optimizer, "update", short)
    with pytest.raises(MemoryExhaustedError, match=rf"{when} of {len(stepper.parameters)} tensors had been stepped"):
        stepper.forward_backward(trees())
    assert done == [when]


def test_what_it_excludes_is_refused_with_a_reason() -> None:
    """Breaks when a bound on the norm, or a second micro-batch, silently makes another step of it."""
    per_layer = GALORE.model_copy(update={"per_layer": True})
    with pytest.raises(RecipeError, match=r"max_grad_norm is 1.0, and galore steps each tensor"):
        made(per_layer, max_grad_norm=1.0)
    stepper = made(per_layer, micro_tokens=8)
    with pytest.raises(RecipeError, match="several micro-batches of 8"):
        stepper.forward_backward(trees())
    stepper = made(per_layer)
    stepper.forward_backward(trees())
    with pytest.raises(RecipeError, match="a second pass for one step"):
        stepper.forward_backward(trees())
    with pytest.raises(RecipeError, match="optim_step at 0.5 times the learning rate, after steps at 1.0 times"):
        stepper.optim_step(factor=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "steps_in_backward", property(lambda self: True))
        with pytest.raises(RecipeError, match="adamw steps all tensors at once"):
            made(AdamW())


@pytest.mark.parametrize(("values", "said"), [
    ({}, "max_grad_norm is 1.0"),
    ({"max_grad_norm": None}, "a step of 8,192 tokens goes through the model in several micro-batches of 4,096"),
    ({"max_grad_norm": None, "batch": {"tokens": 5000}}, "a step of 5,000 tokens"),
    ({"max_grad_norm": None, "batch": {"tokens": 4096}}, ""),
    ({"max_grad_norm": None, "batch": {"micro_tokens": 8192}}, ""),
    ({"max_grad_norm": None, "batch": {"rows": 500}}, ""),
])  # fmt: skip
def test_a_recipe_is_told_before_anything_is_loaded(values: dict[str, Any], said: str) -> None:
    """Breaks when a run of hours is refused at its first step."""
    recipe = {"model": "m", "data": "d", "optimizer": {"method": "galore", "per_layer": True}, **values}
    if not said:
        assert validate(FinetuneRecipe, recipe).optimizer.steps_in_backward
        return
    with pytest.raises(RecipeError, match=said):
        validate(FinetuneRecipe, recipe)


def test_who_does_not_ask_for_it_gets_none() -> None:
    """Breaks when an optimizer steps twice."""
    assert made(Lion()).in_backward is None
