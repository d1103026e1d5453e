"""What the engine is asked for, and what it tells, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, final

import numpy as np

from luthier.core.errors import DataError, LuthierError, RecipeError
from luthier.data.forest import Ints
from luthier.infer.guides import Guide
from luthier.model.speaker import Likely, Sampling

Ended = Literal["", "stop", "length", "cancelled", "failed"]
"""Why a continuation is over; empty while it goes on."""
MOST_DRAFTED: Final = 64
"""Tokens that may be looked ahead."""


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued, `choices` times, by the base with `adapter`.

    `adapter` is the name of an attachment, or of a mix of them; empty takes all that are switched on. Choice i of a
    request draws with a generator that knows the seed and i alone, so its draws do not depend on what else runs. Of
    `best_of` continuations the `choices` likeliest are told, all at once at their end. `beams` above 1 searches for the
    likeliest continuations instead of drawing them. `guide` makes what bounds each choice to a grammar. Where the text
    repeats itself or its prompt, up to `drafts` tokens are looked at in one pass; the text is the same without.

    Draws are one thing, and what a product rounds to another: a processor multiplies many rows in another order than
    few, so that company may turn a token that nearly ties. A `batch_invariant` request is computed in passes whose
    shapes depend on it alone, and its text is the same to the bit in any company; reader.py says how, and what it
    costs. It is drafted where a row is the same in any company of few.
    """

    prompt: Ints
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str = ""
    choices: int = 1
    best_of: int = 0
    beams: int = 1
    guide: Callable[[], Guide] | None = None
    drafts: int = 0
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        # A list of ids is as good.
        object.__setattr__(self, "prompt", _ids(self.prompt))
        limits = {
            "choices": (self.choices >= 1, "at least 1"),
            "best_of": (self.best_of == 0 or self.best_of >= self.choices, f"0 (off) or {self.choices} and more"),
            "beams": (self.beams == 1 or self.beams >= self.choices, f"1 (off) or {self.choices} and more"),
            "drafts": (0 <= self.drafts <= MOST_DRAFTED, f"0 (off) to {MOST_DRAFTED}"),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise RecipeError(f"{name} is {getattr(self, name)}", allowed=allowed)


def _ids(prompt: object) -> Ints:
    try:
        given = np.asarray(prompt)
    except ValueError:
        given = np.zeros((1, 0))
    whole = given.astype(np.int32) if given.ndim == 1 and given.dtype.kind in "iuf" else None
    if whole is None or not np.array_equal(whole, given):
        raise DataError(
            f"a prompt that is {type(prompt).__name__}: {prompt!r:.60}",
            allowed="token ids, one after another",
            do="make them of a text with: Opened.prompt(text)",
        )
    return whole


@final
@dataclass(frozen=True)
class Said:
    """A token, its log-probability under the model itself, and the likeliest ones in its place if asked for."""

    token: int
    log_prob: float
    likeliest: Likely = ()


@final
@dataclass(frozen=True)
class News:
    """What a step made of one choice of one request: new tokens, and why it is over if it is.

    `prompt` comes once for each request that asked for it, with its first news: what is told of each token of the
    prompt but the first, of which nothing is known. `failure` says why one has failed that nobody has cancelled.
    """

    request: int
    choice: int
    said: tuple[Said, ...] = ()
    ended: Ended = ""
    prompt: tuple[Said, ...] | None = None
    failure: LuthierError | None = None
