"""Drafts of what comes next: what makes them, and the way that needs no second model.

Idea: a draft is a guess. The model looks at the whole of it in one pass, and `sampler.choose_drafted` takes the part
that is right: the text is the one that is drawn without drafts, whoever makes them. Here they come from the text:
answers repeat their prompts (names, code, quotations) and themselves, and where the last n tokens stood before, what
followed them then is a draft of what follows now. draft_model.py asks a smaller model instead.
Source: prompt lookup: Saxena, 2023 (github.com/apoorvumang/prompt-lookup-decoding); acceptance: Leviathan et al.,
    arXiv 2211.17192.
Cost: one look into a table for each n and token; a wrong draft costs the rows of a pass that nobody reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

from luthier.data.forest import Ints
from luthier.infer.request import Request


class Drafter(ABC):
    """Makes the drafts of one continuation."""

    @abstractmethod
    def said(self, token: int) -> None:
        """The text has got a token more."""

    @abstractmethod
    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next; none where nothing is worth a look."""


Drafting = Callable[[Request, int], Drafter]
"""What makes the drafter of a continuation, given its request and the number that it draws with."""


def from_the_text(request: Request, draw: int) -> Drafter:
    """Drafts by what the text has said before."""
    return Lookup(request.prompt)


@final
class Lookup(Drafter):
    """The text of one continuation with the places of its n-grams, `longest` down to `shortest` tokens long."""

    def __init__(self, prompt: Sequence[int] | Ints, *, longest: int = 3, shortest: int = 2) -> None:
        self._tokens: list[int] = []
        self._sizes = range(longest, shortest - 1, -1)
        self._follows: dict[tuple[int, ...], int] = {}
        for token in prompt:
            self.said(int(token))

    def said(self, token: int) -> None:
        # An n-gram is entered when it is known what follows it; the latest place counts.
        for size in self._sizes:
            if size <= len(self._tokens):
                self._follows[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the last ones of the text where they stood before; none if they did not.

        The longest n-gram decides. A draft that reaches the end of the text goes on with itself: what repeats, repeats.
        """
        for size in self._sizes:
            start = self._follows.get(tuple(self._tokens[-size:])) if size <= len(self._tokens) else None
            if start is not None:
                known = len(self._tokens) - start
                return [self._tokens[start + index % known] for index in range(count)]
        return []
