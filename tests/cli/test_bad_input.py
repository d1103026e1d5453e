"""Bad input of each kind: a sentence with what came, what is allowed and what to do; an exit code; nothing created."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.commands import chat, colour_rows, luthier, recipe_text, tree, write_rows


@pytest.fixture
def refused(tmp_path: Path, recipe: Path) -> Callable[..., str]:
    """`refused(code, parts, sets, text)`: train with a spoilt recipe and see that no run comes of it."""

    def train(code: int, parts: tuple[str, ...], *sets: str, change: tuple[str, str] = ("", ""), add: str = "") -> str:
        text = recipe.read_text("utf-8")
        assert change[0] in text
        own = tmp_path / "own.yaml"
        own.write_text(text.replace(*change, 1) + add if change[0] else text + add, encoding="utf-8")
        before = tree(tmp_path)
        options = [part for item in sets for part in ("--set", item)]
        told = luthier("train", own, "--run", tmp_path / "run", *options).must(code, *parts)
        assert told.out == "" and told.err.count("error[") == 1 and "Traceback" not in told.err
        assert tree(tmp_path) == before, "something was created or changed"
        return told.err

    return train


# -------------------------------------------------------------------------------------------------------- the recipe


def test_a_misspelt_key_names_its_place_and_the_nearest_key(refused: Callable[..., str]) -> None:
    refused(2, ("own.yaml:11:1: unknown key modle; did you mean model?",), add="modle: x\n")
    wrong = ("evaluation: {", "evaluation: {everry: 3, ")
    refused(2, ("own.yaml:8:14: unknown key evaluation.everry; did you mean every?",), change=wrong)
    refused(2, ("own.yaml:4:25: unknown key adapter.rnak; did you mean rank?",), change=("rank: 4", "rnak: 4"))
    refused(2, ("--set: unknown key over_length; did you mean data.over_length?",), "over_length=drop")
    refused(2, ("--set: unknown key rank; did you mean adapter.rank?",), "rank=8")
    meant = "--set: unknown key label_smoothing; did you mean objective.label_smoothing?"
    refused(2, (meant,), "objective=dpo", "label_smoothing=0.1")
    # A method that there is not has no knobs to look through; both problems are told.
    refused(2, ("unknown key rank; did you mean run?", "'lorra' is no method of adapters"), "adapter=lorra", "rank=8")
    refused(2, ("--set: unknown key optimizer.learning_rat; did you mean learning_rate?",), "optimizer.learning_rat=1")


def test_an_unknown_method_or_a_wrong_type_is_told_with_its_place(refused: Callable[..., str]) -> None:
    refused(2, ("own.yaml:4:1", "'lorra' is no method of adapters; did you mean lora"), change=("lora,", "lorra,"))
    refused(2, ("own.yaml:4:25: adapter.rank: 'four'", "integer"), change=("rank: 4", "rank: four"))
    refused(2, ("--set: adapter.rank", "greater than"), "adapter.rank=0")
    for key, number in (("budget.epochs", ".inf"), ("optimizer.learning_rate", ".inf"), ("max_grad_norm", ".nan")):
        refused(2, (f"--set: {key}: {number[1:]} is not allowed", "finite number"), f"{key}={number}")
    # As many passes are laid out one by one: the plan of these would never be made.
    refused(2, ("--set: budget.epochs: 1e+300", "less than or equal to 100000"), "budget.epochs=1e300")
    luthier("init", "--dry-run", "--set", "adapter.method=loraa").must(2, "--set: adapter: 'loraa' is no method")
    refused(2, ("--set x; --set key=value",), "x")
    refused(2, ("batch has both tokens and rows", "one of the two"), "batch.tokens=64")
    refused(2, ("objective", "'quiet_star' is no method"), "objective=quiet_star")


def test_a_file_that_is_no_recipe(tmp_path: Path, refused: Callable[..., str]) -> None:
    luthier("train", tmp_path / "none.yaml").must(2, "there is no recipe", "luthier init")
    refused(2, ("own.yaml:12:2: not valid YAML", "expected ',' or ']'"), add="a: [1\nb: 2\n")
    for text, part in (("- 1\n", "a recipe that is a list"), ("# nothing\n", "the recipe is empty")):
        (own := tmp_path / "own.yaml").write_text(text, encoding="utf-8")
        luthier("train", own).must(2, f"{own}: {part}")
        luthier("plan", own).must(2, f"{own}: {part}")
        luthier("merge", own, "--out", tmp_path / "out").must(2, f"{own}: {part}")
    luthier("train", own, "--set", "seed=3").must(2, f"{own}: model is missing; {own}: data is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_other_tools_names_are_understood_and_said(tmp_path: Path, llama: Path, rows: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        f"model_name_or_path: {llama}\ndata: {rows}\nadapter: lora\nlora_r: 8\ncutoff_len: 200\n", encoding="utf-8"
    )
    told = luthier("train", own, "--set", "budget.steps=1", "--run", tmp_path / "run", "--json")
    notes = f"note: {own}:4: lora_r is read as adapter.rank", f"note: {own}:5: cutoff_len is read as data.max_tokens"
    told.must(0, *notes)
    written = (tmp_path / "run" / "recipe.yaml").read_text("utf-8")
    assert "rank: 8" in written and "max_tokens: 200" in written
    again = luthier("train", tmp_path / "run" / "recipe.yaml", "--run", tmp_path / "again", "--json").must(0).json
    assert again["loss"] == told.json["loss"]
    own.write_text(recipe_text(llama, rows) + "lora_r: 8\n", encoding="utf-8")
    luthier("train", own).must(2, "lora_r and adapter both mean adapter.rank; keep one of the two")


# ---------------------------------------------------------------------------------------------------------- the data


def test_a_missing_data_file_names_the_nearest_ones(refused: Callable[..., str], rows: Path) -> None:
    refused(65, ("there is no such file", "did you mean rows.jsonl?"), f"data.train={rows.parent / 'row.jsonl'}")
    luthier("data", "show", rows.parent / "roes.jsonl").must(65, "did you mean rows.jsonl?")


def test_malformed_json_is_found_at_its_line_and_column(
    tmp_path: Path, refused: Callable[..., str], llama: Path
) -> None:
    own = colour_rows(tmp_path / "rows.jsonl", 1200)
    lines = own.read_text("utf-8").splitlines()
    lines[1041] = '{"messages": [{"role": "user", "content": "x"},, ]}'
    own.write_text("\n".join(lines) + "\n", encoding="utf-8")
    where = f"{own}:1042:48: broken JSON"
    refused(65, ("1 of 1,200 rows cannot be used (1,199 can)", where, "on_bad_row=skip"), f"data.train={own}")
    told = luthier("data", "check", own, "--model", llama).must(65, "1 problem in 1,200 rows (1,199 kept, 1 rejected)")
    assert where in told.out
    more = ("--set", f"data.train={own}", "--set", "data.on_bad_row=skip", "--set", "budget.steps=1")
    run = tmp_path / "run"
    luthier("train", tmp_path / "own.yaml", *more, "--run", run, "--json").must(0)
    rejected = [json.loads(line) for line in (run / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert len(rejected) == 1 and "1042" in json.dumps(rejected[0])


def test_rows_that_teach_nothing_or_speak_in_an_unknown_role(tmp_path: Path, refused: Callable[..., str]) -> None:
    own = write_rows(tmp_path / "rows.jsonl", [chat("x", "y"), chat("x", "y", role="asistant")])
    refused(65, (f"{own}:2:50: messages[1].role is \"asistant\"", "did you mean assistant?"), f"data.train={own}")
    write_rows(own, [chat("x", "y"), chat("x", "")])
    refused(65, (f"{own}:2:71: the answer is empty",), f"data.train={own}")
    own.write_text("", encoding="utf-8")
    refused(65, (str(own),), f"data.train={own}")


def test_rows_that_are_too_long(refused: Callable[..., str], rows: Path) -> None:
    refused(65, (f"{rows}:1", "16"), "data.max_tokens=16")
    refused(65, ("none of the 40 rows is left to train on",), "data.max_tokens=16", "data.over_length=drop")
    refused(2, ("data.max_tokens", "4096", "at most the model's 256"), "data.max_tokens=4096")
    refused(2, ("data.max_tokens", "16"), "data.max_tokens=8")


# --------------------------------------------------------------------------------------------------------- the model


def test_model_files_that_could_run_code_are_refused(copied: Path, refused: Callable[..., str]) -> None:
    weights = (copied / "model.safetensors").rename(copied / "kept")
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04")
    parts = ("error[unsafe-artifact]", "pytorch_model.bin", "a pickle that could run code", "safetensors")
    refused(77, parts, f"model={copied}")
    luthier("generate", copied, "--prompt", "x").must(77, *parts)
    weights.rename(copied / "model.safetensors")
    config = json.loads((copied / "config.json").read_text("utf-8"))
    (copied / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}), encoding="utf-8")
    refused(77, ("error[unsafe-artifact]", "auto_map", "luthier runs no remote code"), f"model={copied}")


def test_a_model_that_is_not_there(tmp_path: Path, refused: Callable[..., str], llama: Path, rows: Path) -> None:
    # Other tests may have put more models beside this one; the nearest name comes first whatever else is there.
    refused(69, ("there is no model folder", "did you mean tiny-llama"), f"model={llama.parent / 'tiny-lama'}")
    refused(69, ("no tokenizer could be loaded from 'nobody/nothing'", "hub id"), "model=nobody/nothing")
    refused(69, ("is a file", "a model folder"), f"model={rows}")
    refused(69, ("device is 'cuda:99', which is not here", "cpu"), "device=cuda:99")
    refused(2, ("device is 'tpu'", "cpu"), "device=tpu")


def test_a_target_that_no_layer_has_names_the_nearest_ones(refused: Callable[..., str]) -> None:
    refused(2, ("no site matches the target 'q_prj'; did you mean q_proj", "all-linear"), "adapter.targets=[q_prj]")


# ------------------------------------------------------------------------------------------------- the run directory


def test_a_run_directory_is_never_overwritten_by_accident(tmp_path: Path, recipe: Path, finished: Path) -> None:
    before = tree(finished)
    luthier("train", recipe, "--run", finished).must(77, "holds a run (finished); nothing was changed", "--overwrite")
    assert tree(finished) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    for more in ((), ("--overwrite",)):
        told = luthier("train", recipe, "--run", tmp_path / "mine", *more)
        told.must(77, "is not empty and holds no run; nothing was changed")
    assert tree(tmp_path) == {"mine": b"", "mine/thesis.txt": b"x"}
    luthier("train", recipe, "--run", tmp_path / "mine" / "thesis.txt").must(77, "is no folder")


def test_overwrite_moves_the_old_run_aside_but_not_for_input_that_cannot_be_used(
    tmp_path: Path, recipe: Path, finished: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    before = tree(run)
    luthier("train", recipe, "--run", run, "--overwrite", "--set", "data.train=none.jsonl").must(65)
    assert tree(run) == before and [path.name for path in tmp_path.iterdir()] == ["run"]
    luthier("train", recipe, "--run", run, "--overwrite", "--set", "budget.steps=1", "--json").must(0)
    assert {name: data for name, data in tree(tmp_path / "run.old-1").items() if name != "run.lock"} == {
        name: data for name, data in before.items() if name != "run.lock"
    }


def test_names_that_are_no_run(tmp_path: Path, finished: Path) -> None:
    for command in (("run", "show"), ("eval",), ("resume",)):
        luthier(*command, tmp_path).must(2, "is no run", "luthier run list")
        luthier(*command, finished.parent / "finish").must(2, "is no run", f"did you mean {finished}?")
    luthier("generate", finished.parent / "finish", "--prompt", "x").must(2, f"did you mean {finished}?")
    luthier("run", "list", tmp_path / "none").must(2, f"there is no folder {tmp_path / 'none'}")
    luthier("generate", tmp_path, "--prompt", "x").must(2, "has no config.json")
    luthier("generate", "sedling", "--prompt", "x").must(2, "did you mean seedling?")
    luthier("merge", "seedling", "sedling", "--out", tmp_path / "out").must(2, "did you mean seedling?")


def test_init_overwrites_nothing_and_says_what_it_cannot_write(tmp_path: Path) -> None:
    luthier("init", tmp_path / "none" / "recipe.yaml").must(74, "error[storage]", "No such file or directory")
    (tmp_path / "recipe.yaml").write_text("mine", encoding="utf-8")
    luthier("init", tmp_path / "recipe.yaml").must(77, "exists and is not overwritten")
    luthier("init", "--dry-run", "--set", "adapter.rnk=3").must(2, "unknown key adapter.rnk; did you mean rank?")
    assert tree(tmp_path) == {"recipe.yaml": b"mine"}


# ---------------------------------------------------------------------------------------------------------- generate


def test_generate_refuses_what_it_cannot_do(tmp_path: Path, llama: Path, finished: Path) -> None:
    luthier("generate", llama).must(2, "no prompt was given", "--prompt")
    prompt = ("generate", llama, "--prompt", "x")
    luthier(*prompt, "--temperature", -1).must(2, "temperature is -1.0; 0 (greedy) or more")
    luthier(*prompt, "--top-p", 2).must(2, "top_p is 2.0", "at most 1")
    luthier(*prompt, "--max-new-tokens", 0).must(2, "max_new_tokens is 0; at least 1")
    luthier(*prompt, "--precision", "int3").must(2, "precision is 'int3'; auto, float32 or bfloat16")
    luthier(*prompt, "--adapter", tmp_path).must(2, "holds no adapter_config.json")
    luthier("generate", llama, "--prompt", "x " * 200).must(65, "tokens; fewer than 256")
    luthier("generate", llama, "--raw", "--prompt", "").must(65, "has no token")
    run = ("generate", finished, "--prompt", "x")
    luthier(*run, "--adapter", finished / "adapter").must(2, "is a run and has its own result")


def test_an_adapter_for_other_weights_is_refused(copied: Path, finished: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, copied / "model.safetensors", metadata={"format": "pt"})
    told = luthier("generate", copied, "--prompt", "x", "--adapter", finished / "adapter")
    told.must(77, "error[drift]", "was trained on base weights", "load the base model it was trained on")


def test_adapters_from_elsewhere_are_read_in_bfloat16_and_strictly(tmp_path: Path, llama: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))
    (folder / "luthier.json").unlink()
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    command = ("generate", llama, "--prompt", "the colour of 3 is", "--adapter", folder, "--json")
    ours = luthier(*command[:-2], finished / "adapter", "--json").must(0).json["answers"][0]
    theirs = luthier(*command).must(0).json["answers"][0]
    assert theirs["log_probs"][0] == pytest.approx(ours["log_probs"][0], abs=0.05)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file, metadata={"format": "pt"})
    luthier(*command).must(74, "1 expected tensors are missing")
    file.rename(folder / "adapter_model.bin")
    luthier(*command).must(77, "error[unsafe-artifact]", "pickle")


def test_flags_of_the_data_commands_are_checked(rows: Path, llama: Path) -> None:
    show = ("data", "show", rows, "--model", llama)
    luthier(*show, "--train-on", "x").must(2, "--train-on is 'x'; answers | last | all")
    luthier(*show, "--over-length", "x").must(2, "raise | drop | truncate")
    luthier(*show, "--column", "x").must(2, "is no pair", "ROLE=COLUMN")
    luthier(*show, "--rows", 0).must(2, "--rows")
    luthier(*show, "--max-tokens", -3).must(2, "max_tokens is -3")
    luthier(*show, "--format", "alpca").must(2, "'alpca' is no data format; did you mean alpaca?")
    luthier(*show, "--template", "zz").must(2, "no chat template is called 'zz'")
    luthier("describe", "lorra").must(2, "no method is called 'lorra'; did you mean lora")
    made = "qlora is a preset of adapters/lora, quantizers/nf4, optimizers/paged_adamw; luthier describe adapters/lora"
    luthier("describe", "qlora").must(2, made)
    luthier("describe", "in_context").must(2, "in_context is a preset that trains nothing", "luthier compare --help")


@pytest.mark.parametrize(("command", "sentence"), [
    ("export {llama} --to ggfu --out x", "'ggfu' is no method of exporters; did you mean gguf? known: gguf, merged, "),
    ("export {llama} --set exporter.precison=x --out x", "unknown key exporter.precison; did you mean precision?\n"),
    ("quantize {llama} --quantizer nf5 --out x", "'nf5' is no method of quantizers; did you mean nf4? known: int4_"),
    ("merge {llama} {llama} --method slrep --out x", "did you mean slerp? known: breadcrumbs, dare"),
    ("merge {llama} {llama} --data {rows} --metric blue --out x", "did you mean bleu? known: bleu, exact_match, lik"),
    ("merge none.yaml --out x", "there is no recipe none.yaml; check the path, or name models"),
    ("probe {run} --probe drfit", "there is no probe 'drfit'; did you mean drift? known: alpha_rank, attention, "),
    ("plan --model-config {llama} --method lorra", "did you mean lora or qlora or dora? known: bitfit, bottleneck"),
    ("plan --model-config {llama} --sharding zero4", "or 'fsdp'; luthier plan --help shows the options"),
    ("train {rows}", "rows.jsonl is a data file; a recipe, in YAML; write one with: luthier init recipe.yaml --data"),
    ("generate {run}/adapter --prompt x", "it is an adapter: name its run, or its base and --adapter"),
    ("quantize {run} --out x", "it is a run: name its base, or make a model of it: luthier export"),
    ("data stats {rows} --model {run}", "it is a run: name its base"),
    ("generate {llama} --prompt x --schema {rows}", "write one JSON schema into it"),
    ("probe", "is not clear: nothing is named; a run, or both of before and after; luthier probe RUN"),
    ("generate {llama} --prompt x --precision int3", "or bfloat16; luthier generate --help shows its options\n"),
])  # fmt: skip
def test_a_misspelt_choice_is_told_with_the_nearest_one_and_all_there_are(
    command: str, sentence: str, llama: Path, rows: Path, finished: Path
) -> None:
    """Breaks when a flag with a wrong name is answered by advice about the keys of recipes."""
    told = luthier(*command.format(llama=llama, rows=rows, run=finished).split())
    told.must(told.code or 1, sentence)
    assert told.err.count("error[") == 1 and "Errno" not in told.err and not Path("x").exists()
    assert "luthier init --dry-run" not in told.err
