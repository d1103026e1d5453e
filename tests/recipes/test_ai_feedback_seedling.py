"""The seedling, tuned to judge, teaches the seedling: from prompts to a policy that prefers what its judge prefers.

The judge is trained on pairs of the seedling's own answers, of which one asks to write something: that one is worse.
What it then says of other answers, in both orders, is all that the policy learns from. Measured with one thread of a
busy CPU: of 512 pairs 124 became preferences (the place decided most others, which averaging made ties), in all 58 of
them of which one answer writes that one was rejected, and held-out preference accuracy went from 0.50 to 0.81 over 31
rows. A judge that was tuned to say why first, on 22 pairs that it had not seen: right in 57 % before and 82 % after,
the place decided 71 % and then 18 % of them, and the first place was preferred or avoided by 0.23 and then 0.10.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.sample import Sample
from luthier.model.scorer import Begun
from luthier.model.sources import SEEDLING, resolve_source
from luthier.model.speaker import Sampling
from luthier.recipes import feedback
from luthier.recipes.opened import open_named
from luthier.recipes.reward_tools import judge_named
from luthier.rewards import Tools
from luthier.rewards.judge import Comparison, Judge
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
VERDICT: dict[str, Any] = {
    "rationale": False, "criteria": "tone", "preamble": "A response that asks to write is worse.",
}  # fmt: skip
REASONED = {**VERDICT, "rationale": True}


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


def pairs_of(prompts: list[str], *, answers: int, seed: int) -> list[tuple[str, str, str]]:
    """Prompts with two of the seedling's answers to each, of which one asks to write."""
    opened = open_named(SEEDLING, precision="float32")
    asked = [prompt for prompt in prompts for _ in range(answers)]
    sampling = Sampling(max_new_tokens=24, temperature=1.0, stop_ids=opened.stop_ids, seed=seed)
    spoken = opened.engine.speak([opened.prompt(prompt) for prompt in asked], sampling)
    said = [opened.text(each.tokens).strip() for each in spoken]
    found = [(asked[at], *said[at : at + 2]) for at in range(0, len(said), 2)]
    return [pair for pair in found if pair[1] and pair[2] and writes(pair[1]) != writes(pair[2])]


def judge_rows(pairs: list[tuple[str, str, str]], verdict: dict[str, Any]) -> list[dict[str, object]]:
    """What a judge is asked of pairs, in both orders, and what it should say: the verdict, or why and the verdict."""
    rows: list[dict[str, object]] = []
    for prompt, one, two in pairs:
        heard = Overheard()
        with pytest.raises(LookupError):
            Judge(scale="pair", **{**verdict, "rationale": False}).compare(
                [Sample(prompt=prompt, answer=one)], [two], Tools(judge=heard)  # type: ignore[arg-type]
            )
        for order, begun in enumerate(heard.asked):
            better = 1 if writes((two, one)[order]) else 2
            asked, why = begun.messages[0].content, ""
            if verdict["rationale"]:
                asked = asked.replace("say which response", "explain which response")
                why = f"Rationale: Response {3 - better} asks to write.\n\n"
            rows.append({"prompt": asked, "completion": f"{why}{begun.begun}{better}"})
    return rows


def train_judge(folder: Path, rows: list[dict[str, object]], *, epochs: int) -> Path:
    """The seedling, tuned on what a judge should say."""
    (folder / "judge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tuned = {
        "model": SEEDLING, "data": {"train": str(folder / "judge.jsonl")}, "adapter": {"method": "full"},
        "optimizer": {"method": "adamw", "learning_rate": 1.0e-3}, "batch": {"rows": 8}, "budget": {"epochs": epochs},
        "evaluation": {"fraction": 0.05, "every": 0, "prompts": 0}, "precision": "float32",
    }  # fmt: skip
    (folder / "judge.yaml").write_text(json.dumps(tuned), encoding="utf-8")
    luthier("train", folder / "judge.yaml", "--run", folder / "judge", "--json").must(0)
    return folder / "judge"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_judge_that_was_tuned_teaches_a_policy(tmp_path: Path) -> None:
    """Breaks when what a judge prefers does not come to be preferred, from end to end."""
    judge = train_judge(tmp_path, judge_rows(pairs_of(PROMPTS, answers=16, seed=7), VERDICT), epochs=4)
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    recipe = {
        "recipe": "ai_feedback", "tie": 0.1, "model": SEEDLING, "judge": str(judge), "verdict": VERDICT,
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


def judged(name: str, pairs: list[tuple[str, str, str]]) -> dict[str, float]:
    """How often a judge that says why first is right, and by how much it prefers a place."""
    # An untuned model hardly ever says a digit; what little there is decides here.
    judge = Judge(scale="pair", **{**REASONED, "most_tokens": 32, "least_mass": 1e-12})
    samples = [Sample(prompt=prompt, answer=one) for prompt, one, _ in pairs]
    tools = Tools(judge=judge_named(name, precision="float32"))
    found = judge.compare(samples, [two for _, _, two in pairs], tools)
    seen = [(each, pair) for each, pair in zip(found, pairs, strict=True) if isinstance(each, Comparison)]
    count = max(len(seen), 1)
    return {
        "decided": len(seen) / len(pairs),
        "right": sum((each.preference > 0.5) == writes(two) for each, (_, _, two) in seen) / count,
        "bias": sum(abs(each.bias) for each, _ in seen) / count,
        "by_place": sum(each.same_place for each, _ in seen) / count,
        "reasoned": sum("asks to write" in each.rationales[0] for each, _ in seen) / count,
    }


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_judge_learns_to_say_why_first_and_then_to_decide(tmp_path: Path) -> None:
    """Breaks when a tuned judge's rationale does not carry its verdict, or the pipeline cannot use such a judge."""
    unseen = pairs_of(PROMPTS[::2], answers=8, seed=11)[:48]
    before = judged(SEEDLING, unseen)
    judge = train_judge(tmp_path, judge_rows(pairs_of(PROMPTS, answers=16, seed=7), REASONED), epochs=4)
    after = judged(str(judge), unseen)
    print(json.dumps({"pairs": len(unseen), "before": before, "after": after}))
    assert after["decided"] == after["reasoned"] == 1.0, (before, after)
    assert after["right"] > 0.65 and after["bias"] < before["bias"], (before, after)
    assert after["by_place"] < before["by_place"], (before, after)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:32]), encoding="utf-8"
    )
    recipe = {
        "recipe": "ai_feedback", "tie": 0, "model": SEEDLING, "judge": str(judge),
        "verdict": {**REASONED, "most_tokens": 32}, "data": {"train": str(tmp_path / "prompts.jsonl")},
        "answers": {"max_new_tokens": 24, "pairs": 1}, "budget": {"steps": 4}, "batch": {"rows": 4},
        "evaluation": {"fraction": 0.25, "prompts": 0}, "precision": "float32",
    }  # fmt: skip
    (tmp_path / "feedback.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    luthier("train", tmp_path / "feedback.yaml", "--run", tmp_path / "feedback", "--json").must(0)
    kept = feedback.rows_of(tmp_path / "feedback" / feedback.PREFERENCES)
    assert kept and all("asks to write" in row["rationale"] and "Preferred" not in row["rationale"] for row in kept)
