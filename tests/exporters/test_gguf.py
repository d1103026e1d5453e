"""Exports to GGUF: kept where the file is the model, refused where it is not, and never half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import DiskFullError, GateError, MissingError, RecipeError
from luthier.exporters.gguf import Gguf
from luthier.model.files.adapter_config import EXTRAS
from luthier.model.files.json_files import write_object
from luthier.model.files.tensor_files import load_tensors
from luthier.model.gguf import families, model_file, writing
from luthier.model.gguf.formats import Choice
from luthier.model.gguf.parts import TOLERANCES
from luthier.model.gguf.reading import GgufFile
from luthier.model.load import load_model
from luthier.recipes.exporting.export import Source, export
from tests.exporters.gguf_folders import lora_folder
from tests.tiny import CHAT_TEMPLATE

pytest.importorskip("gguf")
TinyPath = Callable[[str], Path]


def source_of(folder: Path, adapter: str | None = None) -> Source:
    """A model that is computed in float32, whatever this machine is quicker in."""
    return Source(name=str(folder), adapter=adapter, precision="float32")


def test_a_model_and_what_was_measured(tiny_path: TinyPath, tmp_path: Path) -> None:
    found = export(source_of(tiny_path("llama")), Gguf(type="F32"), tmp_path / "out")
    assert set(found["files"]) >= {"model.gguf", "parity.json", "README.md"}
    assert found["parity"]["max_difference"] == 0 and found["parity"]["agreement"] == 1
    file = GgufFile.open(tmp_path / "out" / "model.gguf")
    assert file.text("general.name") == "tiny-llama" and file.keys["general.file_type"] == 0
    assert "llama-cli -m" in (tmp_path / "out" / "README.md").read_text()


def test_packed_models_are_measured_with_a_bound_of_their_own(tiny_path: TinyPath, tmp_path: Path) -> None:
    """Random weights are hard on eight bits; their bound is met by what is seen of KL, and a byte count is foretold."""
    source = source_of(tiny_path("llama"))
    dry = export(source, Gguf(type="Q8_0"), tmp_path / "out", dry=True)
    assert not (tmp_path / "out").exists()
    found = export(source, Gguf(type="Q8_0"), tmp_path / "out")
    assert 0 < found["parity"]["max_difference"] < 0.5 and found["parity"]["tolerance"]["form"] == "weights in Q8_0"
    assert found["files"]["model.gguf"] == pytest.approx(dry["bytes"], rel=0.4)


def test_an_adapter_beside_its_base(tiny_path: TinyPath, tmp_path: Path) -> None:
    """Read back from the file alone onto a fresh base: the same logits."""
    source = source_of(tiny_path("llama"), str(lora_folder(tmp_path / "lora")))
    found = export(source, Gguf(part="adapter"), tmp_path / "out")
    assert "adapter.gguf" in found["files"] and "model.gguf" not in found["files"]
    assert found["parity"]["max_difference"] < 1e-4 and found["parity"]["agreement"] == 1
    export(source, Gguf(type="F32"), tmp_path / "merged")
    own = load_tensors(tiny_path("llama") / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    q = "blk.0.attn_q.weight"
    before, after = families.turn(own, 4), GgufFile.open(tmp_path / "merged" / "model.gguf").tensor(q)
    file = GgufFile.open(tmp_path / "out" / "adapter.gguf")
    down, up = file.tensor(f"{q}.lora_a"), file.tensor(f"{q}.lora_b")
    # As llama.cpp adds it to the layer: alpha / rank, on rows in the file's own order.
    torch.testing.assert_close(before + up @ down * (8 / 4), after, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_packed_weights_is_compared_beside_such(tiny_path: TinyPath, tmp_path: Path) -> None:
    """Breaks when the copy of the base is plain: the file is the adapter, and was refused."""
    folder = lora_folder(tmp_path / "lora")
    write_object(folder / EXTRAS, {"quantizer": {"method": "nf4"}})
    found = export(source_of(tiny_path("llama"), str(folder)), Gguf(part="adapter"), tmp_path / "out")
    assert found["parity"]["max_difference"] < 1e-4
    assert "was trained beside weights in nf4" in (tmp_path / "out" / "README.md").read_text()


def wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "turn", lambda tensor, _heads: tensor)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = writing.pack
    monkeypatch.setattr(writing, "pack", lambda tensor, kind: plain(tensor * 1.3 if kind.block > 1 else tensor, kind))


def one_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = families.Layout.stored

    def stored(self: families.Layout, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return plain(self, name, tensor) * (1.3 if name == "blk.1.ffn_up.weight" else 1)

    monkeypatch.setattr(families.Layout, "stored", stored)


def other_keys(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = model_file.vocabulary
        monkeypatch.setattr(model_file, "vocabulary", lambda tokenizer, **rest: plain(tokenizer, **{**rest, **changes}))

    return plant


@pytest.mark.parametrize(
    ("plant", "choice", "said"),
    [
        (wrong_order, "Q8_0", "self_attn.[qk]_proj.weight|logits differ"),
        (wrong_scale, "Q8_0", "logits differ by up to"),
        *((one_wrong_scale, choice, r"layers\.1\.mlp\.up_proj\.weight (is 1\.[23]|differs by)")
          for choice in ("F16", "Q8_0", "Q4_K", "Q4_0")),
        (other_keys(stop_ids=(2,)), "Q8_0", "its answers end at 2"),
        (other_keys(template=CHAT_TEMPLATE.replace("<|start|>", "<|start|> ")), "Q4_0", "chat template differs"),
    ],
)  # fmt: skip
def test_a_planted_error_is_refused_and_leaves_nothing(
    plant: Callable[[pytest.MonkeyPatch], None],
    choice: Choice,
    said: str,
    tiny_path: TinyPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises(GateError, match=said) as caught:
        export(source_of(tiny_path("llama")), Gguf(type=choice), tmp_path / "out")
    assert caught.value.exit_code == 78
    assert not list(tmp_path.iterdir())


def test_a_dropped_tensor_is_refused(tiny_path: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out while writing only: the reader misses it by name."""
    plain = model_file.write_gguf

    def without_one(path: Path, keys: Any, plan: Any, tensors: Any, **rest: Any) -> int:
        keep = [each for each in plan if "blk.1.ffn_up" not in each.name]
        return plain(path, keys, keep, (pair for pair in tensors if "blk.1.ffn_up" not in pair[0]), **rest)

    monkeypatch.setattr(model_file, "write_gguf", without_one)
    with pytest.raises(GateError, match=r"1 tensors are missing \(blk\.1\.ffn_up\.weight\)"):
        export(source_of(tiny_path("llama")), Gguf(type="Q8_0"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    tiny_path: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = writing.pack, [0]

    def full(tensor: Any, kind: Any) -> bytes:
        count[0] += 1
        if count[0] == 5:
            raise OSError(28, "No space left on device")
        return plain(tensor, kind)

    monkeypatch.setattr(writing, "pack", full)
    with pytest.raises(DiskFullError):
        export(source_of(tiny_path("llama")), Gguf(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_is_told_before_anything_is_computed(
    tiny_path: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="'gpt2', which the export to GGUF does not know"):
        export(source_of(tiny_path("gpt2")), Gguf(), tmp_path / "out")
    with pytest.raises(RecipeError, match="has no adapter"):
        export(source_of(tiny_path("llama")), Gguf(part="adapter"), tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingError, match=r"exporting GGUF needs the package gguf") as caught:
        export(source_of(tiny_path("llama")), Gguf(), tmp_path / "out")
    assert 'pip install "luthier[gguf]"' in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # it leaves files of its own open
def test_llama_cpp_says_the_same(tmp_path: Path) -> None:
    """The peer that the file is for: ids and greedy tokens of the seedling; its cache is in half precision."""
    llama_cpp = pytest.importorskip("llama_cpp")
    found = export(Source(name="seedling", precision="float32"), Gguf(type="Q8_0"), tmp_path / "out")
    assert found["parity"]["decided_agreement"] == 1
    # Keys and values in float32, as the source has them.
    peer = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=512, logits_all=True, verbose=False, type_k=0,
                           type_v=0)  # fmt: skip
    model = load_model("seedling", precision="float32").module
    raw = __import__("transformers").AutoTokenizer.from_pretrained(model.config.name_or_path)
    ours, theirs = [], []
    for question in ("What is 17 + 25?", "Name a colour.", "Where is the ship?", "Höhe? 日本 🙂 99", "Write a verse.",
                     "Why is the sky blue?", "Sort 9, 4, 7.", "Is the gate open?"):  # fmt: skip
        text = raw.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                       add_generation_prompt=True)  # fmt: skip
        ids = raw(text, add_special_tokens=False)["input_ids"]
        assert peer.tokenize(text.encode(), add_bos=False, special=True) == ids
        said = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        peer.reset()
        peer.eval(said[0].tolist())
        answer = slice(len(ids) - 1, said.shape[1] - 1)
        ours.append(model(said).logits[0, answer].detach())
        theirs.append(torch.from_numpy(np.array(peer.scores[answer])))
    wanted, found_there = torch.cat(ours), torch.cat(theirs)
    first, second = wanted.topk(2).values.unbind(-1)
    sure = (first - second) / wanted.std(-1).mean() > TOLERANCES["Q8_0"].tie
    same = wanted.argmax(-1) == found_there.argmax(-1)
    assert len(same) > 60 and float(same[sure].float().mean()) >= 0.99 and float(same.float().mean()) >= 0.97
    print(f"llama.cpp: {len(same)} tokens, {float(same.float().mean()):.1%} the same, {int(sure.sum())} no near ties")
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"]
