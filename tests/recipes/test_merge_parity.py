"""The gate and the card of a merge: what is told of it, and what is not kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.core.knobs import validate
from luthier.model.files.shards import ShardWriter
from luthier.recipes.exporting.card_parts import CARD, PARITY
from luthier.recipes.merging import merge as recipe
from luthier.recipes.merging.recipe import MergeRecipe
from luthier.recipes.opening.opened import open_named
from luthier.store.manifest import verify
from tests.cli.commands import luthier
from tests.task_folders import bert_folder


@pytest.fixture(scope="module")
def merged(finished: Path, llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run and its base, merged and judged by the command. Read only."""
    out = tmp_path_factory.mktemp("merged") / "between"
    found = luthier("merge", finished, llama, "--t", "0.25", "--out", out, "--data", rows, "--allow-worse", "--json")
    return found.must(0).json, out


def test_what_was_measured_lies_beside_the_model(merged: tuple[Any, Path]) -> None:
    """Breaks when the numbers are of other rows than the run's, or are told and not kept."""
    found, out = merged
    parity = json.loads((out / PARITY).read_text())
    assert parity == found["parity"] and parity["passed"] and parity["findings"] == []
    # The run held out 8 rows, and 16 of those it was trained on are rendered again.
    assert parity["prompts"] == 8 and parity["rows"] == parity["rows_equal"] == 16
    assert 0 < parity["max_difference"] < 0.1 and parity["tolerance"]["form"] == "weights in bfloat16"
    assert {PARITY, CARD} <= set(verify(out).files)


def test_the_card_says_which_models_and_what_came_of_it(merged: tuple[Any, Path], llama: Path, finished: Path) -> None:
    """Breaks when a figure is left out, or a folder of this machine is told."""
    found, out = merged
    card = (out / CARD).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["luthier", "merge"]}
    tuned = verify(finished / "adapter")
    for part in (
        "# between", "by `slerp`", f"`{finished.name}` | 1.0 | weights `{tuned.facts['base_digest']}`, adapter `",
        f"`{llama.name}` | 1.0 | weights `{tuned.facts['base_digest']}` |", "`luthier merge recipe.yaml --out between`",
        "t: 0.25", f"| {finished.name} | {found['evaluation']['parents'][str(finished)]:.4f} |",
        f"| this model | {found['evaluation']['merged']:.4f} |", "| on `rows.jsonl` | likelihood |", "## Limits",
        "| greedy agreement |", "training rows that render to the same ids | 16 of 16",
    ):  # fmt: skip
        assert part in card, part
    assert "/tmp" not in card and str(finished.parent) not in card


def test_another_model_is_not_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when the gate tells and lets pass: a tensor too large to be computed anew is written in another order."""
    write = ShardWriter.write

    def wrong(self: ShardWriter, name: str, tensor: np.ndarray, first: int = 0) -> None:
        write(self, name, tensor[::-1] if name == "lm_head.weight" else tensor, first)

    monkeypatch.setattr(ShardWriter, "write", wrong)
    monkeypatch.setattr(recipe, "prove", lambda *_given: 0)
    said = luthier("merge", llama, llama, "--out", tmp_path / "out").must(78, "is not the model it was made from")
    assert "lm_head.weight differs" in said.err and "nothing was kept" in said.err and not list(tmp_path.iterdir())
    found = luthier("merge", llama, llama, "--set", "parity=none", "--out", tmp_path / "out", "--json").must(0).json
    assert found["parity"] == {"passed": None, "not_compared": "nobody asked for it (parity is none)"}
    assert json.loads((tmp_path / "out" / PARITY).read_text()) == found["parity"]
    assert "Logits were not compared: nobody asked for it" in (tmp_path / "out" / CARD).read_text()


def test_a_run_brings_what_it_was_trained_with(finished: Path, llama: Path, tmp_path: Path) -> None:
    """Breaks when a merged run speaks with the template and the stop tokens of its base."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    (run / "adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    models = {"models": [{"model": str(base), "adapter": str(run / "adapter")}]}
    found = recipe.merge_models(validate(MergeRecipe, {**models, "method": "passthrough"}), tmp_path / "out")
    tokenizer, tuned = AutoTokenizer.from_pretrained(tmp_path / "out"), open_named(str(finished))
    assert tokenizer.chat_template == tuned.tokenizer.chat_template
    assert open_named(str(tmp_path / "out")).stop_ids == tuned.stop_ids == (1,)
    assert found["parity"]["rows_equal"] == found["parity"]["rows"] > 0


def test_what_has_no_logits_is_told_and_merged(tmp_path: Path, llama: Path) -> None:
    """Breaks when an encoder or a model without a tokenizer cannot be merged any more, or nobody hears of it."""
    bert = bert_folder(tmp_path / "bert")
    said = luthier("merge", bert, bert, "--out", tmp_path / "out").must(0).out
    assert "parity     logits were not compared: " in said
    parity = json.loads((tmp_path / "out" / PARITY).read_text())
    assert parity["passed"] is None and "left to right" in parity["not_compared"]
    bare = Path(shutil.copytree(llama, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    found = luthier("merge", bare, bare, "--out", tmp_path / "mute", "--json").must(0).json
    assert found["parity"]["passed"] and found["parity"]["tokens"] == 96 and found["parity"]["rows"] == 0


def test_larger_vocabularies_and_stacks_pass_too(llama: Path, tmp_path: Path) -> None:
    """Breaks when a row is compared under its old number, or a stack with the layers of one parent."""
    more = Path(shutil.copytree(llama, tmp_path / "more"))
    tokenizer = AutoTokenizer.from_pretrained(more)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    model = AutoModelForCausalLM.from_pretrained(more)
    model.resize_token_embeddings(129, mean_resizing=False)
    model.save_pretrained(more)
    tokenizer.save_pretrained(more)
    found = luthier("merge", llama, more, "--out", tmp_path / "out", "--json").must(0).json
    assert found["parity"]["passed"] and found["parity"]["rows_equal"] == 2
    path = tmp_path / "stack.yaml"
    slices = [{"sources": [{"model": str(llama), "layer_range": span}]} for span in ([0, 2], [1, 2])]
    path.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    assert luthier("merge", path, "--out", tmp_path / "stack", "--json").must(0).json["parity"]["passed"]


