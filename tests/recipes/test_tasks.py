"""Whole runs of encoders and encoder-decoders: from a file to a proved result that classifies, fills in or answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.show import print_summary
from luthier.recipes.opening.opened import open_named
from tests.cli.commands import luthier
from tests.task_folders import bert_folder, roberta_folder, t5_folder

CLASSES = {"fruit", "tool"}
FRUITS = ("apple", "pear", "plum", "fig")
TOOLS = ("hammer", "saw", "drill", "axe")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_folder(tmp_path_factory.mktemp("t5"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(path: Path) -> Path:
    pairs = [(name, kind) for kind, names in (("fruit", FRUITS), ("tool", TOOLS)) for name in names]
    return write(path, [{"text": f"the {name} is {n}", "label": kind} for n in range(6) for name, kind in pairs])


def train(model: Path, data: Path, run: Path, *sets: str) -> dict[str, Any]:
    """The summary of a run of some steps; its proof is part of it."""
    given = [
        f"model={model}", f"data.train={data}", "budget.steps=12", "batch.rows=16", "precision=float32",
        "evaluation.fraction=0.25", "evaluation.every=6", "optimizer.learning_rate=0.02", *sets,
    ]  # fmt: skip
    path = run.with_suffix(".yaml")
    path.write_text("{}\n", encoding="utf-8")
    luthier("train", path, "--run", run, *(part for each in given for part in ("--set", each))).must(0)
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["proof"]["reloaded_loss"] is not None
    assert isinstance(summary, dict)
    return summary


@pytest.mark.parametrize("adapter", ["lora", "prefix_tuning", "full"])
def test_a_classifier_learns_is_proved_and_classifies(adapter: str, bert: Path, tmp_path: Path) -> None:
    """Breaks when a head is not saved, classes are numbered otherwise, or a result cannot be asked."""
    run = tmp_path / "run"
    data = labelled(tmp_path / "rows.jsonl")
    rate = {"lora": 0.01, "prefix_tuning": 0.05, "full": 0.002}[adapter]
    summary = train(
        bert, data, run, "objective.method=classification", f"adapter.method={adapter}", "budget.steps=60",
        f"optimizer.learning_rate={rate}", "evaluation.every=60",
    )  # fmt: skip
    assert summary["task"] == "sequence_classes" and "accuracy" in summary["metrics"]
    if adapter == "prefix_tuning":
        # Attention that was never trained does not look at a prefix.
        assert set(luthier("classify", run, "the plum", "--json").must(0).json["texts"][0]["probabilities"]) == CLASSES
        return
    assert summary["loss"]["eval"] < summary["loss"]["eval_first"] and summary["metrics"]["accuracy"][1] == 1.0
    found = luthier("classify", run, "the plum is 9", "the saw is 9", "--json").must(0).json["texts"]
    assert [each["class"] for each in found] == ["fruit", "tool"]
    assert all(sum(each["probabilities"].values()) == pytest.approx(1, abs=1e-5) for each in found)
    said = luthier("eval", run).must(0)
    assert "accuracy" in said.out and "perplexity" not in said.out
    luthier("generate", run, "--prompt", "hello").must(2, "says no text")
    rows = [{"text": "the pear", "label": "vegetable"}, {"text": "x", "label": "fruit"}]
    other = write(tmp_path / "other.jsonl", rows)
    luthier("eval", run, "--data", other).must(65, "vegetable")


def test_words_get_classes_of_their_own(bert: Path, tmp_path: Path) -> None:
    """Breaks when a word of several tokens has several classes, or the rows of a tagger are read as texts."""
    names = [*((name, "F") for name in FRUITS), *((name, "T") for name in TOOLS)]
    rows = [{"tokens": ["the", name, "and", "it"], "tags": ["O", tag, "O", "O"]} for name, tag in names * 5]
    run = tmp_path / "run"
    summary = train(
        bert, write(tmp_path / "rows.jsonl", rows), run, "objective.method=classification", "objective.level=word",
        "adapter.method=ia3", "budget.steps=40", "optimizer.learning_rate=0.1",
    )  # fmt: skip
    assert summary["task"] == "token_classes" and summary["metrics"]["accuracy"][1] > 0.8
    (found,) = luthier("classify", run, "the hammer and it", "--json").must(0).json["texts"]
    assert [each["word"] for each in found["words"]] == ["the", "hammer", "and", "it"]
    assert len(luthier("classify", run, "the hammer and it").must(0).out.split()) == 4


def test_an_encoder_learns_to_fill_in(bert: Path, tmp_path: Path) -> None:
    """Breaks when a masked model is saved, resumed or proved with other masks than it was trained on."""
    rows = [{"text": f"the {name} lies beside the {tool}"} for name in FRUITS for tool in TOOLS]
    data = write(tmp_path / "rows.jsonl", rows)
    summary = train(bert, data, tmp_path / "run", "objective.method=masked_lm", "adapter.method=lora")
    assert summary["loss"]["eval"] < summary["loss"]["eval_first"] and summary["metrics"] == {}


def test_an_encoder_decoder_answers(t5: Path, tmp_path: Path) -> None:
    """Breaks when answers begin with another token, or the encoder's edits are lost on the way to the result."""
    run = tmp_path / "run"
    rows = [{"prompt": f"what is the {name}", "completion": "a fruit"} for name in FRUITS * 6]
    summary = train(
        t5, write(tmp_path / "rows.jsonl", rows), run, "objective.method=seq2seq", "adapter.method=full",
        "budget.steps=60", "evaluation.every=60", "optimizer.learning_rate=0.005",
    )  # fmt: skip
    assert summary["loss"]["eval"] < summary["loss"]["eval_first"] / 4
    assert luthier("generate", run, "--prompt", "what is the plum").must(0).out.strip() == "a fruit"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    assert samples[-1]["tuned"] == samples[-1]["reference"] == "a fruit"
    assert "what is the" in samples[-1]["prompt"]


def test_t_few_chooses(t5: Path, tmp_path: Path) -> None:
    """Breaks when wrong answers are imitated, or a row of choices is read as a conversation."""
    rows = [{"question": f"is the {name} good", "choices": ["yes", "no"], "answer": n % 2} for n in range(4)
            for name in ((FRUITS if n % 2 else TOOLS) * 2)]  # fmt: skip
    data = write(tmp_path / "rows.jsonl", rows)
    summary = train(
        t5, data, tmp_path / "run", "objective.method=t_few", "adapter.method=full", "budget.steps=60",
        "optimizer.learning_rate=0.005", f"data.evaluation={data}", "evaluation.every=60",
    )  # fmt: skip
    assert summary["loss"]["eval"] < summary["loss"]["eval_first"] and summary["metrics"]["accuracy"][1] == 1.0


@pytest.mark.parametrize(
    ("objective", "kind", "allowed"),
    [("sft", "bert", "classification or masked_lm"), ("seq2seq", "bert", "classification or masked_lm"),
     ("classification", "t5", "seq2seq or t_few"), ("masked_lm", "llama", "sft, language_model or classification")],
)  # fmt: skip
def test_an_objective_that_does_not_fit_a_model_is_told_before_data_are_read(
    objective: str, kind: str, allowed: str, bert: Path, t5: Path, llama: Path, tmp_path: Path
) -> None:
    """Breaks when the data are read, or weights loaded, before a model is found to be of another kind."""
    model = {"bert": bert, "t5": t5, "llama": llama}[kind]
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {model}\ndata: nowhere.jsonl\nobjective: {objective}\n", encoding="utf-8")
    luthier("train", path, "--dry-run").must(2, allowed)


def test_a_summary_says_what_to_do_next(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks when a classifier's result is to be asked for texts."""
    summary = train(bert, labelled(tmp_path / "r.jsonl"), tmp_path / "run", "objective.method=classification")
    print_summary(summary)
    said = capsys.readouterr().out
    assert "luthier classify" in said and "accuracy" in said and "luthier generate" not in said
    opened = open_named(str(tmp_path / "run"))
    assert opened.model.task.classes == ("fruit", "tool")


def test_an_encoder_whose_texts_end_in_a_stop_token_is_proved_too(tmp_path: Path) -> None:
    """Breaks when a classifier is to say where its answers stop: it has none, nor a generation_config.json."""
    model = roberta_folder(tmp_path / "roberta")
    run = tmp_path / "run"
    summary = train(model, labelled(tmp_path / "rows.jsonl"), run, "objective.method=classification", "budget.steps=2")
    assert summary["task"] == "sequence_classes"
    assert set(luthier("classify", run, "the plum", "--json").must(0).json["texts"][0]["probabilities"]) == CLASSES


def test_a_row_that_is_longer_than_robertas_own_positions_is_told(tmp_path: Path) -> None:
    """Breaks when its two positions for padding are counted as room, and a lookup ends in an index error."""
    model = roberta_folder(tmp_path / "roberta")
    rows = [{"text": "a" * 200, "label": kind} for kind in CLASSES for _ in range(4)]
    path = tmp_path / "r.yaml"
    data = write(tmp_path / "rows.jsonl", rows)
    path.write_text(f"model: {model}\ndata: {{train: {data}, over_length: truncate}}\nobjective: classification\n")
    luthier("train", path, "--dry-run").must(2, "126 positions")
    luthier("train", path, "--dry-run", "--set", "data.max_tokens=126").must(0)
