"""Whole runs on preferences: from a file to a proved result that prefers, on held-out rows, what people preferred."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from luthier.assets.demo_task import demo_rows
from luthier.core.errors import RecipeError
from luthier.data.conversation import Labelled, Message
from luthier.model.scorer import Begun
from luthier.recipes.opening.opened import open_named
from luthier.recipes.opening.session import load
from luthier.recipes.reinforcing.tools import judge_named
from luthier.recipes.samples import question
from tests import forests, task_models
from tests.cli.commands import luthier


def preferences(path: Path, count: int) -> Path:
    """Rows in the shape of LLaMA-Factory's: an order as JSON is preferred to the same order in an ad's voice."""
    rng, rows = random.Random(1), []
    for row in demo_rows(count, seed=3, held_out=False):
        asked, said = (turn["content"] for turn in row["messages"])
        order = json.loads(said)
        other = rng.choice(["Great choice, {name}! {quantity} {item} for you.", "Sure! {name} gets {quantity} {item}."])
        rows.append(
            {
                "conversations": [{"from": "human", "value": asked.replace("Write as JSON:", "Note this order:")}],
                "chosen": {"from": "gpt", "value": f"{order['quantity']} x {order['item']}, {order['city']}"},
                "rejected": {"from": "gpt", "value": other.format_map(order)},
            }
        )
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def judged(path: Path, count: int) -> Path:
    pairs = json.loads(preferences(path, count).read_text("utf-8"))
    rows = []
    for place, pair in enumerate(pairs):
        said = pair["rejected" if place % 2 else "chosen"]
        rows.append({"messages": [*pair["conversations"], said], "kto_tag": not place % 2})
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def train(model: Path | str, data: Path, run: Path, *sets: str) -> dict[str, Any]:
    given = [
        f"model={model}", f"data.train={data}", "batch.rows=12", "precision=float32", "evaluation.fraction=0.25",
        "evaluation.every=50", "budget.epochs=1", "evaluation.prompts=0", *sets,
    ]  # fmt: skip
    path = run.with_suffix(".yaml")
    path.write_text("{}\n", encoding="utf-8")
    luthier("train", path, "--run", run, *(part for each in given for part in ("--set", each))).must(0)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["proof"]["reloaded_loss"] == pytest.approx(summary["loss"]["eval"], rel=1e-5)
    return summary


METHODS = [
    ("dpo", 1e-3),
    *(pytest.param(name, rate, marks=pytest.mark.slow) for name, rate in (
        ("orpo", 2e-3), ("simpo", 1e-3), ("reward_model", 2e-3), ("kto", 2e-3),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("method", "rate"), METHODS)
def test_the_seedling_learns_to_prefer(method: str, rate: float, tmp_path: Path) -> None:
    """Breaks when a preference that is learned in training does not hold for rows that were held out."""
    data = (judged if method == "kto" else preferences)(tmp_path / "pairs.json", 96)
    run = tmp_path / "run"
    summary = train("seedling", data, run, f"objective.method={method}", f"optimizer.learning_rate={rate}")
    before, after = summary["metrics"]["accuracy"]
    assert after >= 0.9 and after > before
    assert summary["loss"]["eval"] < summary["loss"]["eval_first"]


def log_prob_margins(model: Path, pairs: list[dict[str, Any]]) -> np.ndarray:
    """How much likelier the chosen answer of each pair is than the rejected one, in nats."""
    scorer = judge_named(str(model), precision="float32")
    margins = []
    for pair in pairs:
        asked = Begun((Message("user", pair["conversations"][0]["value"]),), "")
        chosen, rejected = scorer.likely([asked], [pair["chosen"]["value"], pair["rejected"]["value"]])[0]
        margins.append(chosen.log_prob - rejected.log_prob)
    return np.array(margins)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ppo_teaches_by_a_reward_model_what_people_preferred(tmp_path: Path) -> None:
    """From pairs to a policy by way of a reward: a seedling that gives both kinds of answers, a reward model of the
    pairs, PPO. Held-out pairs then are right by their log-ratios to the policy before; measured with three seeds, all
    24 of 24, and by log-probabilities alone 2 of 24 before and 11 to 17 after.
    """
    pairs = json.loads(preferences(tmp_path / "pairs.json", 96).read_text("utf-8"))
    learned, held_out = pairs[:72], pairs[72:]
    (tmp_path / "learned.json").write_text(json.dumps(learned), "utf-8")
    asked = [{"prompt": pair["conversations"][0]["value"]} for pair in learned]
    said = [{**row, "completion": pair[kind]["value"]} for row, pair in zip(asked, learned, strict=True)
            for kind in ("chosen", "rejected")]  # fmt: skip
    for name, rows in (("asked", asked), ("said", said)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    train("seedling", tmp_path / "said.jsonl", tmp_path / "before", "adapter.method=full", "budget.epochs=4",
          "optimizer.learning_rate=1e-3")  # fmt: skip
    metrics = train("seedling", tmp_path / "learned.json", tmp_path / "reward", "objective.method=reward_model",
                    "optimizer.learning_rate=2e-3")["metrics"]  # fmt: skip
    assert metrics["accuracy"][1] >= 0.9
    before = tmp_path / "before" / "model"
    recipe = {
        "recipe": "reinforce", "model": str(before), "data": {"train": str(tmp_path / "asked.jsonl")},
        "reward": {"method": "learned", "most": 8}, "reward_model": str(tmp_path / "reward"),
        "objective": {"method": "ppo", "beta": 0.02}, "rollouts": {"prompts": 8, "answers": 4, "max_new_tokens": 24},
        "optimizer": {"method": "adamw", "learning_rate": 1e-3}, "budget": {"steps": 24},
        "evaluation": {"fraction": 0.1, "every": 0, "prompts": 0, "max_rows": 8}, "precision": "float32",
    }  # fmt: skip
    (tmp_path / "ppo.yaml").write_text(json.dumps(recipe), "utf-8")
    luthier("train", tmp_path / "ppo.yaml", "--run", tmp_path / "after", "--json").must(0)
    old, new = (log_prob_margins(model, held_out) for model in (before, tmp_path / "after"))
    assert (new > old).mean() >= 0.9
    assert (new > 0).mean() > (old > 0).mean() + 0.2


def test_a_reward_model_is_what_the_zoo_loads_and_scores_answers(llama: Path, tmp_path: Path) -> None:
    """Breaks when a head is not saved, a score is taken at another token, or a prompt is shown otherwise."""
    data, run = preferences(tmp_path / "pairs.json", 16), tmp_path / "run"
    summary = train(
        llama, data, run, "objective.method=reward_model", "adapter.method=full", "optimizer.learning_rate=1e-3"
    )
    assert summary["task"] == "scores"
    opened = open_named(str(run))
    conversations = [
        (Message("user", "Note this"), Message("assistant", answer)) for answer in ("3 x nails, Tovburg", "Sure!")
    ]
    scores = opened.scores(conversations)
    zoo = AutoModelForSequenceClassification.from_pretrained(run / "model", dtype=torch.float32).eval()
    assert zoo.config.num_labels == 1
    for conversation, score in zip(conversations, scores, strict=True):
        ids = [*opened.renderer.prompt_ids(conversation[:1]).tolist(),
               *opened.tokenizer.encode(conversation[1].content)[0].tolist(), opened.tokenizer.eos_id]  # fmt: skip
        with torch.no_grad():
            assert float(zoo(torch.tensor([ids])).logits) == pytest.approx(score, rel=1e-4, abs=1e-5)
    said = luthier("classify", run, "Note this", "--pair", "Sure!", "--json").must(0).json["texts"][0]
    assert said["score"] == pytest.approx(scores[1], rel=1e-4, abs=1e-5)
    assert luthier("classify", run, "Note this", "--pair", "Sure!").must(0).out.endswith("Note this -> Sure!\n")
    luthier("classify", run, "Note this").must(2, "add --pair ANSWER")
    assert "accuracy" in luthier("eval", run).must(0).out
    with pytest.raises(RecipeError, match="knows no classes"):
        opened.classify([Labelled("x", "")])


def test_a_model_that_was_trained_whole_is_proved_beside_its_reference(llama: Path, tmp_path: Path) -> None:
    """Breaks when the trained model is taken for its own reference, or a plan forgets what a reference costs."""
    data, run = preferences(tmp_path / "pairs.json", 16), tmp_path / "run"
    summary = train(
        llama, data, run, "objective.method=dpo", "objective.beta=0.5", "adapter.method=full",
        "optimizer.learning_rate=1e-3",
    )  # fmt: skip
    assert summary["loss"]["eval"] != pytest.approx(summary["loss"]["eval_first"], rel=1e-3)
    found = luthier("eval", run, "--json").must(0).json
    assert found["base"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert found["tuned"]["loss"] == pytest.approx(summary["loss"]["eval"], rel=1e-4)
    speed = json.loads((run / "plan.json").read_text("utf-8"))["speed"]
    assert 0 < speed["looked_flops_per_token"] < speed["flops_per_token"] / 2


def test_a_session_takes_preferences_as_rows() -> None:
    """Breaks when the primitives read rows otherwise than a recipe does, or have no reference."""
    session = load("seedling", objective="dpo", precision="float32")
    rows = [{"prompt": "Who are you?", "chosen": "A carpenter.", "rejected": "A whale."}]
    assert session.loss(rows) == pytest.approx(0.6931, abs=1e-3)
    for _ in range(3):
        session.forward_backward(rows)
        session.optim_step()
    assert session.loss(rows) < 0.69


def test_data_commands_know_pairs_unasked(llama: Path, tmp_path: Path) -> None:
    """Breaks when a file of pairs has to be named as one before it can be looked at, or is taken for chat."""
    data = preferences(tmp_path / "pairs.json", 6)
    checked = luthier("data", "check", data, "--model", llama, "--json").must(0).json
    assert checked["clean"] and checked["files"][0]["format"] == "preference_sharegpt"
    (row,) = luthier("data", "show", data, "--model", llama, "--rows", "1", "--json").must(0).json["rows"]
    assert {token["answer"] for token in row["tokens"]} == {0, 1, 2}
    assert {token["role"] for token in row["tokens"] if token["answer"] == 2} <= {"wrong", "template"}
    assert luthier("data", "stats", data, "--model", llama, "--json").must(0).json["rendered"]["rows"] == 6
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": "a", "completion": "b", "label": true}\n', encoding="utf-8")
    assert luthier("data", "check", chat, "--model", llama, "--json").must(0).json["files"][0]["format"] == (
        "prompt_completion"
    )


def test_the_reference_answer_of_a_sample_is_the_chosen_one() -> None:
    """Breaks when people are shown both answers as if they were one."""
    view = task_models.answered(forests.views(1)[0], np.random.default_rng(0), answers=2)
    prompt, said = question(view, 8)
    assert view.answers is not None
    assert np.array_equal(prompt, view.tokens[view.answers == 0])
    assert np.array_equal(said, view.tokens[view.answers == 1])
