"""What is asked of an engine, one request at a time: its choices on their way, and what is told of them and when.

Idea: most news are told as they come. Of a request that wants the best of several they are held back until the last of
them is over; the likeliest are then told as choices 0, 1 and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from luthier.infer.beams import Search
from luthier.infer.continuation import Continuation
from luthier.infer.request import News, Request
from luthier.model.speaker import Spoken


@final
@dataclass
class Asked:
    """A request on its way: its choices, those that wait for the first to have read the prompt, what is held back."""

    request: Request
    choices: list[Continuation]
    followers: list[Continuation] = field(default_factory=list)
    search: Search | None = None
    open: set[int] = field(default_factory=set)
    told: bool = False
    held: dict[int, list[News]] = field(default_factory=dict)

    def passes(self, news: News) -> bool:
        """Whether news of it are told now; else they are held back."""
        if not self.request.best_of:
            return True
        self.held.setdefault(news.choice, []).append(news)
        return False

    def best(self, number: int) -> list[News]:
        """Of all that were made the likeliest, by the mean log-probability of a token, as choices 0, 1 and so on."""

        def mean(choice: int) -> float:
            log_probs = self.choices[choice].chooser.log_probs
            return sum(log_probs) / max(1, len(log_probs))

        found = []
        best = sorted(self.held, key=lambda choice: (-mean(choice), choice))[: self.request.choices]
        for place, choice in enumerate(best):
            held = self.held[choice]
            said = tuple(one for news in held for one in news.said)
            found.append(News(number, place, said, held[-1].ended, failure=held[-1].failure))
        return found


@final
@dataclass(frozen=True)
class Turn:
    """A continuation that may speak: row `row` of the logits of a pass is what comes after its text, and the next ones
    what comes after each token of its draft."""

    continuation: Continuation
    passed: Float[Tensor, "n V"]
    row: int
    draft: tuple[int, ...] = ()

    @property
    def logits(self) -> Float[Tensor, "d V"]:
        """Its own rows."""
        return self.passed[self.row : self.row + 1 + len(self.draft)]


def as_spoken(told: Sequence[News]) -> Spoken:
    """All that was told of a choice, as one."""
    said = [each for news in told for each in news.said]
    return Spoken(
        np.array([each.token for each in said], dtype=np.int32),
        [each.log_prob for each in said],
        told[-1].ended,
        tuple(each.likeliest for each in said if each.likeliest),
    )
