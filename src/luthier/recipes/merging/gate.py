"""The gate of a merge: parents and result on the user's own rows, and what was to be expected of them.

Idea: a merge is only worth having where it is better than each of its parents. All are asked the same: the likelihood
of the trained tokens of a file's rows, or a metric of the answers to its prompts. What is told is what the study of
merging for domain adaptation looks at.
Equation: improvement = P_merged - max_i P_i; expected = mean_i P_i; diversity = max_i P_i - min_i P_i, with P the
    likelihood exp(-loss), or the metric.
Source: Lu, Luu and Buehler, arXiv 2409.03444, section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import GateError, RecipeError
from luthier.core.knobs import validate
from luthier.core.nearest import choice
from luthier.metrics import Metric
from luthier.recipes.comparing.answers import answered, questions
from luthier.recipes.evaluating.evaluate import held_out_of
from luthier.recipes.measuring import mean_loss
from luthier.recipes.merging.merge import Gate
from luthier.recipes.opening.opened import open_named
from luthier.recipes.schemas.finetune import FinetuneRecipe

LIKELIHOOD: Final = "likelihood"


def metric_of(name: str | None) -> Metric | None:
    """The metric of that name; None for the likelihood. Raises MissingError for one that lacks a package."""
    if name is None or name == LIKELIHOOD:
        return None
    if name not in (known := [LIKELIHOOD, *catalog.names("metrics")]):
        raise RecipeError(f"there is no metric {name!r}", do=choice(name, known))
    found = choose("metrics", Metric, name)
    found.require()
    return found


def gate_of(data: Path | None, metric: Metric | str | None = None, *, allow_worse: bool = False) -> Gate | None:
    """The gate of these rows; none without any. Raises RecipeError for a metric that has nothing to ask."""
    chosen = metric if isinstance(metric, Metric) else metric_of(metric)
    if data is None:
        if metric is not None:
            name = metric if chosen is None else chosen.method_name()
            raise RecipeError(f"the metric is {name}, and there is nothing to ask", do="name the rows: --data FILE")
        return None
    bench = Bench(data, chosen, allow_worse=allow_worse)
    return Gate(bench.parents, bench.judge)


@final
@dataclass(frozen=True)
class Bench:
    """What models are measured by. Without a metric it is the likelihood of the trained tokens of `data`."""

    data: Path
    metric: Metric | None = None
    questions: int = 200
    max_new_tokens: int = 128
    allow_worse: bool = False

    @property
    def measure(self) -> str:
        """What a score is called."""
        return LIKELIHOOD if self.metric is None else self.metric.method_name()

    def parents(self, named: Sequence[tuple[str, str, str | None]]) -> dict[str, float]:
        """The score of each model, by the name that a user gave it."""
        return {name: self.score(source, adapter) for name, source, adapter in named}

    def judge(self, folder: Path, scores: Mapping[str, float]) -> dict[str, Any]:
        """What a merged model in `folder` is worth. Raises GateError where it is worse than its best parent."""
        merged, best = self.score(str(folder), None), max(scores.values())
        found = {
            "measure": self.measure,
            "data": str(self.data),
            "parents": dict(scores),
            "merged": merged,
            "expected": math.fsum(scores.values()) / len(scores),
            "improvement": merged - best,
            "diversity": best - min(scores.values()),
        }
        # What rounding to the type of the file may do to a score is no harm.
        if merged < best - 1e-9 and not self.allow_worse:
            winner = max(scores, key=lambda name: scores[name])
            raise GateError(
                f"the merged model has {found['measure']} {merged:.4f} on {self.data}, and its parent {winner} has "
                f"{best:.4f} (the mean of the parents is {found['expected']:.4f}); nothing was kept",
                allowed="a result that is not worse than its best parent",
                do="try other weights or another method, or keep it anyhow with --allow-worse",
            )
        return found

    def score(self, source: str, adapter: str | None) -> float:
        """How good one model is on the data; higher is better."""
        opened = open_named(source, adapter=adapter)
        # The base of an adapter or a run reads rows as its result does; the folder tells how.
        recipe = validate(FinetuneRecipe, {"model": opened.model.source, "data": {"train": str(self.data)},
                                           "evaluation": {"fraction": 0.0}})  # fmt: skip
        if self.metric is None:
            _, trees = held_out_of(recipe, data=self.data)
            loss, _ = mean_loss(opened.model, recipe.objective, trees)
            return math.exp(-loss)
        asked_of = recipe.model_copy(update={"data": recipe.data.model_copy(update={"evaluation": str(self.data)})})
        prepared, _ = held_out_of(asked_of)
        asked = questions(prepared, self.questions, seed=recipe.seed, max_new_tokens=self.max_new_tokens)
        answers = answered(opened.model, prepared, asked, max_new_tokens=self.max_new_tokens)
        return self.metric.of(answers, [one.references for one in asked])
