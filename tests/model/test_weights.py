"""Where weights come from: only files that cannot run code, only what belongs to the config, nothing in silence.

That pickles are refused under `python -O` too is in tests/faults/test_optimized.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoConfig

from luthier.core.errors import CorruptError, LuthierError, MissingError, RecipeError, UnsafeArtifactError
from luthier.data.forest import Forest
from luthier.model.files.shards import INDEX, SINGLE
from luthier.model.load import load_model, state_digest
from tests import forests
from tests.tiny import VOCABULARY, tiny_folder

FIRST = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama of one's own."""
    return tiny_folder("llama", tmp_path)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return _touch, (str(self.path),)


def _touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", SINGLE])
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch"])
def test_a_pickle_is_refused_whatever_it_is_called_and_never_run(folder: Path, name: str, *, zipped: bool) -> None:
    """Breaks when a weight file can run code. The last lines show that this one would."""
    mark, file = folder / "ran", folder / name
    (folder / SINGLE).unlink()
    if zipped:
        torch.save(Touch(mark), file)
    else:
        file.write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(UnsafeArtifactError, match=r"pickle.*safetensors.*save_pretrained"):
        load_model(str(folder))
    assert not mark.exists()
    if not zipped:
        pickle.loads(file.read_bytes())
        assert mark.exists()


def sharded(folder: Path, *, names: tuple[str, str] = ("a.safetensors", "b.safetensors"), both: str = "") -> None:
    """Divide the weights over two files and an index; the tensor `both` goes into each."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    halves: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        halves[number % 2][name] = tensor
    if both:
        halves[0][both] = halves[1][both] = tensors[both]
    for name, half in zip(names, halves, strict=True):
        if "/" not in name:
            save_file(half, folder / name, metadata={"format": "pt"})
    where = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")


def test_weights_in_several_files_are_the_same_weights(folder: Path) -> None:
    """Breaks when a shard is left out."""
    whole = state_digest(load_model(str(folder), precision="float32").module)
    sharded(folder)
    assert state_digest(load_model(str(folder), precision="float32").module) == whole


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "pytorch_model.bin", ".b.safetensors", "x/y"])
def test_an_index_names_safetensors_files_beside_it(folder: Path, name: str) -> None:
    """Breaks when a file from elsewhere is read because an index says so."""
    sharded(folder)
    index = json.loads((folder / INDEX).read_text("utf-8"))
    index["weight_map"][FIRST] = name
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UnsafeArtifactError, match="same folder"):
        load_model(str(folder))


def test_a_shard_that_is_missing_or_says_a_tensor_twice(folder: Path, tmp_path: Path) -> None:
    """Breaks when half a download is trained, or the last of two values wins."""
    twice = Path(shutil.copytree(folder, tmp_path / "twice"))
    sharded(twice, both=FIRST)
    with pytest.raises(CorruptError, match="stands in two files"):
        load_model(str(twice))
    sharded(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(MissingError, match=r"names b.safetensors, which is not there"):
        load_model(str(folder))


def test_every_tensor_of_the_config_is_there_in_its_shape_and_what_is_too_much_is_named(folder: Path) -> None:
    """Breaks when a layer is drawn at random because its tensor is missing."""
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "model.other.weight": torch.ones(2)}, folder / SINGLE, metadata={"format": "pt"})
    model = load_model(str(folder))
    assert any("has no place for model.other.weight" in notice for notice in model.notices)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"1 tensors are missing .*model\.norm\.weight"):
        load_model(str(folder))
    changed(folder, vocab_size=2 * VOCABULARY)
    with pytest.raises(CorruptError, match=r"model.embed_tokens.weight is \[128, 32\] and should be \[256, 32\]"):
        load_model(str(folder))


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 9999), ("hidden_size", 2**20)])
def test_a_config_of_a_giant_beside_a_small_file_takes_no_memory(folder: Path, key: str, value: int) -> None:
    """Breaks when a number in config.json allocates what the weights do not fill."""
    changed(folder, **{key: value})
    with pytest.raises(CorruptError, match="config (says|describes)"):
        load_model(str(folder))


def test_other_files_of_a_folder_are_not_read(folder: Path) -> None:
    """Breaks when transformers follows an adapter or generation code that lies beside the weights."""
    whole = state_digest(load_model(str(folder)).module)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}', encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise RuntimeError\n", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(folder / "ran")))
    assert state_digest(load_model(str(folder)).module) == whole
    assert not (folder / "ran").exists()


def test_a_class_that_takes_no_attention_from_outside_runs_its_own(tmp_path: Path) -> None:
    """Breaks when older classes, which look the attention's name up in a table, end in a KeyError."""
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=6, max_position_embeddings=64, intermediate_size=48, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    forest = Forest((forests.branching(seed=1), *forests.rows(2, seed=2)))
    for source in (str(tmp_path), f"fresh:{tmp_path}"):
        model = load_model(source, precision="float32")
        assert model.executor.kind == "unrolled"
        expected = forests.brute_loss(model.module, forest).item()
        assert forests.engine_loss(model, forest.trees).item() == pytest.approx(expected, rel=1e-5)


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    """Breaks when a model class is made that has no head to train."""
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is a vit model, which is no causal language model"):
        load_model(f"fresh:{tmp_path}")


def test_a_token_that_has_no_row_is_an_error_before_any_lookup(folder: Path) -> None:
    """Breaks when a tokenizer larger than the embedding ends in an index error, or makes the model grow."""
    model = load_model(str(folder))
    (tree,) = forests.rows(1, seed=1)
    tokens = tree.segments[0].tokens.copy()
    model.require_rows(tokens)
    tokens[0] = VOCABULARY
    with pytest.raises(RecipeError, match=r"token 128 has no row.*has 128; tokens 0 to 127.*never resizes"):
        model.require_rows(tokens)


def changed(folder: Path, **values: object) -> None:
    """Change keys of the config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), encoding="utf-8")


def test_errors_of_this_room_are_ours(folder: Path) -> None:
    """Breaks when a truncated weight file reaches the user as the error of a library."""
    data = (folder / SINGLE).read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        (folder / SINGLE).write_bytes(data[:size])
        with pytest.raises(LuthierError):
            load_model(str(folder))
