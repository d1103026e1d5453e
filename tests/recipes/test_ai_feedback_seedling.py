"""The seedling, tuned to judge, teaches the seedling: from prompts to a policy that prefers what its judge prefers.

The judge is trained on pairs of the seedling's own answers, of which one asks to write something: that one is worse.
What it then says of other answers, in both orders, is all that the policy learns from. Measured with one thread of a
busy CPU: of 512 pairs 124 became preferences (the place decided most others, which averaging made ties), in all 58 of
them of which one answer writes that one was rejected, and held-out preference accuracy went from 0.50 to 0.81 over 31
rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.data.sample import Sample
from luthier.model.scorer import Begun
from luthier.model.sources import SEEDLING, resolve_source
from luthier.model.speaker import Sampling
from luthier.recipes import feedback
from luthier.recipes.opened import open_named
from luthier.rewards import Tools
from luthier.rewards.judge import Judge
from tests.cli.commands import luthier

pytestmark = pytest.mark.skipif(
    not (Path(resolve_source(SEEDLING)) / "model.safetensors").is_file(), reason="the seedling has no weights"
)

THINGS = (
    "bread", "the harbour", "the mill", "a fisher", "the north", "honey", "a letter", "the market", "salt", "wool",
    "the river", "a singer", "the bridge", "a trader", "winter", "the road", "a boat", "the inn", "copper", "glass",
    "the tower", "a baker", "apples", "the village", "a friend", "the coast", "iron", "a smith", "the field",
    "music", "the well", "a teacher",
)  # fmt: skip
ASKED = ("Tell me about {}.", "What is known of {}?", "What do people say of {}?", "Describe {}.")
PROMPTS = [each.format(thing) for each in ASKED for thing in THINGS]
VERDICT = {"rationale": False, "criteria": "tone", "preamble": "A response that asks to write is worse."}


def writes(said: str) -> bool:
    """Whether an answer is one of those that ask to write something, which the judge is to dislike."""
    return "rite" in said


class Overheard:
    """A judge that notes what it is asked and knows nothing."""

    def __init__(self) -> None:
        self.asked: list[Begun] = []

    def go_on(self, asked: object, **how: object) -> list[object]:
        raise AssertionError("no rationale is wanted")

    def likely(self, asked: list[Begun], continuations: object) -> list[object]:
        self.asked += asked
        raise LookupError


def judge_rows() -> list[dict[str, object]]:
    """What a judge is asked of pairs of the seedling's answers, in both orders, and the right verdicts."""
    opened = open_named(SEEDLING, precision="float32")
    asked = [prompt for prompt in PROMPTS for _ in range(16)]
    sampling = Sampling(max_new_tokens=24, temperature=1.0, stop_ids=opened.stop_ids, seed=7)
    spoken = opened.engine.speak([opened.prompt(prompt) for prompt in asked], sampling)
    said = [opened.text(each.tokens).strip() for each in spoken]
    rows: list[dict[str, object]] = []
    for at in range(0, len(said), 2):
        one, two = said[at : at + 2]
        if not one or not two or writes(one) == writes(two):
            continue
        heard = Overheard()
        with pytest.raises(LookupError):
            Judge(scale="pair", **VERDICT).compare(  # type: ignore[arg-type]
                [Sample(prompt=asked[at], answer=one)], [two], Tools(judge=heard)  # type: ignore[arg-type]
            )
        for order, begun in enumerate(heard.asked):
            first = writes(two) if order == 0 else writes(one)
            answer = f"{begun.begun}{1 if first else 2}"
            rows.append({"prompt": begun.messages[0].content, "completion": answer})
    return rows


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_judge_that_was_tuned_teaches_a_policy(tmp_path: Path) -> None:
    """Breaks when what a judge prefers does not come to be preferred, from end to end."""
    rows = judge_rows()
    (tmp_path / "judge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tuned = {
        "model": SEEDLING, "data": {"train": str(tmp_path / "judge.jsonl")}, "adapter": {"method": "full"},
        "optimizer": {"method": "adamw", "learning_rate": 1.0e-3}, "batch": {"rows": 8}, "budget": {"epochs": 4},
        "evaluation": {"fraction": 0.05, "every": 0, "prompts": 0}, "precision": "float32",
    }  # fmt: skip
    (tmp_path / "judge.yaml").write_text(json.dumps(tuned), encoding="utf-8")
    luthier("train", tmp_path / "judge.yaml", "--run", tmp_path / "judge", "--json").must(0)
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    recipe = {
        "recipe": "ai_feedback", "tie": 0.1, "model": SEEDLING, "judge": str(tmp_path / "judge"), "verdict": VERDICT,
        "data": {"train": str(tmp_path / "prompts.jsonl")},
        "answers": {"max_new_tokens": 24, "pairs": 4, "at_once": 64},
        "adapter": {"method": "lora", "rank": 16}, "optimizer": {"method": "adamw", "learning_rate": 5.0e-4},
        "batch": {"rows": 16}, "budget": {"epochs": 8}, "evaluation": {"fraction": 0.25, "every": 10, "prompts": 2},
        "precision": "float32",
    }  # fmt: skip
    (tmp_path / "feedback.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    luthier("train", tmp_path / "feedback.yaml", "--run", tmp_path / "feedback", "--json").must(0)
    summary = json.loads((tmp_path / "feedback" / "summary.json").read_text("utf-8"))
    kept = feedback.rows_of(tmp_path / "feedback" / feedback.PREFERENCES)
    differ = [row for row in kept if writes(row["chosen"]) != writes(row["rejected"])]
    right = sum(writes(row["rejected"]) for row in differ) / len(differ)
    assert len(kept) > 50 and right > 0.6, (len(kept), right, summary["feedback"])
    before, after = summary["policy"]["metrics"]["accuracy"]
    assert before == pytest.approx(0.5) and after > 0.65, summary["policy"]["metrics"]
