"""One choice of a request on its way: what it has read and said, and where its keys lie."""

from __future__ import annotations

from collections.abc import Hashable
from typing import final

import numpy as np

from luthier.data.forest import Ints
from luthier.infer.drafts import Drafter
from luthier.infer.pages import Name, Table, first_name
from luthier.infer.request import Request, Said
from luthier.infer.sampler import Chooser
from luthier.infer.text import Decode, TextStream
from luthier.kernels.backend import SPEAKS


@final
class Continuation:
    """`number` and `choice` say whose it is; places are those of a learned root, the prompt and the answer.

    `tables` say where the keys of its first `done` places lie, in each store of pages, once it runs; `names` are those
    of its first full pages. `limit` is how many tokens it may say. Where it has more than `short` places, if that is
    said, all of them are read in another way, and it is read again when it comes to that.
    """

    def __init__(
        self,
        number: int,
        choice: int,
        request: Request,
        *,
        draw: int | None = None,
        limit: int,
        adapter: Hashable = "",
        root_tokens: int = 0,
        decode: Decode | None = None,
        drafter: Drafter | None = None,
        short: int | None = None,
    ) -> None:
        self.number = number
        self.choice = choice
        self.request = request
        self.limit = limit
        self.root_tokens = root_tokens
        guide = None if request.guide is None else request.guide()
        self.chooser = Chooser(
            request.sampling, request.prompt, choice=choice if draw is None else draw, guide=guide
        )
        stops = request.sampling.stop
        self._text = TextStream(decode, stops) if decode is not None and stops else None
        self._drafter = drafter
        self.tables: list[Table]
        self.names: list[Name]
        self.done: int
        self.prompt_said: list[Said] = []
        self.passed_over = 0
        """Steps in a row in which others had their turn."""
        self._short = short
        # Keys that were read in passes of their own are others than those that were not.
        self._kind: Hashable = (adapter, "invariant") if request.batch_invariant else adapter
        self.begin()

    def begin(self) -> None:
        """Nothing of it is read, or held."""
        self.tables, self.names, self.done = [], [], 0
        self.is_long = self._short is not None and self.length > self._short
        self._first = first_name((self._kind, "long") if self.is_long else self._kind)

    def follow(self, source: Continuation, tables: list[Table]) -> None:
        """It has read what `source` has read, and `tables` hold it."""
        self.tables, self.names, self.done = tables, list(source.names), source.done
        self.is_long, self._first = source.is_long, source._first

    @property
    def outgrown(self) -> bool:
        """Whether it has become too long for the way in which it was read."""
        return self._short is not None and not self.is_long and self.length > self._short

    @property
    def said(self) -> list[int]:
        """The tokens of its answer so far."""
        return self.chooser.said

    @property
    def length(self) -> int:
        """Places that are known, whether their keys are there or not."""
        return self.prompt_stop + len(self.said)

    @property
    def prompt_stop(self) -> int:
        """The place behind its prompt."""
        return self.root_tokens + len(self.request.prompt)

    @property
    def step(self) -> int:
        """How many places it reads next where it goes token by token: one, or none. One that has read all waits."""
        behind = self.length - self.done
        again = self.request.batch_invariant and self.done >= self.prompt_stop
        return 1 if behind == 1 or (behind and again) else 0

    @property
    def met_stop_string(self) -> bool:
        """Whether its text has come to a string at which it ends."""
        return self._text is not None and self._text.stopped is not None

    def note(self, token: int) -> None:
        """A token was said, which the chooser knows already."""
        if self._text is not None:
            self._text.push(token)
        if self._drafter is not None:
            self._drafter.said(token)

    def draft(self, most: int) -> tuple[int, ...]:
        """What may come next, as its drafter has it; `most` tokens of it, and none past its end."""
        count = min(most, self.request.drafts, self.limit - len(self.said) - 1)
        if self.request.batch_invariant:
            count = min(count, SPEAKS - 1)
        if self._short is not None and not self.is_long:
            count = min(count, self._short - self.length)
        return tuple(self._drafter.propose(count)) if self._drafter is not None and count > 0 else ()

    @property
    def last_name(self) -> Name:
        """What the name of its next full page depends on."""
        return self.names[-1] if self.names else self._first

    def tokens(self, start: int, stop: int) -> Ints:
        """The tokens at places `start` to `stop`; those of a learned root are -1."""
        root, prompt = self.root_tokens, self.request.prompt
        behind = root + len(prompt)
        if start >= behind:
            # Each step of each text comes this way.
            return np.array(self.said[start - behind : stop - behind], dtype=np.int32)
        parts = [np.full(max(0, min(stop, root) - start), -1, np.int32)]
        parts.append(prompt[max(0, start - root) : max(0, stop - root)].astype(np.int32))
        parts.append(np.array(self.said[max(0, start - behind) : max(0, stop - behind)], dtype=np.int32))
        return np.concatenate(parts)

    @property
    def shows_prompt(self) -> bool:
        """Whether all that is read of its prompt goes to the end of the model; of a choice that tells nothing of it too
        where it is to be read as the first one reads it."""
        return self.wants_prompt or (self.request.batch_invariant and self.request.sampling.prompt_log_probs)

    @property
    def wants_prompt(self) -> bool:
        """Whether something is still to be told of tokens of its prompt."""
        asked = self.request.sampling.prompt_log_probs and self.choice == 0
        return asked and len(self.prompt_said) < len(self.request.prompt) - 1
