"""What engines tell of tokens, and what of it is believed.

Idea: an answer that does not fit what was asked (other tokens, more than allowed, a number for each but one) is a
RemoteError, never cut to fit: it would be trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from luthier.data.forest import Ints
from luthier.infer.wire import RemoteError
from luthier.model.speaker import Likely, Sampling, Spoken

ROUNDING: Final = 1e-3
"""A log-probability may be this much above 0."""


@final
@dataclass(frozen=True)
class Told:
    """Tokens and their log-probabilities as an engine tells them, before anybody has looked at them."""

    tokens: list[int]
    log_probs: list[Any]
    ended: str = ""
    tops: Sequence[Likely] = ()

    def numbers(self, where: str) -> list[float]:
        """The log-probabilities. Raises RemoteError where they are none, or not one for each token."""
        found = self.log_probs
        fits = all(isinstance(each, (int, float)) and math.isfinite(each) and each < ROUNDING for each in found)
        if not fits or len(found) != len(self.tokens):
            raise RemoteError(
                f"{where} tells {len(found)} log-probabilities of {len(self.tokens)} tokens, first {found[:3]!r:.80}",
                allowed="a number of at most 0 for each",
            )
        return [float(each) for each in found]

    def scores(self, where: str, tokens: Ints) -> list[float]:
        """What is told of a text whose first token nothing is known of. Raises RemoteError when it is another text."""
        if self.tokens != tokens.tolist():
            raise RemoteError(
                f"{where} was given {len(tokens)} tokens and tells of {len(self.tokens)}, or of others",
                do="look whether it cuts prompts or puts something before them",
            )
        return Told(self.tokens[1:], self.log_probs[1:]).numbers(where)

    def spoken(self, where: str, sampling: Sampling) -> Spoken:
        """What was said; it ends at the first stop token, as ours does. Raises RemoteError for what was not asked."""
        most, numbers = sampling.max_new_tokens, self.numbers(where)
        if not 0 < len(numbers) <= most or (self.ended == "length" and len(numbers) < most):
            raise RemoteError(f"{where} said {len(numbers)} tokens, which ended by {self.ended!r:.40}",
                              allowed=f"1 to {most} tokens, and {most} where they end by length")  # fmt: skip
        stops = [place for place, token in enumerate(self.tokens) if token in sampling.stop_ids]
        end = next((place + 1 for place in stops if place >= sampling.min_new_tokens), len(numbers))
        stopped = self.tokens[end - 1] in sampling.stop_ids or self.ended != "length"
        tops = tuple(self.tops[:end]) if sampling.likeliest else ()
        return Spoken(np.array(self.tokens[:end], np.int32), numbers[:end], "stop" if stopped else "length", tops)
