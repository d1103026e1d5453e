"""`export`: what it writes is the model, what is not is refused by name, and nothing half-written is left."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from luthier.core.errors import DiskFullError, GateError, RecipeError, RefusedError
from luthier.data.conversation import Labelled
from luthier.exporters import Subject, Told
from luthier.exporters.merged import Merged
from luthier.exporters.peft import Peft
from luthier.recipes.exporting.export import Source, export
from luthier.recipes.opening.opened import open_named
from luthier.store.manifest import verify
from tests.cli.commands import luthier, recipe_text, write_rows
from tests.recipes.test_api import arguments
from tests.task_folders import bert_folder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def merged(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The finished run as a merged folder. Read only."""
    out = tmp_path_factory.mktemp("exported") / "merged"
    return export(Source(name=str(finished)), Merged(), out), out


def test_a_merged_folder_is_the_run_for_transformers_and_for_luthier(
    merged: tuple[dict[str, Any], Path], finished: Path
) -> None:
    """Breaks when the merge, the config, the template or the stop tokens are not those of the run."""
    found, out = merged
    tuned = open_named(str(finished), own_modules=False)
    tokenizer, whole = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    prompt = tuned.prompt("the colour of 3 is")
    asked = [{"role": "user", "content": "the colour of 3 is"}]
    said = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert list(said["input_ids"]) == prompt.tolist()
    ids = torch.from_numpy(prompt)[None].long()
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, tuned.model.module(input_ids=ids).logits, atol=1e-4)
    assert whole.generation_config.eos_token_id == 1
    opened = open_named(str(out))
    assert opened.stop_ids == tuned.stop_ids and (opened.prompt("x") == tuned.prompt("x")).all()
    assert found["parity"]["passed"] and found["parity"]["rows"] == found["parity"]["rows_equal"] == 16
    assert json.loads((out / "parity.json").read_text()) == found["parity"]
    verify(out)


def test_a_peft_folder_is_read_by_peft(finished: Path, llama: Path, tmp_path: Path) -> None:
    """Breaks when a tensor is not where PEFT looks for it, or its config says another scale."""
    export(Source(name=str(finished)), Peft(base="somebody/base"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/base" and config["r"] == 4
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(tmp_path / "out"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = open_named(str(finished), own_modules=False).model.module(input_ids=ids).logits
        assert torch.allclose(theirs(ids).logits, ours, atol=1e-4)
    assert "somebody/base" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_the_run_knows_and_is_the_same_each_time(
    merged: tuple[dict[str, Any], Path], finished: Path, tmp_path: Path
) -> None:
    _, out = merged
    card = (out / "README.md").read_text("utf-8")
    export(Source(name=str(finished)), Merged(), tmp_path / "again")
    assert card == (tmp_path / "again" / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["luthier"]}
    summary, manifest = json.loads((finished / "summary.json").read_text()), verify(finished / "adapter")
    for part in (
        "`rows.jsonl`: 40 rows", manifest.facts["data"]["digest"], manifest.facts["base_digest"], "method: lora",
        f"{manifest.facts['trained_tokens']} tokens carried loss", "luthier train recipe.yaml", "seed 0",
        f"| loss | {summary['loss']['eval_first']:.4f} | {summary['loss']['eval']:.4f} |", "## Limits", "mean KL",
        "License of the base: not known", "training rows that render to the same ids | 16 of 16",
    ):  # fmt: skip
        assert part in card, part
    # Neither the folder of the model nor that of the data, which the recipe names.
    assert "/tmp" not in card and str(finished.parents[1]) not in card and "train: rows.jsonl" in card


def test_a_base_is_exported_with_its_license(tmp_path: Path) -> None:
    found = export(Source(name="seedling"), Merged(precision="bfloat16", shard_gb=0.003), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "a copy of `seedling`" in card and "## Data" not in card
    assert sum(name.endswith(".safetensors") for name in found["files"]) == 3 and found["parity"]["rows_equal"] == 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


# --------------------------------------------------------------------------------------------------- planted faults


def _json(name: str, **values: Any) -> Damage:
    def damage(place: Path) -> None:
        held = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**held, **values}))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(place: Path) -> None:
        held = load_file(place / "model.safetensors")
        change(held)
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})

    return damage


def _template(place: Path) -> None:
    path = place / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|start|>", "<|start|> "))


def _token(place: Path) -> None:
    held = json.loads((place / "tokenizer.json").read_text())
    added = {**held["added_tokens"][0], "id": 128, "content": "colour", "special": False}
    held["added_tokens"].append(added)
    (place / "tokenizer.json").write_text(json.dumps(held))


DOWN = "model.layers.1.mlp.down_proj.weight"
FAULTS: dict[str, tuple[Damage, str]] = {
    "template": (_template, "its tokenizer or chat template differs: .*rows.jsonl:1:1 becomes"),
    "dropped tensor": (_tensors(lambda held: held.pop(DOWN)), f"1 tensors are missing.*{DOWN}"),
    "wrong scale": (_tensors(lambda held: held[DOWN].mul_(2)), f"{DOWN} is 2 times what it was"),
    "swapped head": (_tensors(lambda held: held.update({"lm_head.weight": held["lm_head.weight"].roll(1, 0)})),
                     "lm_head.weight differs by about 1"),
    "two layers swapped": (_tensors(lambda held: held.update({
        DOWN: held[DOWN.replace("1", "0")].clone(), DOWN.replace("1", "0"): held[DOWN].clone()})),
        f"{DOWN.replace('1', '0')} differs"),
    "rope theta": (_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 2500.0},
                         rope_theta=2500.0), "rope_parameters.rope_theta is 2500.0, and the source's 10000.0"),
    "eos": (_json("generation_config.json", eos_token_id=2), "its answers end at 1/2, and the source's at 1"),
    "added token": (_token, "rows.jsonl:1:1 becomes 30 tokens, not 33.*tokenizer.tokens is 129, and the source's 128"),
    "norm": (_json("config.json", rms_norm_eps=0.1), "rms_norm_eps is 0.1, and the source's 1e-06"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(
    fault: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when the gate lets another model pass, or does not say what is wrong with it, or leaves it there."""
    damage, sentence = FAULTS[fault]
    write = Merged.write

    def broken(self: Merged, subject: Subject, place: Path, told: Told) -> None:
        write(self, subject, place, told)
        damage(place)

    monkeypatch.setattr(Merged, "write", broken)
    with pytest.raises(GateError, match=sentence) as caught:
        export(Source(name=str(finished)), Merged(), tmp_path / "out")
    assert caught.value.exit_code == 78 and not list(tmp_path.iterdir())


def test_a_peft_folder_of_another_scale_is_caught(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Peft.write

    def broken(self: Peft, subject: Subject, place: Path, told: Told) -> None:
        write(self, subject, place, told)
        _json("adapter_config.json", lora_alpha=16)(place)

    monkeypatch.setattr(Peft, "write", broken)
    with pytest.raises(GateError, match="logits differ by up to"):
        export(Source(name=str(finished)), Peft(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_is_there_stays_there(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RefusedError, match="is there already and is not empty"):
        export(Source(name=str(finished)), Merged(), tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    assert export(Source(name=str(finished)), Peft(), tmp_path / "out")["parity"]["passed"]


def test_a_disk_that_fills_up_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_given: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("luthier.exporters.merged.save_texts", full)
    with pytest.raises(DiskFullError, match="No space left on device|no space"):
        export(Source(name=str(finished)), Merged(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_that_are_gone_are_told_and_sentences_taken(finished: Path, tmp_path: Path) -> None:
    """Breaks when a run whose data were removed cannot leave, or leaves with a template that nobody looked at."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["train"] = str(tmp_path / "gone.jsonl")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = export(Source(name=str(run)), Merged(), tmp_path / "out")
    assert "cannot be read" in found["notices"][0] and found["parity"]["rows_equal"] == found["parity"]["rows"] == 2
    assert "cannot be read" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_has_not_ended_is_refused(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "stopped"}))
    with pytest.raises(RecipeError, match="not proved yet.*stopped"):
        export(Source(name=str(run)), Merged(), tmp_path / "out")
    shutil.rmtree(run / "adapter")
    with pytest.raises(RecipeError, match="has no result yet"):
        export(Source(name=str(run)), Merged(), tmp_path / "out")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [("prefix_tuning", "learned keys and values"), ("bottleneck", "layers of"),
     pytest.param("prompt_tuning", "a learned prompt", marks=pytest.mark.slow)],
)
def test_what_no_weights_can_hold_is_refused_by_name(
    adapter: str, words: str, llama: Path, rows: Path, tmp_path: Path
) -> None:
    """Breaks when an adapter is left out in silence, or the form that it does have is not named."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(llama, rows, adapter=f"{{method: {adapter}}}").replace("steps: 8", "steps: 1"))
    run = tmp_path / "run"
    luthier("train", recipe, "--run", run, "--quiet").must(0)
    with pytest.raises(RecipeError, match=f"is {adapter}, and {words}") as caught:
        export(Source(name=str(run)), Merged(), tmp_path / "out")
    assert "--to peft" in caught.value.allowed
    found = export(Source(name=str(run)), Peft(), tmp_path / "out")
    assert found["parity"]["passed"] and found["parity"]["max_difference"] == 0


# --------------------------------------------------------------------------------------- whole models, packed weights


def test_a_run_of_the_whole_model_is_its_own_export(llama: Path, rows: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(llama, rows, adapter="{method: full}").replace("steps: 8", "steps: 1"))
    luthier("train", recipe, "--run", tmp_path / "run", "--quiet").must(0)
    found = export(Source(name=str(tmp_path / "run")), Merged(), tmp_path / "out")
    assert found["parity"]["max_difference"] == 0 and not found["notices"]
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("run/model", "out"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(RecipeError, match="has no adapter: all that was trained are the model's own weights"):
        export(Source(name=str(tmp_path / "run")), Peft(), tmp_path / "other")


def test_an_adapter_of_packed_weights_is_folded_into_what_they_stand_for(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    """Breaks when it is folded into the base's own weights, which it was not trained on, or packed again."""
    import luthier as library

    named = {**arguments(llama, rows), "quantizer": "nf4"}
    library.finetune(**named, run=tmp_path / "run", quiet=True)
    found = export(Source(name=str(tmp_path / "run")), Merged(), tmp_path / "out")
    assert found["parity"]["max_difference"] < 1e-4 and "were packed when the model was trained" in found["notices"][0]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "were packed when" in (tmp_path / "out" / "README.md").read_text()


def test_a_classifier_leaves_with_its_head_and_a_bare_encoder_with_none(tmp_path: Path) -> None:
    """Breaks when a head that was drawn anew is given away as if it had been trained."""
    bert = bert_folder(tmp_path / "bert")
    both = [{"text": f"a {name} one", "label": name} for name in ("red", "big")]
    rows = write_rows(tmp_path / "rows.jsonl", both * 6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(bert, rows).replace("steps: 8", "steps: 1") + "objective: classification\n")
    luthier("train", recipe, "--run", tmp_path / "run", "--quiet").must(0)
    found = export(Source(name=str(tmp_path / "run")), Merged(), tmp_path / "out")
    assert found["parity"]["passed"] and found["parity"]["rows_equal"] == found["parity"]["rows"] == 12
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert set(theirs.config.id2label.values()) == {"red", "big"}
    assert open_named(str(tmp_path / "out")).classify([Labelled("a red one", label="red")])[0].names
    with pytest.raises(RecipeError, match="has no head that was trained") as caught:
        export(Source(name=str(bert)), Merged(), tmp_path / "other")
    assert "exporter.outputs=states" in caught.value.do


def test_the_command(finished: Path, llama: Path, tmp_path: Path) -> None:
    """Breaks when a knob does not reach the exporter, a dry run writes, or an adapter folder is not taken."""
    out = tmp_path / "out"
    told = luthier("export", finished, "--to", "merged", "--out", out, "--dry-run", "--json").json
    assert told["bytes"] > 0 and not out.exists()
    told = luthier("export", llama, "--adapter", finished / "adapter", "--set", "exporter.precision=float16", "--out",
                   out, "--json")  # fmt: skip
    assert told.json["exporter"] == {"method": "merged", "precision": "float16", "shard_gb": 5.0}
    assert "reading it back ..." in told.err
    assert load_file(out / "model.safetensors")[DOWN].dtype == torch.float16
    luthier("export", finished, "--to", "marged", "--out", tmp_path / "x").must(2, "did you mean merged")
    luthier("export", finished, "--to", "peft", "--out", out).must(77, "is there already")
    said = luthier("export", finished, "--to", "peft", "--out", tmp_path / "p", "--quiet").must(0)
    assert said.err == "" and "greedy agreement 100.0 %" in said.out and "adapter_model.safetensors" in said.out
