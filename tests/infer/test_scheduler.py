"""The scheduler with texts of numbers and no model: every place is read once, in order, into a page of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from luthier.core.errors import RecipeError
from luthier.infer.continuation import Continuation
from luthier.infer.request import Request
from luthier.infer.scheduler import Part, Room, Scheduler
from luthier.model.speaker import Sampling


def continuation(number: int, prompt: list[int], *, says: int, adapter: str = "", root: int = 0) -> Continuation:
    """One that says `says` tokens."""
    request = Request(prompt=np.array(prompt, np.int32), sampling=Sampling(max_new_tokens=says))
    return Continuation(number, 0, request, limit=says, adapter=adapter, root_tokens=root)


LONGEST = 3 + 12 + 8
"""Places of the longest text of the test below: a root, a prompt and an answer."""


class Memory:
    """What is written in each slot of each page of each store, and what a text must find there."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], tuple[object, ...]] = {}
        self.adapters: dict[int, str] = {}

    def slot(self, each: Continuation, store: int, place: int) -> tuple[int, int]:
        size, table = self.scheduler.room.page, each.tables[store]
        assert place // size - table.passed >= 0
        return store, table.pages[place // size - table.passed] * size + place % size

    def read(self, part: Part) -> None:
        each = part.continuation
        for store, window in enumerate(self.scheduler.stores.windows):
            for place in range(part.start, part.stop):
                self.slots[self.slot(each, store, place)] = self.expected(each, place)
            # All that it sees is there: its own, and nobody else's.
            for place in range(0 if window is None else max(0, part.start + 1 - window), part.stop):
                assert self.slots[self.slot(each, store, place)] == self.expected(each, place)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        size = self.scheduler.room.page
        for store, (page, to) in enumerate(copies):
            for within in range(size):
                self.slots[store, to * size + within] = self.slots.get((store, page * size + within), ())

    def expected(self, each: Continuation, place: int) -> tuple[object, ...]:
        return (self.adapters[each.number], *each.tokens(0, place + 1).tolist())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_text_sees_its_own_keys_and_all_come_to_an_end(data: st.DataObject) -> None:
    """Breaks when a page is shared that should not be, a place is skipped, or a text starves."""
    page = data.draw(st.integers(1, 5))
    windows = data.draw(st.sampled_from([[None], [None, 1], [None, 9, 2]]) | st.lists(st.integers(1, 12), min_size=1))
    windows = sorted(set(windows), key=lambda each: (each is not None, -(each or 0)))
    room = Room(
        tokens=data.draw(st.integers(24 if windows[0] is None else 6, 60)), page=page,
        pass_tokens=data.draw(st.integers(1, 30)), rows=data.draw(st.integers(1, 6)),
    )  # fmt: skip
    assume(room.holds(LONGEST, windows[0]))
    scheduler = Scheduler(room, windows=windows)
    memory = Memory(scheduler)
    # Few symbols, so that many begin alike.
    prompts = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=7))
    alive: list[Continuation] = []
    waiting = []
    for number, prompt in enumerate(prompts):
        adapter = data.draw(st.sampled_from(["", "a"]))
        root = 3 if adapter == "a" else 0
        memory.adapters[number] = adapter
        waiting.append(continuation(number, prompt, says=data.draw(st.integers(1, 8)), adapter=adapter, root=root))
    draw = random.Random(data.draw(st.integers(0, 99)))
    for _ in range(2000):
        if waiting and draw.random() < 0.3:
            alive.append(waiting.pop())
            scheduler.waiting.append(alive[-1])
        parts = scheduler.plan()
        assert sum(part.stop - part.start for part in parts) <= room.pass_tokens
        assert len({id(part.continuation) for part in parts}) == len(parts) and len(scheduler.running) <= room.rows
        assert bool(parts) == bool(alive)
        for part in parts:
            assert part.start == part.continuation.done < part.stop <= part.continuation.length
            for table, window in zip(part.continuation.tables, windows, strict=True):
                assert len(table.pages) * page <= room.held(LONGEST, window)
        for part in parts:
            memory.read(part)
        for part in parts:
            scheduler.read(part)
        for part in parts:
            each = part.continuation
            if part.speaks:
                twin = continuation(each.number, each.request.prompt.tolist(), says=each.limit, root=each.root_tokens,
                                    adapter=memory.adapters[each.number])  # fmt: skip
                twin.said.extend(each.said)
                if draw.random() < 0.1:
                    memory.copy(scheduler.fork(each, twin))
                    twin.said.append(draw.randrange(2))
                    alive.append(twin)
                    if len(twin.said) == twin.limit:
                        scheduler.remove(twin)
                        alive.remove(twin)
                each.said.append(draw.randrange(2))
                if len(each.said) == each.limit:
                    scheduler.remove(each)
                    alive.remove(each)
        if alive and draw.random() < 0.02:
            gone = alive.pop(draw.randrange(len(alive)))
            scheduler.remove(gone)
        if not alive and not waiting:
            break
    assert not alive and not waiting and not scheduler.running and not scheduler.waiting
    for pages, window in zip(scheduler.stores.pages, windows, strict=True):
        assert pages.held == 0 and pages.available == pages.count == room.pages_of(window)


def test_whoever_speaks_goes_on_while_a_long_prompt_is_read_in_pieces() -> None:
    """Breaks when a long prompt makes others wait, or takes more than a pass."""
    scheduler = Scheduler(Room(tokens=200, page=4, pass_tokens=10))
    speaker = continuation(0, [1, 2], says=50)
    scheduler.waiting.append(speaker)
    for part in scheduler.plan():
        scheduler.read(part)
    speaker.said.append(3)
    scheduler.waiting.append(continuation(1, list(range(40)), says=1))
    pieces = []
    for _ in range(5):
        parts = scheduler.plan()
        assert parts[0].continuation is speaker and parts[0].stop - parts[0].start == 1
        pieces += [part.stop - part.start for part in parts[1:]]
        for part in parts:
            scheduler.read(part)
        speaker.said.append(3)
    assert pieces == [9, 9, 9, 9, 4]


def test_what_no_window_sees_any_more_is_free_while_a_text_grows() -> None:
    """Breaks when a text that is longer than all room takes more than its windows, or cannot begin."""
    room = Room(tokens=24, page=4, pass_tokens=512)
    scheduler = Scheduler(room, windows=(10,))
    (pages,) = scheduler.stores.pages
    assert Room(tokens=1).held(10**6, 4096) == 4096 + 512 + 16 and Room(tokens=1).held(100, 4096) == 112
    assert room.holds(10**6, 10) and not Room(tokens=12, page=4).holds(10**6, 10) and not room.holds(25, None)
    text = continuation(0, list(range(100)), says=60)
    scheduler.waiting.append(text)
    held, pieces = [], []
    while len(text.said) < 60:
        (part,) = scheduler.plan()
        held.append(pages.held)
        pieces.append(part.stop - part.start)
        scheduler.read(part)
        text.said.extend([7] * part.speaks)
    assert max(held) <= room.pages and max(held[-59:]) <= 4 and pieces[0] == 12
    assert text.done == 159 and text.tables[0].passed == (159 + 1 - 10) // 4
    scheduler.remove(text)
    assert pages.held == 0
    # Its last pages are found by one that begins with all of it, though its first ones are not there any more.
    again = continuation(1, [*range(100), *[7] * 60], says=1)
    scheduler.waiting.append(again)
    (part,) = scheduler.plan()
    assert part.start == 156 and again.tables[0].stop == 40


def test_a_room_without_a_page_is_refused() -> None:
    """Breaks when nothing can ever be read and nobody says so."""
    with pytest.raises(RecipeError, match="room.rows is 0"):
        Room(tokens=16, rows=0)
