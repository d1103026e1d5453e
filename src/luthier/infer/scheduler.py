"""The scheduler: which tokens of which continuations the next pass reads, and in which pages their keys will lie.

Idea: whoever is speaking goes on, a token each; what is left of a pass goes to prompts, in pieces, oldest first; then
new ones come in while there are pages for all of their prompt. Nobody waits for others to end. When pages run out, the
one that came last gives all of its own back and reads again later; most of it is then still there, by name.
A prompt whose beginning another one is just about to read waits for it, and then finds it there.
What is to be the same in any company is read in pieces that depend on its own text alone: its prompt in pieces that end
at every so manyth place, then token by token, even where it was put back and reads its own words. It begins with pages
that others have read in the very same pieces, and no others.
Where long texts are read otherwise than short ones, one that becomes long gives its pages back and is read again.
Of layers that see no further back than a window, a text holds the pages that its next token may see; the others are
free while it grows (stores.py).
Source: continuous batching: Yu et al., OSDI 2022 (Orca); chunked prefill: Agrawal et al., arXiv 2308.16369; preemption
    by recomputation: Kwon et al., arXiv 2309.06180, section 4.5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.infer.continuation import Continuation
from luthier.infer.pages import Name, next_name
from luthier.infer.stores import Stores

PIECE: Final = 128
"""Places of a batch-invariant prompt that are read at once: with more the weights are read less often, and with fewer
prompts that begin alike share more."""
DRAFTED_ROWS: Final = 16
"""Drafts are looked at while a pass has no more rows than these: so many cost little more than one."""


@final
@dataclass(frozen=True, kw_only=True)
class Room:
    """What generation may take: keys of `tokens` tokens in pages of `page`, `pass_tokens` a pass, `rows` at once.

    Layers that see less far back than others have so many pages at most, and no more than all rows together can use.
    """

    tokens: int
    page: int = 16
    pass_tokens: int = 512
    rows: int = 64

    def __post_init__(self) -> None:
        for name in ("tokens", "page", "pass_tokens", "rows"):
            if getattr(self, name) < 1:
                raise RecipeError(f"room.{name} is {getattr(self, name)}", allowed="at least 1")

    @property
    def pages(self) -> int:
        """How many pages there are, for the layers that see furthest back."""
        return -(-self.tokens // self.page)

    def pages_of(self, window: int | None) -> int:
        """How many pages there are for layers with such a window."""
        if window is None:
            return self.pages
        # What a token sees lies in so many pages, wherever the first begins; and each new piece may begin one more.
        seen = -(-(window + self.page - 1) // self.page)
        return min(self.pages, self.rows * (seen + 1) + -(-self.pass_tokens // self.page))

    def held(self, places: int, window: int | None) -> int:
        """How much room a text of so many places takes at most, in whole pages; with a window it is what is seen."""
        most = places if window is None else min(places, window + self.pass_tokens + self.page - 2)
        return -(-most // self.page) * self.page

    def holds(self, places: int, window: int | None) -> bool:
        """Whether a text of so many places can be read in this room, if need be in small pieces."""
        least = places if window is None else min(places, window + self.page - 1)
        return -(-least // self.page) <= self.pages


@final
@dataclass(frozen=True)
class Part:
    """Places `start` to `stop` of a continuation, to be read in a pass, the last of which hold a `draft` if any."""

    continuation: Continuation
    start: int
    stop: int
    draft: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many places it has."""
        return self.stop - self.start

    @property
    def speaks(self) -> bool:
        """Whether the next token is known after it."""
        return self.stop - len(self.draft) == self.continuation.length

    @property
    def tokens(self) -> Ints:
        """What is read."""
        known = self.continuation.tokens(self.start, self.stop - len(self.draft))
        return np.concatenate([known, np.array(self.draft, np.int32)]) if self.draft else known


@final
class Scheduler:
    """Continuations that wait and that run, and their pages: a store for each of the windows that layers have."""

    def __init__(self, room: Room, *, windows: Sequence[int | None] = (None,)) -> None:
        self.room = room
        self.stores = Stores(windows, [room.pages_of(window) for window in windows], room.page)
        self.waiting: deque[Continuation] = deque()
        self.running: list[Continuation] = []
        self.reused = 0
        self._coming: dict[Name, Continuation] = {}

    def plan(self) -> list[Part]:
        """The parts of the next pass; empty when nobody is there."""
        parts: list[Part] = []
        left = self.room.pass_tokens
        for each in [each for each in reversed(self.running) if each.outgrown]:
            self._put_back(each)
        for each in list(self.running):
            # Whoever was put back to make room for an earlier one is not there any more.
            if each in self.running and each.step and left and self._grow(each, each.done + 1):
                parts.append(Part(each, each.done, each.done + 1))
                left -= 1
        parts = self._drafted([part for part in parts if part.continuation in self.running])
        left = self.room.pass_tokens - sum(part.count for part in parts)
        for each in list(self.running):
            if each in self.running and not each.step and each.done < each.length and left > 0:
                stop = self._stop(each, left)
                if self._grow(each, stop):
                    parts.append(Part(each, each.done, stop))
                    left -= stop - each.done
        parts = [part for part in parts if part.continuation in self.running]
        while left > 0 and self.waiting:
            new = self._admitted() if len(self.running) < self.room.rows else None
            if new is not None:
                stop = self._stop(new, left)
                parts.append(Part(new, new.done, stop))
                left -= stop - new.done
            elif parts or not self.running:
                break
            else:
                # Beams that wait for one of them which has not come in: the last lets it.
                last = self.running[-1]
                self._put_back(last)
                self.waiting.rotate(-1)
        return parts

    def read(self, part: Part) -> None:
        """A part was read: its keys are there, and full pages can be found by their names."""
        part.continuation.done = part.stop - len(part.draft)
        self.found(part.continuation)

    def found(self, each: Continuation) -> None:
        """Its full pages can be found by their names from now on, and what it sees no more is free."""
        size, known = self.room.page, min(each.done, self._shared(each))
        while (len(each.names) + 1) * size <= known:
            at = len(each.names)
            name = next_name(each.last_name, each.tokens(at * size, (at + 1) * size))
            each.names.append(name)
            self.stores.name(each.tables, at, name)
            if self._coming.get(name) is each:
                del self._coming[name]
        self.stores.pass_by(each.tables, each.done)

    def fork(self, source: Continuation, twin: Continuation) -> Sequence[tuple[int, int]]:
        """Let `twin`, which says other things, run on from where `source` is: it holds the same pages.

        Returns for each store the page that is to be copied, and where to, when the last one is not full. A twin for
        which there is no room waits like any other.
        """
        runs = source in self.running and len(self.running) < self.room.rows
        found = self.stores.fork(source.tables, source.done) if runs else None
        if found is None:
            twin.begin()
            self.waiting.append(twin)
            return ()
        tables, copies = found
        twin.follow(source, tables)
        self.running.append(twin)
        return copies

    def agree(self, each: Continuation) -> None:
        """What it has said is what its draft was: the keys of all but the last token are there."""
        each.done = each.length - 1
        self.found(each)

    def remove(self, each: Continuation) -> None:
        """It is over, or was cancelled: its pages are free from now on."""
        if each in self.running:
            self.running.remove(each)
            self._empty(each)
        elif each in self.waiting:
            self.waiting.remove(each)

    def _drafted(self, parts: list[Part]) -> list[Part]:
        """Parts with drafts behind those that may have one, where there is room in the pass and in free pages."""
        left = min(DRAFTED_ROWS, self.room.pass_tokens) - len(parts)
        found = []
        for part in parts:
            each = part.continuation
            draft = each.draft(left) if left > 0 and part.speaks else ()
            if not self.stores.grow(each.tables, part.stop + len(draft)):
                draft = draft[: max(0, self.stores.reach(each.tables) - part.stop)]
            left -= len(draft)
            found.append(Part(each, part.start, part.stop + len(draft), draft) if draft else part)
        return found

    def _stop(self, each: Continuation, left: int) -> int:
        """Up to where it is read next, in a pass that has `left` places; it takes more where its pieces are its own."""
        if not each.request.batch_invariant:
            return min(each.length, each.done + self.stores.piece(each.length, left))
        piece = self._piece(each)
        return min(each.prompt_stop, (each.done // piece + 1) * piece)

    def _piece(self, each: Continuation) -> int:
        """Places of a batch-invariant prompt that are read at once."""
        return self.stores.piece(each.prompt_stop + each.limit, min(PIECE, self.room.pass_tokens))

    def _shared(self, each: Continuation) -> int:
        """How many of its places others may begin with, or it with those of others."""
        if not each.request.batch_invariant:
            return each.length
        piece = self._piece(each)
        whole = piece % self.room.page == 0 and self.stores.windows == (None,)
        return (each.prompt_stop - 1) // piece * piece if whole else 0

    def _grow(self, each: Continuation, stop: int) -> bool:
        """Give it room up to a place, others giving way if need be; False when it had to give way itself."""
        while not self.stores.grow(each.tables, stop):
            last = self.running[-1]
            self._put_back(last)
            if last is each:
                return False
        return True

    def _put_back(self, each: Continuation) -> None:
        self.running.remove(each)
        self._empty(each)
        self.waiting.appendleft(each)

    def _empty(self, each: Continuation) -> None:
        self.stores.give_back(each.tables)
        each.begin()
        for name in [name for name, owner in self._coming.items() if owner is each]:
            del self._coming[name]

    def _admitted(self) -> Continuation | None:
        """The first of the waiting that can come in, with pages for what it has to read; None when none can.

        That is all of its text, or its next piece where pages come free while it is read.
        """
        for each in list(self.waiting):
            names, known = self._known(each)
            if known < len(names) and names[known] in self._coming and not each.wants_prompt:
                # Somebody reads what it begins with; the next one may begin with something else.
                continue
            each.done = known * self.room.page
            each.tables = self.stores.find(names[:known])
            if not self.stores.admit(each.tables, whole=each.length, piece=self._stop(each, self.room.pass_tokens)):
                self._empty(each)
                return None
            self.waiting.remove(each)
            each.names = names[:known]
            self.reused += max(0, each.done - each.root_tokens)
            for name in names[known:]:
                self._coming.setdefault(name, each)
            self.running.append(each)
            return each
        return None

    def _known(self, each: Continuation) -> tuple[list[Name], int]:
        """The names of all pages it will fill by reading, and how many of the first it need not read."""
        size = self.room.page
        names: list[Name] = []
        # The last token is always read: the next one is predicted from it.
        for at in range(min(each.length - 1, self._shared(each)) // size):
            name = next_name(names[-1] if names else each.last_name, each.tokens(at * size, (at + 1) * size))
            names.append(name)
        known = 0 if each.wants_prompt else self.stores.known(names)
        if each.request.batch_invariant and known:
            known -= known % (self._piece(each) // size)
        return names, known
