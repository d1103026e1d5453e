"""Metrics: how good generated answers are, beside what was expected.

The contract: a metric is a pure function of texts. It sees the answer to each question and one or more references for
it, and gives one number for all of them, higher for better. It never sees a model, tokens or a recipe; who asked the
questions and how is the recipe's to say. What needs no answers (the likelihood of held-out rows) is no metric.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

from luthier.core.errors import DataError
from luthier.core.knobs import Method


class Metric(Method):
    """A way to judge answers."""

    perfect: ClassVar[float] = 1.0
    """What answers get that are references themselves; 0 is the least there is."""

    @final
    def of(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """How good the answers are. Raises DataError when there is none, or one of them has no reference."""
        if not answers:
            raise DataError("no answer was given", allowed="at least one", do="hold rows out: evaluation.fraction")
        if len(answers) != len(references):
            raise DataError(f"{len(answers)} answers, {len(references)} lists of references", allowed="one for each")
        if without := [index for index, known in enumerate(references) if not known]:
            raise DataError(f"question {without[0]} has no reference", allowed="at least one for each question")
        return self.score(answers, references)

    @abstractmethod
    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The number for all answers together; each has at least one reference."""

    def require(self) -> None:
        """Raise MissingError now when something is not installed that `score` needs."""
