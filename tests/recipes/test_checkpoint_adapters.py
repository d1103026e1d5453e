"""Adapters of checkpoints against runs that ended there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.core.errors import CorruptError, RecipeError
from luthier.model.files.adapter_config import TENSORS
from luthier.recipes import finetune
from luthier.recipes.opening import checkpoint_adapters
from luthier.recipes.opening.checkpoint_adapters import earlier_steps, step_of_result, write_adapter_at
from luthier.recipes.opening.opened import open_named
from luthier.recipes.progress import Silent
from luthier.recipes.schemas.files import load_recipe
from luthier.store.runs import RunDirectory
from luthier.train import state


def trained(recipe: Path, run: Path, *more: str) -> RunDirectory:
    overrides = ["schedule=constant", "evaluation.every=0", "evaluation.fraction=0.0", "checkpoint.every=2", *more]
    finetune.start(load_recipe(recipe, overrides=overrides, run=run).recipe, recorder=Silent())
    return RunDirectory.open(run)


def test_the_adapter_of_a_step_is_that_of_a_run_which_ended_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a factor takes another's place, half a number is lost, or damaged numbers are written."""
    run = trained(recipe, tmp_path / "long", "budget.steps=4", "precision=bfloat16")
    assert step_of_result(run) == 4 and earlier_steps(run) == [2]
    place = tmp_path / "at-2"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_adapters, "read_config", lambda _: {"peft_type": "IA3"})
        with pytest.raises(RecipeError, match="of the kind IA3"):
            write_adapter_at(run, 2, place)
    write_adapter_at(run, 2, place)
    written = (place / TENSORS).stat().st_mtime_ns
    write_adapter_at(run, 2, place)  # as a server does that died before it could say that the job is over
    assert (place / TENSORS).stat().st_mtime_ns == written
    short = trained(recipe, tmp_path / "short", "budget.steps=2", "precision=bfloat16")
    found, expected = load_file(place / TENSORS), load_file(short.folder / "adapter" / TENSORS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    base = str(load_recipe(recipe, overrides=[]).recipe.model)
    assert open_named(base, adapter=str(place)).model.attachments
    saved = run.checkpoints.folder / "step-000002" / state.TENSORS
    saved.write_bytes(saved.read_bytes()[:-8] + bytes(8))
    with pytest.raises(CorruptError):
        write_adapter_at(run, 2, tmp_path / "again")
    assert not (tmp_path / "again").exists()
