"""Folders with packed weights: what is not sound in them is refused, and nothing is ever whole on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.adapters.full import Full
from luthier.core.errors import CorruptError, LuthierError, RecipeError, UnsafeArtifactError
from luthier.model.files import packed_files
from luthier.model.files.packed_files import save_packed
from luthier.model.load import load_model
from luthier.quantizers.nf4 import NF4
from luthier.quantizers.ternary import Ternary
from luthier.recipes.opening.quantized import load_base, quantize
from tests.tiny import tiny_folder

LAYER = "model.layers.0.mlp.down_proj"
STATE = f"{LAYER}.{NF4.file_mark}"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder with packed weights."""
    model = load_base(str(tiny_folder("llama", tmp_path)), precision="float32")
    quantize(model, NF4())
    save_packed(model, tmp_path / "packed")
    return tmp_path / "packed"


def change(folder: Path, how: Callable[[dict[str, Tensor]], None]) -> str:
    """The folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def change_state(folder: Path, **values: Any) -> str:
    """The folder with another state of one layer."""

    def how(tensors: dict[str, Tensor]) -> None:
        state = {**json.loads(bytes(tensors[STATE].tolist())), **values}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change(folder, how)


def change_config(folder: Path, **values: Any) -> str:
    """The folder with another `quantization_config`."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"].update(values)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"shape": [32, 47]}, "weight is 768 numbers in uint8"),
        ({"shape": [48, 32]}, r"is packed from \[48, 32\] and should be \[32, 48\]"),
        ({"shape": [2**40, 2**40]}, "weight is 768 numbers"),
        ({"shape": [32.0, 48]}, "shape is"),
        ({"shape": "32 48"}, "shape is"),
        ({"blocksize": 63}, "blocksize 63"),
        ({"blocksize": 128}, "weight.absmax is 24 numbers"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0"),
        ({"nested_offset": None}, "nested_offset None"),
        ({"nested_offset": True}, "nested_offset True"),
    ],
)
def test_a_state_that_does_not_fit_its_tensors_is_refused(packed: Path, values: Any, said: str) -> None:
    """Breaks when a number in the JSON is believed before it is compared with the bytes there are."""
    with pytest.raises(CorruptError, match=said):
        load_base(change_state(packed, **values))


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def how(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{LAYER}.{name}"]

    return how


def _put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def how(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{name}"] = tensor

    return how


def _drop_all(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(NF4.file_mark)]:
        del tensors[name]


def _rename(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
        tensors[name.replace("down_proj", "other_proj")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (_without("weight"), "weight is not there"),
        (_without("weight.absmax"), "weight.absmax is not there"),
        (_without("weight.quant_map"), "weight.quant_map is not there"),
        (_without("weight.nested_absmax"), "weight.absmax is 24 numbers in uint8"),
        (_without(NF4.file_mark), "down_proj"),
        (_put("weight", torch.zeros(768, 1)), "weight is 768 numbers in float32"),
        (_put("weight.quant_map", torch.linspace(-1, 1, 16)), "holds other levels"),
        (_put(NF4.file_mark, torch.tensor(list(b"{"), dtype=torch.uint8)), "is no JSON"),
        (_put(NF4.file_mark, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "holds a JSON list"),
        (_drop_all, "no tensor is called"),
        (_rename, "no linear layer of that name"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(packed: Path, how: Any, said: str) -> None:
    """Breaks when a tensor that is lost or exchanged is found out by a crash, or not at all."""
    with pytest.raises(CorruptError, match=said):
        load_base(change(packed, how))


def test_other_quantized_files_are_refused_and_told_apart(packed: Path) -> None:
    """Breaks when settings of another packing are read as this one, or a config steers code from in there."""
    with pytest.raises(RecipeError, match="'fp4'"):
        load_base(change_config(packed, bnb_4bit_quant_type="fp4"))
    with pytest.raises(RecipeError, match="'gptq'"):
        load_base(change_config(packed, bnb_4bit_quant_type="nf4", quant_method="gptq"))
    with pytest.raises(UnsafeArtifactError, match="steers"):
        load_base(change_config(packed, auto_map={"AutoModel": "evil.Model"}))


def test_who_reads_no_packed_weights_refuses_them(packed: Path) -> None:
    """Breaks when the gate opens for everybody."""
    with pytest.raises(RecipeError, match="the weights are quantized"):
        load_model(str(packed))


def test_the_base_itself_cannot_be_trained_or_packed_twice(packed: Path) -> None:
    """Breaks when codes are trained, or numbers rounded a second time."""
    model = load_base(str(packed), precision="float32")
    with pytest.raises(RecipeError, match="its weights are packed"):
        model.attach(Full(parts="norms").attach(model.sites))
    with pytest.raises(RecipeError, match="hold packed weights"):
        quantize(model, NF4())


def test_a_packing_without_files_is_refused(tmp_path: Path) -> None:
    """Breaks when codes that nobody reads are written under the name of weights."""
    model = load_base(str(tiny_folder("llama", tmp_path)), precision="float32")
    with pytest.raises(RecipeError, match="no weight of"):
        save_packed(model, tmp_path / "packed")
    quantize(model, Ternary())
    with pytest.raises(RecipeError, match="packed as Ternary"):
        save_packed(model, tmp_path / "packed")
    assert issubclass(RecipeError, LuthierError) and not (tmp_path / "packed").exists()


def test_no_packed_weight_is_whole_while_it_is_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when reading makes the weights that packing was to spare."""
    made: list[int] = []
    make_room = packed_files.make_room

    def seen(module: Any, found: Any) -> None:
        made.extend(module.get_submodule(name).weight.untyped_storage().nbytes() for name in found)
        make_room(module, found)

    monkeypatch.setattr("luthier.model.load.make_room", seen)
    load_base(str(packed), precision="float32")
    assert len(made) == 14 and max(made) == 4
