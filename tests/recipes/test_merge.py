"""`merge`: what it writes is a model for everybody, what it refuses leaves nothing; recipes of mergekit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.core.errors import DiskFullError, GateError
from luthier.core.knobs import validate
from luthier.merge import proof
from luthier.model.editing.edits import base_parameters
from luthier.model.files.shards import INDEX, SINGLE
from luthier.recipes.merging.merge import merge_models
from luthier.recipes.merging.recipe import MergeRecipe, read_recipe
from luthier.recipes.opening.opened import open_named
from luthier.store import large_file
from luthier.store.manifest import verify
from tests.cli.commands import luthier


@pytest.fixture(scope="module")
def other(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tune of the tiny model, in several files of bfloat16."""
    place = tmp_path_factory.mktemp("tunes") / "other"
    shutil.copytree(llama, place)
    generator = torch.Generator().manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    (place / SINGLE).unlink()
    model.to(torch.bfloat16).save_pretrained(place, max_shard_size="20KB")
    assert (place / INDEX).is_file()
    return place


def recipe(*models: object, method: Any = "slerp", **more: Any) -> MergeRecipe:
    """Without the gate of logits, which has tests of its own: these are told apart by their numbers."""
    method = {"method": method} if isinstance(method, str) else method
    named = {"models": [str(model) for model in models], "method": method}
    return validate(MergeRecipe, {**named, "parity": "none", **more})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_merged_folder_is_a_model_for_transformers_and_for_us(llama: Path, other: Path, tmp_path: Path) -> None:
    """Breaks when a file is missing, the index is wrong, or the numbers are not those of the method."""
    found = merge_models(recipe(llama, other, method={"method": "linear"}, shard_gb=3e-5), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and (tmp_path / "out" / INDEX).is_file()
    one, two, merged = (weights(place) for place in (llama, other, tmp_path / "out"))
    assert all(torch.equal(merged[name], ((one[name] + two[name]) / 2).bfloat16().float()) for name in one)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    held = model.state_dict()
    assert all(torch.equal(held[name].float(), tensor) for name, tensor in merged.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    opened = open_named(str(tmp_path / "out"), precision="float32", own_modules=False)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        theirs = model.float()(ids).logits
        torch.testing.assert_close(opened.model.module(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-4)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    assert found["proved_tensors"] >= 5 and {line["role"] for line in found["roles"]} >= {"q", "down", "embed", "norm"}
    manifest = verify(tmp_path / "out")
    assert manifest.facts["method"]["method"] == "linear" and "merge.json" in manifest.files


def test_a_run_is_its_tuned_model(llama: Path, finished: Path, tmp_path: Path) -> None:
    """Breaks when an adapter is left out of the merge, has another scale, or is rounded before it is merged."""
    merge_models(recipe(finished, method="passthrough", dtype="float32"), tmp_path / "out")
    opened = open_named(str(finished), precision="float32")
    opened.model.merge()
    wanted = base_parameters(opened.model.module)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name].float(), rtol=1e-5, atol=1e-6, msg=name)
    base = weights(llama)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in weights(tmp_path / "out").items())


def test_the_command_says_what_it_would_do_and_what_it_did(llama: Path, other: Path, tmp_path: Path) -> None:
    """Breaks when a dry run writes, or an angle is not told."""
    told = luthier("merge", llama, other, "--t", "0.3", "--dry-run", "--json").must(0).json
    assert told["tensors"] and told["writes_bytes"] and told["method"] == {"method": "slerp", "t": 0.3, "of": "weights"}
    said = luthier("merge", llama, other, "--t", "0.3", "--dry-run").must(0).out
    assert "write" in said and str(other) in said
    found = luthier("merge", llama, other, "--set", "method.t=[0, 1]", "--out", tmp_path / "out", "--json").must(0).json
    by_name = {each["name"]: each for each in found["by_tensor"]}
    assert by_name["model.layers.0.self_attn.q_proj.weight"]["t"] == 0
    assert by_name["model.layers.1.self_attn.q_proj.weight"]["t"] == 1
    assert by_name["model.layers.1.self_attn.q_proj.weight"]["angle_degrees"] > 5
    said = luthier("merge", llama, llama, "--out", tmp_path / "same").must(0).out
    assert "more are a straight line" in said and "method.of=changes" in said
    luthier("merge", llama, other, "--out", tmp_path / "out").must(77, "is there already")
    luthier("merge", llama, other).must(2, "a new folder: --out DIR")
    luthier("merge", llama, other, "--method", "slurp", "--out", tmp_path / "no").must(2, "slerp")
    luthier("merge", llama, other, "--weight", "1", "--out", tmp_path / "no").must(2, "1 weights for 2 models")
    luthier("merge", llama, other, "--set", "method.density=0.5", "--out", tmp_path / "no").must(2, "density")
    luthier("merge", llama, other, "--metric", "bleu", "--out", tmp_path / "no").must(2, "--data FILE")


def test_wrong_input_is_told_what_to_do_next(llama: Path, tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Breaks when an error of a merge sends its reader to the keys of a training, or layers that are not there pass."""
    stack, training = tmp_path / "stack.yaml", tmp_path / "training.yaml"
    slices = [{"sources": [{"model": str(llama), "layer_range": [0, 3]}]}]
    stack.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    training.write_text(f"model: {llama}\ndata: rows.jsonl\n")
    to = ("--out", tmp_path / "out")
    options = "luthier merge --help shows the options"
    for arguments, code, parts in (
        ((llama, tiny_path("qwen2")), 2, ("model_type", "same architecture")),
        ((llama,), 2, ("slerp was given 1 model; exactly 2", "another --method")),
        ((llama, llama, "--t", "2"), 2, ("method.t: 2.0", options)),
        ((llama, llama, "--set", "dtype=int8"), 2, ("'int8' is not allowed", options)),
        ((llama, llama, "--set", "method.t=[0, half]"), 2, ("t is [0, 'half']", options)),
        ((llama, llama, "--weight", "1"), 2, ("1 weights for 2 models", options)),
        ((llama, llama / "config.json"), 69, ("is a file", f"name the folder it lies in: {llama}")),
        ((stack,), 2, ("takes the layers 0 to 2", "the layers 0 to 1, which it has")),
        ((training,), 2, ("names data and no models", f"luthier train {training}")),
        ((tmp_path / "none.yaml",), 2, ("there is no recipe", "check the path")),
    ):  # fmt: skip
        said = luthier("merge", *arguments, *to).must(code, *parts).err
        assert "luthier init" not in said and "luthier doctor" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.yaml", "training.yaml"]


def test_worse_than_the_best_parent_is_not_kept(llama: Path, other: Path, rows: Path, tmp_path: Path) -> None:
    """Breaks when a result that is worse gets a name, one that is better gets none, or no expectation is told."""
    arguments = ("merge", llama, other, "--data", rows, "--json", "--set", "dtype=float32")
    found = luthier(*arguments, "--out", tmp_path / "kept", "--allow-worse").must(0).json["evaluation"]
    scores = found["parents"]
    assert found["measure"] == "likelihood" and set(scores) == {str(llama), str(other)}
    assert found["expected"] == pytest.approx(sum(scores.values()) / 2)
    assert found["diversity"] == pytest.approx(max(scores.values()) - min(scores.values()))
    assert found["improvement"] == pytest.approx(found["merged"] - max(scores.values()))
    code, end = (78, False) if found["improvement"] < 0 else (0, True)
    luthier(*arguments, "--out", tmp_path / "judged").must(code)
    assert (tmp_path / "judged").exists() == end
    # Far outside of what lies between them nothing is better.
    wild = ("--method", "linear", "--weight", "30", "--weight", "-29")
    luthier(*arguments, *wild, "--out", tmp_path / "wild").must(78, "nothing was kept", "has likelihood")
    assert not (tmp_path / "wild").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_metric_judges_answers(llama: Path, other: Path, rows: Path, tmp_path: Path) -> None:
    """Breaks when a metric asks nothing, or compares other questions for each model."""
    found = luthier("merge", llama, other, "--out", tmp_path / "out", "--data", f"{rows}#3", "--metric", "exact_match",
                    "--json").must(0).json["evaluation"]  # fmt: skip
    assert found["measure"] == "exact_match" and found["merged"] == 0 == found["diversity"]


def test_what_was_written_is_what_was_computed(
    llama: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a block that went to the wrong place is believed."""
    from luthier.model.files.shards import ShardWriter

    write = ShardWriter.write

    def wrong(self: ShardWriter, name: str, tensor: np.ndarray, first: int = 0) -> None:
        other = name.endswith("layers.0.mlp.gate_proj.weight")
        write(self, name, np.roll(tensor, 1, 0) if other else tensor, first)

    monkeypatch.setattr(ShardWriter, "write", wrong)
    with pytest.raises(GateError, match="gate_proj.weight.* was written with .* numbers that differ"):
        merge_models(recipe(llama, other), tmp_path / "out")
    assert not list(tmp_path.iterdir()) and proof.MOST >= 10


def _cut(folder: Path) -> None:
    os.truncate(next(folder.glob("model-*.safetensors")), 500)


def _lose(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def _lead_out(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _spoil(folder: Path) -> None:
    for path in folder.glob("model-*.safetensors"):
        held = load_file(path)
        if "lm_head.weight" in held:
            held["lm_head.weight"][2, 2] = float("nan")
            save_file(held, path, metadata={"format": "pt"})


def _other_heads(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "num_attention_heads": 8, "rms_norm_eps": 1e-3}))


def _pack(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (_cut, 74, "no sound safetensors file"),
        (_lose, 69, "which is not there"),
        (_lead_out, 77, "names the file"),
        (_spoil, 76, "lm_head.weight' of"),
        (_pack, 2, "holds packed weights"),
        (_other_heads, 2, "num_attention_heads is 4 in"),
        (lambda folder: (folder / "config.json").unlink(), 2, "has no config.json"),
    ],
    ids=["cut", "shard missing", "index leads out", "NaN", "packed", "heads", "no config"],
)  # fmt: skip
def test_a_bad_parent_is_a_sentence_and_nothing_is_left(
    llama: Path, other: Path, tmp_path: Path, spoil: Callable[[Path], object], code: int, said: str
) -> None:
    """Breaks when half a folder stays, or an error is a traceback."""
    bad = Path(shutil.copytree(other, tmp_path / "bad"))
    spoil(bad)
    error = luthier("merge", llama, bad, "--out", tmp_path / "out").must(code, "error[").err
    assert said in error.replace('"', "'") and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_disk_that_is_full_in_the_middle_leaves_nothing(
    llama: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when an error of the writing thread is lost, or the folder gets its name."""
    pwrite, count = os.pwrite, [0]

    def full(number: int, data: Any, at: int) -> int:
        count[0] += 1
        if count[0] > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(number, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(large_file, "PIECE", large_file.BLOCK)
    with pytest.raises(DiskFullError, match="No space left"):
        merge_models(recipe(llama, other), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tokens_that_one_parent_has_more_are_in_the_result(llama: Path, other: Path, tmp_path: Path) -> None:
    """Breaks when a larger vocabulary is cut, its config is not, or the tokenizer does not know the new token."""
    more = Path(shutil.copytree(other, tmp_path / "more"))
    tokenizer = AutoTokenizer.from_pretrained(more)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    model = AutoModelForCausalLM.from_pretrained(more)
    model.resize_token_embeddings(129, mean_resizing=False)
    for path in more.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(more)
    tokenizer.save_pretrained(more)
    found = merge_models(recipe(llama, more), tmp_path / "out")
    assert "1 tokens of" in found["notices"][0] and "<|tool|>" in found["notices"][0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 129 == merged.get_input_embeddings().weight.shape[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|tool|>") == 128
    own, row = (model.get_output_embeddings().weight[128] for model in (model, merged))
    torch.testing.assert_close(row.float(), own.float(), rtol=1e-2, atol=1e-3)


MERGEKIT = """
merge_method: slerp
base_model: {first}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 1]
    - value: 0.4
slices:
  - sources:
      - model: {second}
        layer_range: [0, 2]
      - model: {first}
        layer_range: [0, 2]
"""


def test_a_recipe_of_mergekit_is_read(llama: Path, other: Path, tmp_path: Path) -> None:
    """Breaks when base_model is not the end at t = 0, or gradients and filters are read otherwise."""
    path = tmp_path / "mergekit.yaml"
    path.write_text(MERGEKIT.format(first=llama, second=other))
    read, notes = read_recipe(path)
    assert [parent.model for parent in read.models] == [str(llama), str(other)]
    assert not notes and read.dtype == "bfloat16"
    found = merge_models(read, tmp_path / "out")
    by_name = {each["name"]: each["t"] for each in found["by_tensor"]}
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == 0 and by_name["lm_head.weight"] == 0.4
    assert by_name["model.layers.1.self_attn.q_proj.weight"] == 1
    assert by_name["model.layers.1.mlp.up_proj.weight"] == 0.4
    one, two, merged = (weights(place) for place in (llama, other, tmp_path / "out"))
    for layer, end in ((0, one), (1, two)):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert torch.equal(merged[name], end[name].bfloat16().float())


def test_a_stack_of_layers_is_a_deeper_model(llama: Path, other: Path, tmp_path: Path) -> None:
    """Breaks when the config says another count of layers than the files hold."""
    path = tmp_path / "stack.yaml"
    path.write_text(
        "merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {llama}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {other}, layer_range: [1, 2]}}]\n"
    )
    luthier("merge", path, "--out", tmp_path / "out").must(0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == 3 == model.config.num_hidden_layers
    wanted = weights(other)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight.float(), wanted)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("more", [{"lora_alpha": 5}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_an_adapter_of_peft_on_top_of_a_model_is_what_peft_merges(
    llama: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """Breaks when a scale or a pattern is read otherwise than PEFT does."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **more})
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    models = {"models": [{"model": str(llama), "adapter": str(tmp_path / "adapter")}]}
    merge_models(validate(MergeRecipe, {**models, "method": "passthrough", "dtype": "float32"}), tmp_path / "out")
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
