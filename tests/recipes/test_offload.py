"""What a recipe says of the host's memory: refused where it means nothing, and what is laid out where it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.recipes import bench
from luthier.recipes.bench import Bench, lay_out
from luthier.recipes.schemas.files import load_recipe
from luthier.recipes.sizing import memory
from tests.lanes import LateLane


def laid_out(recipe: Path, *more: str) -> Bench:
    return lay_out(load_recipe(recipe, overrides=list(more)).recipe)


def test_a_cpu_has_no_other_memory(recipe: Path) -> None:
    """Breaks when a knob is taken that nothing comes of."""
    with pytest.raises(RecipeError, match="offload is 'optimizer', and the model is on cpu") as refused:
        laid_out(recipe, "batch.offload=optimizer")
    assert "leave offload out" in (refused.value.do or "")
    with pytest.raises(RecipeError, match="moves the inputs of recomputed blocks, and batch.recompute is 'none'"):
        laid_out(recipe, "batch.offload=both", "batch.recompute=none")


def test_what_a_recipe_moves_is_laid_out_and_planned(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the plan, the stepper and the blocks do not mean the same, or a step is another one."""
    near = laid_out(recipe, "adapter=full", "batch.recompute=all", "optimizer.learning_rate=0.01")
    lane = LateLane()
    monkeypatch.setattr(bench, "lane_to_host", lambda offload, model: lane)
    far = laid_out(recipe, "adapter=full", "batch.recompute=all", "optimizer.learning_rate=0.01", "batch.offload=both")
    for made in (near, far):
        made.stepper.forward_backward(made.source.next_step())
        made.stepper.optim_step()
    masters = far.stepper.masters
    assert all(torch.equal(masters[name], master) for name, master in near.stepper.masters.items())
    assert all(torch.equal(each, masters[name]) for name, each in far.stepper.parameters.items())
    plan, before = far.plan["memory"], near.plan["memory"]
    assert before["host"] == 0 and before["trained"] == plan["trained"], "they were float32, so there was one copy"
    assert plan["optimizer"] == 0 and plan["gradients"] < before["gradients"]
    states = [value for state in far.stepper.optimizer.state.values() for value in state.values() if value.ndim]
    held = sum(each.nbytes + each.nbytes for each in masters.values()) + sum(each.nbytes for each in states)
    copied = sum(each.nbytes for each in (*masters.values(), *states))
    inputs = plan["host"] - held - copied
    blocks, hidden = far.model.recomputable, far.model.sites.hidden
    assert inputs == blocks * plan["tokens"] * hidden * 4 and lane.back_bytes > 0
    assert [said for said in far.plan["notices"] if "lie in the host's memory, where" in said]
    assert plan["total"] == sum(plan[part] for part in memory.PARTS)
