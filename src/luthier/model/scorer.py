"""Models as judges: what a reward may ask of a model, in texts.

The protocols live here, below the families, so that a judge or a learned reward knows neither engine nor tokenizer, and
a test can plant a bias that no real model has in such purity. A prompt may end in the beginning of an answer (`begun`),
which is how a rationale is said first and a verdict scored behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.data.conversation import Message


@dataclass(frozen=True)
class Begun:
    """Messages to answer, and how the answer begins."""

    messages: tuple[Message, ...]
    begun: str = ""


@dataclass(frozen=True)
class Said:
    """How a model went on, and why it ended: "stop" or "length"."""

    text: str
    ended: str = "stop"


@dataclass(frozen=True)
class Likely:
    """The log-probability of a whole continuation, and how many tokens it is."""

    log_prob: float
    tokens: int = 1


@dataclass(frozen=True)
class NoRoom:
    """A question that is too long for a model: `who` that is, and what is known of both lengths (`told`).

    It is an answer and no error, so that one long question takes no other of its batch with it.
    """

    who: str
    told: str

    @property
    def received(self) -> str:
        """What happened, in the same words for every question."""
        return f"{self.who} has no room for the question"

    @property
    def do(self) -> str:
        """What helps."""
        return "let answers be shorter (max_new_tokens), or name a model with a longer context"


class TextModel(Protocol):
    """Goes on with texts, and says how likely continuations of them are."""

    def go_on(
        self, asked: Sequence[Begun], *, most_tokens: int, temperature: float, seed: int
    ) -> Sequence[Said | NoRoom]:
        """One continuation of each that it has room for."""

    def likely(self, asked: Sequence[Begun], continuations: Sequence[str]) -> Sequence[Sequence[Likely] | NoRoom]:
        """For each, how likely every one of the continuations is, under the model itself (temperature 1)."""


class TextScorer(Protocol):
    """Says of answered conversations how good they are: a reward model."""

    def scores(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """One number for each; its last message is the answer."""
