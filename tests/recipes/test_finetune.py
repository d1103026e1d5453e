"""From a file to a better model, for each adapter and objective: through the command line, and checked by peers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.store.manifest import verify
from tests.cli.commands import STEPS, chat, events, luthier, recipe_text, step_events, write_rows

ADAPTERS = {
    "lora": "{method: lora, rank: 4, alpha: 8.0}",
    "pissa": "{method: lora, rank: 4, alpha: 4.0, init: pissa}",
    "embedding": "{method: lora, rank: 4, alpha: 8.0, targets: [embed, q, v], plus_ratio: 2.0}",
    "ia3": "ia3",
    "prefix_tuning": "prefix_tuning",
    "full": "full",
}
RATES = {"lora": 0.01, "pissa": 0.01, "embedding": 0.01, "ia3": 0.1, "prefix_tuning": 0.1, "full": 0.01}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, llama: Path, rows: Path) -> Callable[[str], Path]:
    """`tuned("ia3")`: a finished run with that adapter, made once."""
    parent = tmp_path_factory.mktemp("tuned")

    def run(adapter: str) -> Path:
        folder = parent / adapter
        if not folder.exists():
            own = parent / f"{adapter}.yaml"
            own.write_text(recipe_text(llama, rows, adapter=ADAPTERS[adapter]), encoding="utf-8")
            rate = ("--set", f"optimizer.learning_rate={RATES[adapter]}", "--set", "budget.steps=16")
            luthier("train", own, "--run", folder, *rate, "--json").must(0)
        return folder

    return run


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_loss_falls_the_files_are_there_and_eval_and_generate_read_them(
    adapter: str, tuned: Callable[[str], Path]
) -> None:
    folder = tuned(adapter)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["loss"]["eval"] < summary["loss"]["eval_first"] - 0.05
    losses = [event["loss"] for event in step_events(folder)]
    assert sum(losses[-4:]) < sum(losses[:4])
    times = [event for event in events(folder) if event["kind"] == "step"]
    # A hundredth even with this model, whose steps take milliseconds; the rest is room for a busy machine.
    assert sum(event["source_seconds"] for event in times) < 0.2 * sum(event["seconds"] for event in times)
    assert summary["proof"]["differs_from_start"] and summary["proof"]["reloaded_loss"] == summary["loss"]["eval"]
    whole = adapter == "full"
    result = folder / ("model" if whole else "adapter")
    files = {path.name for path in result.iterdir()}
    weights = {"model.safetensors", "config.json"} if whole else {"adapter_model.safetensors", "adapter_config.json"}
    assert weights | {"tokenizer.json", "chat_template.jinja", "luthier.json"} <= files
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    for name in ("run.json", "recipe.yaml", "plan.json", "environment.json", "status.json", "events.jsonl",
                 "samples.jsonl", "summary.json", "worst_rows.json", "report.html"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    for link in ("best", "last"):
        verify(folder / "checkpoints" / link)
    found = luthier("eval", folder, "--json").must(0).json
    assert found["tuned"]["loss"] == pytest.approx(summary["loss"]["eval"], abs=1e-6)
    # A fresh prefix is no identity: what it starts from is near the base, not the base.
    near = 0.5 if adapter == "prefix_tuning" else 1e-6
    assert found["base"]["loss"] == pytest.approx(summary["loss"]["eval_first"], abs=near)
    answer = luthier("generate", folder, "--prompt", "the colour of 3 is", "--max-new-tokens", 6, "--json").must(0)
    assert answer.json["answers"][0]["tokens"]


@pytest.mark.parametrize("adapter", ["lora", "pissa", "ia3", "prefix_tuning"])
def test_generate_takes_the_adapter_on_its_base_too(adapter: str, tuned: Callable[[str], Path], llama: Path) -> None:
    folder = tuned(adapter)
    command = ("--prompt", "the colour of 3 is", "--max-new-tokens", 6, "--json")
    run = luthier("generate", folder, *command).must(0).json
    assert luthier("generate", llama, "--adapter", folder / "adapter", *command).must(0).json == run
    assert luthier("generate", llama, *command).must(0).json != run


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peers_compute_the_same_loss_from_the_saved_files(
    adapter: str, tuned: Callable[[str], Path], tmp_path: Path, llama: Path, rows: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(rows.read_text("utf-8").splitlines()[5] + "\n", encoding="utf-8")
    ours = luthier("eval", tuned(adapter), "--data", one, "--json").must(0).json["tuned"]["loss"]
    shown = luthier("data", "show", one, "--model", llama, "--json").must(0).json["rows"][0]["tokens"]
    assert ours == pytest.approx(peer_loss(adapter, tuned(adapter), llama, shown), abs=1e-5)


def peer_loss(adapter: str, folder: Path, base: Path, shown: list[dict[str, Any]]) -> float:
    """The loss on one row by transformers, and by peft where there is an adapter, of the tokens that carry weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if adapter == "full":
            model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        else:
            from peft import PeftModel

            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder / "adapter")
            )
        ids = torch.tensor([[token["id"] for token in shown]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
    weights = torch.tensor([token["weight"] for token in shown])[1:]
    losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    return float((losses * weights).sum() / weights.sum())


def test_raw_text_is_learned_with_the_language_model_objective(tmp_path: Path, llama: Path) -> None:
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for text in texts:
        text.write_text("the red boat and the blue sea\n" * 20, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(llama, texts[0]) + "objective: language_model\n", encoding="utf-8")
    folder = tmp_path / "run"
    more = ("--set", "data.over_length=truncate", "--set", f"data.evaluation={texts[1]}")
    line = luthier("train", recipe, "--run", folder, *more, "--json").must(0).json
    assert line["loss"]["last"] < line["loss"]["first"] and line["tokens"]["trained"] > 0.9 * line["tokens"]["total"]
    assert luthier("eval", folder, "--json").json["tuned"]["loss"] == pytest.approx(line["loss"]["eval"], abs=1e-6)
    said = luthier("generate", folder, "--raw", "--prompt", "the red", "--max-new-tokens", 5, "--json").must(0)
    assert said.json["answers"][0]["tokens"]


def test_the_end_of_a_single_text_is_held_out(tmp_path: Path, llama: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the red boat and the {n}th blue sea\n" for n in range(60)), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(llama, text) + "objective: language_model\n", encoding="utf-8")
    more = ("--set", "data.max_tokens=64", "--set", "data.over_length=truncate")
    line = luthier("train", recipe, "--run", tmp_path / "run", *more, "--json").must(0).json
    plan = json.loads((tmp_path / "run" / "plan.json").read_text("utf-8"))
    views = plan["data"]["rendered"]["views"]
    assert views > 10 and plan["data"]["held_out_views"] == round(0.2 * views)
    found = luthier("eval", tmp_path / "run", "--json").must(0).json
    assert found["tuned"]["loss"] == pytest.approx(line["loss"]["eval"], abs=1e-6)


def test_a_prefix_needs_room_before_the_longest_row(tmp_path: Path, tiny_path: Callable[[str], Path]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat(f"{'x' * 200}{n}", "y" * 20) for n in range(10)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(tiny_path("gpt2"), rows, adapter="prefix_tuning"), encoding="utf-8")
    told = luthier("train", recipe, "--run", tmp_path / "run")
    told.must(2, "the learned prefix 20", "the model's 256 positions", "set data.max_tokens to 236")
    assert not (tmp_path / "run").exists()
    luthier("train", recipe, "--run", tmp_path / "run", "--set", "adapter.prefix_tokens=2", "--quiet").must(0)
    luthier("eval", tmp_path / "run").must(0)


def test_the_answers_of_base_and_tuned_model_are_kept(finished: Path) -> None:
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [0, 4, STEPS]
    # Before the first step both would say the same.
    assert [sorted({"base", "tuned"} & set(sample)) for sample in samples] == [["base"], ["tuned"], ["tuned"]]
    assert all({"prompt", "reference"} <= set(sample) for sample in samples)
    assert "the colour of" in samples[0]["prompt"] and samples[0]["reference"]


def test_the_log_tells_the_whole_story(finished: Path) -> None:
    kinds = [event["kind"] for event in events(finished)]
    assert kinds[0] == "start" and kinds[-1] == "finish"
    assert kinds.count("step") == STEPS and kinds.count("evaluation") == 3 and kinds.count("checkpoint") == STEPS // 2
    worst = json.loads((finished / "worst_rows.json").read_text("utf-8"))
    assert worst == sorted(worst, key=lambda row: -row["loss"]) and "the colour of" in worst[0]["text"]


def test_the_recipe_of_a_run_makes_the_same_run(tmp_path: Path, finished: Path) -> None:
    luthier("train", finished / "recipe.yaml", "--run", tmp_path / "again", "--json").must(0)
    assert step_events(tmp_path / "again") == step_events(finished)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "rate", "status"),
    # At so small a rate the held-out loss stays what it is, to the last bit: no evaluation is a gain.
    [("evaluation.patience=1", 1e-12, "early-stopped"), ("budget.minutes=1e-7", 0.5, "out-of-time")],
)
def test_a_run_that_ends_before_its_last_step_is_finished_with_its_best_state(
    more: str, rate: float, status: str, tmp_path: Path, recipe: Path
) -> None:
    folder = tmp_path / "run"
    sets = ("--set", more, "--set", f"optimizer.learning_rate={rate}", "--set", "evaluation.every=1")
    line = luthier("train", recipe, "--run", folder, *sets, "--json").must(0).json
    assert line["status"] == status and line["steps"] < STEPS
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert line["loss"]["eval"] == summary["loss"]["best"] == summary["proof"]["reloaded_loss"]
    assert luthier("eval", folder, "--json").json["tuned"]["loss"] == pytest.approx(line["loss"]["eval"], abs=1e-6)
    assert luthier("resume", folder, "--json").json["status"] == status


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_rows(tmp_path: Path, recipe: Path) -> None:
    folder = tmp_path / "run"
    wild = ("--set", "optimizer.learning_rate=1e30", "--set", "max_grad_norm=null")
    told = luthier("train", recipe, "--run", folder, *wild)
    told.must(76, "error[numeric]", " (rows ", "not applied; 3 of 3 bad steps in a row", "finite and kept")
    assert luthier("run", "show", folder, "--json").json["state"] == "failed"
