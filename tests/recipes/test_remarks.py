"""What an objective has to say of all of its rows is said before the first step, or refuses them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import Said, luthier, write_rows

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
PAIR = {"prompt": "How are you?", "chosen": "Well.", "rejected": "BAD!!"}


def planned(llama: Path, folder: Path, rows: Sequence[Mapping[str, Any]], objective: str, *sets: str) -> Said:
    """A dry run on these rows."""
    path = folder / "recipe.yaml"
    path.write_text("evaluation: {fraction: 0}\n", encoding="utf-8")
    data = write_rows(folder / "rows.jsonl", rows)
    given = [f"model={llama}", f"data.train={data}", f"objective={objective}", *sets]
    return luthier("train", path, "--dry-run", "--json", *(part for each in given for part in ("--set", each)))


def notices(said: Said) -> list[str]:
    """What the plan has to say."""
    return list(json.loads(said.must(0).out)["plan"]["notices"])


@pytest.mark.parametrize("method", ["dpo", "reward_model"])
@pytest.mark.parametrize(
    ("use", "scored", "taken"),
    [("margin", {"margin": 1}, "no margin to keep"), ("probability", {"probability": 0.8}, "taken for certain"),
     ("margin", {"score_chosen": 2, "score_rejected": 1}, "no margin to keep")],
)  # fmt: skip
def test_rows_without_the_scores_that_are_asked_for_are_told(
    method: str, use: str, scored: dict[str, Any], taken: str, llama: Path, tmp_path: Path
) -> None:
    """Breaks when a margin that no row has is a plain preference without a word, or rows without count as 0 unsaid."""
    objective = f"{{method: {method}, scores: {use}}}"
    rows = [{**PAIR, "prompt": f"How are you, {place}?", **scored} for place in range(4)]
    assert not [each for each in notices(planned(llama, tmp_path, rows, objective)) if "have no scores" in each]
    rows[2] = {key: value for key, value in rows[2].items() if key not in scored}
    [told] = [each for each in notices(planned(llama, tmp_path, rows, objective)) if "have no scores" in each]
    assert told.startswith(f"1 of 4 training rows have no scores, and scores is {use} in the objective (first: ")
    assert "rows.jsonl:3:1" in told and taken in told
    bare = [{**PAIR, "prompt": f"How are you, {place}?"} for place in range(4)]
    why = f"scores is {use} in the objective, and none of 4 training rows has scores"
    planned(llama, tmp_path, bare, objective).must(65, why, "set scores to unused")
    assert not [each for each in notices(planned(llama, tmp_path, bare, method)) if "have no scores" in each]


def test_scores_are_asked_of_the_pairs_of_a_mixture_alone(llama: Path, tmp_path: Path) -> None:
    """Breaks when a conversation to imitate is said to lack a score, or the pairs beside it are not looked at."""
    objective = "{method: mixture, compared: {method: dpo, scores: margin}}"
    (tmp_path / "talks").mkdir()
    talks = write_rows(tmp_path / "talks" / "talks.jsonl", [TALK])
    sets = f"data.train=[{tmp_path / 'rows.jsonl'}, {talks}]"
    assert not [each for each in notices(planned(llama, tmp_path, [{**PAIR, "margin": 1}], objective, sets)) if
                "have no scores" in each]  # fmt: skip
    planned(llama, tmp_path, [PAIR], objective, sets).must(65, "none of 1 training rows has scores")


def test_judged_rows_of_one_kind_and_steps_of_one_row_are_told(llama: Path, tmp_path: Path) -> None:
    """Breaks when a policy learns from good answers alone, or without a point of reference, and nobody is told."""
    rows = [{"prompt": f"How are you, {place}?", "completion": "Well.", "label": place % 2 == 0} for place in range(4)]
    quiet = ("judged training rows", "point of reference")
    assert not [each for each in notices(planned(llama, tmp_path, rows, "kto", "batch.rows=2")) if
                any(words in each for words in quiet)]  # fmt: skip
    for good, what in ((True, "good answers, and none is bad"), (False, "bad answers, and none is good")):
        alike = [{**row, "label": good} for row in rows]
        one, two = (each for each in notices(planned(llama, tmp_path, alike, "kto", "batch.rows=1")) if
                    any(words in each for words in quiet))  # fmt: skip
        assert one.startswith(f"all 4 judged training rows are {what}: ") and ("objective sft" in one) is good
        assert two.startswith("batch.rows is 1, and") and "set batch.rows to 8 or more" in two
    mixed = "{method: mixture, compared: kto}"
    [told] = [each for each in notices(planned(llama, tmp_path, alike, mixed)) if "judged training rows" in each]
    assert told.startswith("all 4 judged")


@pytest.mark.parametrize(
    ("rows", "counts", "idle", "alone"),
    [([PAIR], "0 are conversations or texts and 1 prompts", "said (sft)", "dpo"),
     ([TALK], "1 are conversations or texts and 0 prompts", "compared (dpo)", "sft")],
)  # fmt: skip
def test_a_mixture_of_one_kind_is_told(
    rows: list[dict[str, Any]], counts: str, idle: str, alone: str, llama: Path, tmp_path: Path
) -> None:
    """Breaks when one of two objectives has no row to learn from, and nobody is told."""
    [told] = [each for each in notices(planned(llama, tmp_path, rows, "mixture")) if "nothing to learn from" in each]
    assert told == (
        f"of 1 training rows {counts} with answers that were compared or judged: {idle} has nothing to learn from; add "
        f"rows for it, or take the objective {alone} alone"
    )
    (tmp_path / "more").mkdir()
    other = write_rows(tmp_path / "more" / "more.jsonl", [TALK if rows == [PAIR] else PAIR])
    both = f"data.train=[{tmp_path / 'rows.jsonl'}, {other}]"
    assert "nothing to learn from" not in str(notices(planned(llama, tmp_path, rows, "mixture", both)))


def test_texts_that_are_missing_beside_rollouts_are_named(llama: Path, tmp_path: Path) -> None:
    """Breaks when prompts are there, and all that is said is that there is no row."""
    sets = ("recipe=reinforce", "reward=numeric", "budget.steps=1")
    rows = [{"prompt": f"What is {place}?", "answer": "4"} for place in range(8)]
    planned(llama, tmp_path, rows, "{method: mixture, compared: grpo}", *sets).must(
        65, "the objective mixture imitates texts beside its rollouts", "of 8 training rows none is a conversation",
        "or make objective.compared the whole objective",
    )  # fmt: skip
