"""`quantize`: the folder it writes, and what every other verb does with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import luthier
from luthier.core.errors import GateError, RecipeError, RefusedError
from luthier.model.editing.edits import base_parameters
from luthier.model.packed import PackedWeight, stored_bytes
from luthier.quantizers.int4_group import Int4Group
from luthier.quantizers.nf4 import NF4, NF4Packing
from luthier.recipes.opening.opened import open_named
from luthier.recipes.opening.quantize import quantize_model
from tests.cli.commands import luthier as said
from tests.recipes.test_api import arguments


def test_a_folder_is_trained_on_merged_into_and_asked(llama: Path, rows: Path, tmp_path: Path) -> None:
    """Breaks when a verb does not take a packed folder for the model it is."""
    found = quantize_model(str(llama), NF4(), tmp_path / "packed", precision="float32")
    assert found["weights"]["after"] < found["weights"]["before"] and found["precision"] == "float32"
    named = {**arguments(llama, rows), "model": str(tmp_path / "packed")}
    run = luthier.finetune(**named, run=tmp_path / "run", quiet=True)
    assert run.summary["proof"]["reloaded_loss"] == pytest.approx(run.summary["loss"]["eval"], rel=1e-5)
    opened = open_named(str(tmp_path / "run"))
    packed = [each for each in opened.model.module.parameters() if isinstance(each, PackedWeight)]
    assert packed and sum(map(stored_bytes, base_parameters(opened.model.module).values())) == found["weights"]["after"]
    assert opened.model.merge().packed > 0 and run.generate(["2 + 2?"], max_new_tokens=2)
    with pytest.raises(RefusedError, match="is there already"):
        quantize_model(str(llama), NF4(), tmp_path / "packed")
    with pytest.raises(RecipeError, match="hold packed weights"):
        quantize_model(str(tmp_path / "packed"), NF4(), tmp_path / "again")
    with pytest.raises(RecipeError, match="no other tool has files"):
        quantize_model(str(llama), Int4Group(), tmp_path / "other")


def test_a_folder_that_computes_something_else_is_not_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when what was written is believed without reading it."""
    tensors = NF4Packing.file_tensors

    def wrong(self: NF4Packing, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        held = dict(tensors(self, dtype))
        held["weight"] = held["weight"].roll(1, 0)
        return held

    monkeypatch.setattr("luthier.quantizers.nf4.NF4Packing.file_tensors", wrong)
    with pytest.raises(GateError, match="gives other logits"):
        quantize_model(str(llama), NF4(), tmp_path / "packed", precision="float32")
    assert not (tmp_path / "packed").exists() and not list(tmp_path.glob(".tmp-*"))


def test_the_command(llama: Path, tmp_path: Path) -> None:
    """Breaks when a knob does not reach the quantizer, or the last line is no JSON."""
    out = tmp_path / "packed"
    told = said("quantize", str(llama), "--out", str(out), "--set", "quantizer.block=128", "--json").json
    assert told["quantizer"] == {"method": "nf4", "block": 128, "double": True}
    assert json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]["load_in_4bit"] is True
    assert told["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
