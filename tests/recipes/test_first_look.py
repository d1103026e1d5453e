"""A run whose adapter chooses by the data's gradient: it looks once, and what it has found is in its checkpoints."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.adapters.sparse import Sparse
from luthier.recipes.opening.session import load
from luthier.train.stepper import Stepper, StepReport
from tests.cli.commands import COLOURS, STEPS, chat, events, luthier, recipe_text

ADAPTER = "{method: sparse, choice: fisher, density: 0.2, rows: 5}"


def test_a_run_looks_once_and_goes_on_without_looking_again(
    tmp_path: Path, llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a resumed run chooses anew, takes places of no meaning, or the proof knows no start."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(llama, rows, adapter=ADAPTER), encoding="utf-8")
    folder, whole, plain = tmp_path / "run", tmp_path / "whole", Stepper.optim_step
    luthier("train", recipe, "--run", whole).must(0)
    [looked] = [event for event in events(whole) if event["kind"] == "first_look"]
    assert looked["rows"] == 5 and looked["step"] == 0
    # Places are as much of a checkpoint as the optimizer's state.
    last = [path.stat().st_size for path in (whole / "checkpoints" / f"step-{STEPS:06d}").iterdir()]
    planned = json.loads((whole / "plan.json").read_text("utf-8"))["disk"]["checkpoint"]
    assert planned == pytest.approx(sum(last), rel=0.25)
    done = 0

    def terminated(self: Stepper, *, factor: float = 1.0) -> StepReport:
        nonlocal done
        done += 1
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, factor=factor)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "optim_step", terminated)
        luthier("train", recipe, "--run", folder).must(75)

    def fail(*_: object) -> None:
        raise AssertionError("a resumed run looks at nothing")

    monkeypatch.setattr("luthier.recipes.first_look.look", fail)
    luthier("resume", folder).must(0)
    for name in ("adapter/adapter_model.safetensors", f"checkpoints/step-{STEPS:06d}/state.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    places = [tensor for name, tensor in tensors.items() if name.endswith("sparse_rows")]
    assert all(len(tensor.unique()) > 1 for tensor in places)
    assert json.loads((folder / "summary.json").read_text("utf-8"))["proof"]["differs_from_start"]


def test_a_session_looks_at_the_first_rows_it_gets(tmp_path: Path, llama: Path) -> None:
    """Breaks when somebody's own loop trains places of no meaning, or a saved adapter chooses again."""
    data = [chat(f"the colour of {n} is", COLOURS[n % 8]) for n in range(6)]
    made = []
    for first in (data[:2], data[2:4], data[:2]):
        own = load(llama, adapter=Sparse(choice="gradient", rows=2), precision="float32")
        own.forward_backward([*first, *data])
        made.append(torch.cat([value for name, value in own.attachment.named_constants().items()]))
        own.optim_step()
        again = own.attachment.named_constants()
        own.forward_backward(data)
        assert all(torch.equal(value, again[name]) for name, value in own.attachment.named_constants().items())
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    saved = own.save(tmp_path / "mine")
    loaded = load(saved)
    loaded.forward_backward(data[2:])
    assert loaded.attachment.digest() == own.attachment.digest()
