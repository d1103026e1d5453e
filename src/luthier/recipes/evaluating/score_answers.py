"""Score answers that are there already: what the reward of a recipe gives for each row of a file.

It is how a reward is tried before a model is trained on it: on good answers, on bad ones, and on those that cheat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Message
from luthier.data.reading.readers import read_records
from luthier.data.sample import Sample
from luthier.recipes.reinforcing.tools import scoring_of
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.rewards import Environment


def score_answers(recipe: FinetuneRecipe, file: Path, *, column: str = "completion") -> dict[str, Any]:
    """The score of each row, whose answer is in `column`, and the means. Raises RecipeError without a reward."""
    scoring = scoring_of(recipe) if isinstance(recipe, ReinforceRecipe) else None
    if scoring is None:
        raise RecipeError("the recipe has no reward", allowed="recipe: reinforce with a reward")
    rows = list(_rows(file, column, exchanged=isinstance(scoring.reward, Environment)))
    samples = [sample for sample, _ in rows]
    if not samples:
        raise DataError("there is no row", allowed="one answer or more", where=str(file))
    scoring.check((sample.facts, where) for sample, where in rows)
    scored = scoring.score(samples)
    # Failures carry their samples, and stand in no order.
    why = {id(failure.sample): str(failure) for failure in scored.failures}
    return {
        "file": str(file),
        "reward": scoring.reward.method_name(),
        "bounds": list(scoring.reward.bounds),
        "means": dict(scored.means),
        "counts": dict(scored.counts),
        "answers": [
            {"row": at, "value": None, "parts": {}, "reason": why.get(id(sample), "the reward does not apply")}
            if score is None
            else {"row": at, "value": score.value, "parts": dict(score.parts), "reason": score.reason}
            for at, (sample, score) in enumerate(zip(samples, scored.scores, strict=True), start=1)
        ],
    }


def _rows(file: Path, column: str, *, exchanged: bool) -> Iterator[tuple[Sample, str]]:
    """The answers of a file, each with the address of its row."""
    for item in read_records(file):
        if isinstance(item, DataError):
            raise item
        facts = {key: value for key, value in item.values.items() if key not in (column, "prompt")}
        said = item.values.get(column)
        if not isinstance(said, str):
            raise DataError(
                f"{column} is {said!r}"[:200], allowed="the answer, as text", where=item.where,
                do="name the column that has it: --column NAME",
            )  # fmt: skip
        asked = item.values.get("prompt", "")
        # In an exchange, as a run would have it, all is messages.
        text = asked if isinstance(asked, str) and not exchanged else None
        yield Sample(prompt=_prompt(asked, item.where), answer=said, facts=facts, text=text), item.where


def _prompt(value: object, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    messages = value if isinstance(value, list) else []
    if messages and all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in messages):
        return tuple(Message(each["role"], each["content"]) for each in messages)
    raise DataError(f"prompt is {value!r}"[:200], allowed="text, or messages with role and content", where=where)
