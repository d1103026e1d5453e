"""The scheduler: which tokens of which continuations the next pass reads, and in which pages their keys will lie.

Idea: whoever is speaking goes on, a token each; what is left of a pass goes to prompts, in pieces, oldest first; then
new ones come in while there are pages for all of their prompt. Nobody waits for others to end. When pages run out, the
one that came last gives all of its own back and reads again later; most of it is then still there, by name.
A prompt whose beginning another one is just about to read waits for it, and then finds it there.
Where every layer of a model sees no further back than a window, a text holds the pages that its next token may see; the
others are free while it grows.
Source: continuous batching: Yu et al., OSDI 2022 (Orca); chunked prefill: Agrawal et al., arXiv 2308.16369; preemption
    by recomputation: Kwon et al., arXiv 2309.06180, section 4.5.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.infer.continuation import Continuation
from luthier.infer.pages import Name, Pages, next_name

DRAFTED_ROWS: Final = 16
"""Drafts are looked at while a pass has no more rows than these: so many cost little more than one."""


@final
@dataclass(frozen=True, kw_only=True)
class Room:
    """What generation may take: keys of `tokens` tokens in pages of `page`, `pass_tokens` a pass, `rows` at once."""

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
        """How many pages there are."""
        return -(-self.tokens // self.page)

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
    """Continuations that wait and that run, and their pages."""

    def __init__(self, room: Room, *, window: int | None = None) -> None:
        self.room = room
        self.window = window
        self.pages = Pages(room.pages, room.page)
        self.waiting: deque[Continuation] = deque()
        self.running: list[Continuation] = []
        self.reused = 0
        self._coming: dict[Name, Continuation] = {}

    def plan(self) -> list[Part]:
        """The parts of the next pass; empty when nobody is there."""
        parts: list[Part] = []
        left = self.room.pass_tokens
        for each in list(self.running):
            behind = each.length - each.done
            # Whoever was put back to make room for an earlier one is not there any more.
            if each in self.running and behind == 1 and left and self._grow(each, each.length):
                parts.append(Part(each, each.done, each.length))
                left -= 1
        parts = self._drafted([part for part in parts if part.continuation in self.running])
        left = self.room.pass_tokens - sum(part.stop - part.start for part in parts)
        for each in list(self.running):
            if each in self.running and each.length - each.done > 1 and left:
                stop = self._stop(each, left)
                if self._grow(each, stop):
                    parts.append(Part(each, each.done, stop))
                    left -= stop - each.done
        parts = [part for part in parts if part.continuation in self.running]
        while left and self.waiting:
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
        size = self.room.page
        while (len(each.names) + 1) * size <= each.done:
            at = len(each.names)
            name = next_name(each.last_name, each.tokens(at * size, (at + 1) * size))
            each.names.append(name)
            self.pages.name(each.pages[at - each.passed], name)
            if self._coming.get(name) is each:
                del self._coming[name]
        if gone := self._unseen(each.done) - each.passed:
            self.pages.give_back(each.pages[:gone])
            each.pages, each.passed = each.pages[gone:], each.passed + gone

    def fork(self, source: Continuation, twin: Continuation) -> tuple[int, int] | None:
        """Let `twin`, which says other things, run on from where `source` is: it holds the same pages.

        Returns the page that is to be copied, and where to, when the last one is not full. A twin for which there is no
        room waits like any other.
        """
        if source not in self.running:
            self.waiting.append(twin)
            return None
        whole, rest = divmod(source.done, self.room.page)
        page = self.pages.take() if rest and len(self.running) < self.room.rows else None
        if len(self.running) >= self.room.rows or (rest and page is None):
            self.waiting.append(twin)
            return None
        whole -= source.passed
        for each in source.pages[:whole]:
            self.pages.hold(each)
        twin.pages, twin.passed = source.pages[:whole], source.passed
        twin.names = list(source.names)
        twin.done = source.done
        self.running.append(twin)
        if page is None:
            return None
        twin.pages.append(page)
        return source.pages[whole], page

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
            draft = each.draft(left) if left > 0 else ()
            short = self._short(each, part.stop + len(draft))
            taken = [self.pages.take() for _ in range(min(short, self.pages.available))]
            each.pages += [page for page in taken if page is not None]
            draft = draft[: max(0, (each.passed + len(each.pages)) * self.room.page - part.stop)]
            left -= len(draft)
            found.append(Part(each, part.start, part.stop + len(draft), draft) if draft else part)
        return found

    def _unseen(self, done: int) -> int:
        """How many of its first pages a text of which `done` places are read sees no more."""
        return 0 if self.window is None else max(0, done + 1 - self.window) // self.room.page

    def _stop(self, each: Continuation, left: int) -> int:
        """Up to where it is read next, in a pass that has `left` places."""
        size, pages = self.room.page, self.room.pages
        if self.window is not None and each.length > pages * size:
            # Longer than all room: in pieces that have some beside what they see.
            left = min(left, max(1, (pages - 1) * size - self.window + 2))
        return min(each.length, each.done + left)

    def _short(self, each: Continuation, stop: int) -> int:
        """How many pages it lacks to be read up to a place."""
        return max(0, -(-stop // self.room.page) - each.passed - len(each.pages))

    def _grow(self, each: Continuation, stop: int) -> bool:
        """Give it room up to a place, others giving way if need be; False when it had to give way itself."""
        for _ in range(self._short(each, stop)):
            while (page := self.pages.take()) is None:
                last = self.running[-1]
                self._put_back(last)
                if last is each:
                    return False
            each.pages.append(page)
        return True

    def _put_back(self, each: Continuation) -> None:
        self.running.remove(each)
        self._empty(each)
        self.waiting.appendleft(each)

    def _empty(self, each: Continuation) -> None:
        self.pages.give_back(each.pages)
        each.pages, each.names, each.done, each.passed = [], [], 0, 0
        for name in [name for name, owner in self._coming.items() if owner is each]:
            del self._coming[name]

    def _admitted(self) -> Continuation | None:
        """The first of the waiting that can come in, with pages for what it has to read; None when none can.

        That is all of its text, or its next piece where pages come free while it is read.
        """
        for each in list(self.waiting):
            names, known, found, blocked = self._known(each)
            if blocked:
                # Somebody reads what it begins with; the next one may begin with something else.
                continue
            each.done = known * self.room.page
            each.pages, each.passed = found, known - len(found)
            stop = each.length if self.window is None else self._stop(each, self.room.pass_tokens)
            short = self._short(each, stop)
            if short > self.pages.available:
                self._empty(each)
                return None
            self.waiting.remove(each)
            each.pages += [page for page in (self.pages.take() for _ in range(short)) if page is not None]
            each.names = names[:known]
            self.reused += max(0, each.done - each.root_tokens)
            for name in names[known:]:
                self._coming.setdefault(name, each)
            self.running.append(each)
            return each
        return None

    def _known(self, each: Continuation) -> tuple[list[Name], int, list[int], bool]:
        """The names of all pages it will fill by reading, how many of the first it need not read, pages that hold what
        is seen of them, now held by it too, and whether another one is about to read the next."""
        size = self.room.page
        names: list[Name] = []
        # The last token is always read: the next one is predicted from it.
        for at in range((each.length - 1) // size):
            name = next_name(names[-1] if names else each.last_name, each.tokens(at * size, (at + 1) * size))
            names.append(name)
        if each.wants_prompt:
            return names, 0, [], False
        known = there = 0
        for count, name in enumerate(names, 1):
            there = there + 1 if name in self.pages else 0
            if there >= count - self._unseen(count * size):
                known = count
        if known < len(names) and names[known] in self._coming:
            return names, 0, [], True
        seen = names[self._unseen(known * size) : known]
        found = [page for page in map(self.pages.find, seen) if page is not None]
        return names, known, found, False
