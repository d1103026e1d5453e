"""Pages against a list that remembers everything: who holds what, what can be found, and what goes first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.infer.pages import Pages, first_name, next_name

TOKENS = np.arange(4, dtype=np.int32)


def test_a_page_is_free_when_its_last_holder_gives_it_back() -> None:
    """Breaks when a shared page is given away while somebody reads it."""
    pages = Pages(2, 4)
    one, two = pages.take(), pages.take()
    assert {one, two} == {0, 1} and pages.take() is None
    assert one is not None
    pages.hold(one)
    pages.give_back([one])
    assert pages.take() is None and pages.holders(one) == 1
    pages.give_back([one])
    assert pages.take() == one


def test_what_nobody_holds_is_found_until_room_is_needed_and_the_end_of_a_text_goes_first() -> None:
    """Breaks when a kept page is lost early, found after it was given away, or a trunk goes before its leaves."""
    pages = Pages(3, 4)
    names = [first_name("a")]
    held = []
    for _ in range(3):
        names.append(next_name(names[-1], TOKENS))
        page = pages.take()
        assert page is not None
        pages.name(page, names[-1])
        held.append(page)
    pages.give_back(held)
    assert pages.available == pages.kept == 3 and pages.held == 0
    assert pages.take() == held[2] and pages.find(names[3]) is None
    assert pages.find(names[1]) == held[0] and pages.holders(held[0]) == 1
    assert pages.take() == held[1] and pages.take() is None


def test_names_differ_by_adapter_and_by_every_token_before() -> None:
    """Breaks when keys of another adapter, or behind other tokens, are taken for one's own."""
    start = first_name("")
    assert start != first_name("a") and first_name(("a", 1)) != first_name(("a", 2))
    assert next_name(start, TOKENS) != next_name(first_name("a"), TOKENS)
    assert next_name(start, TOKENS) != next_name(start, TOKENS[::-1])
    once = next_name(start, TOKENS)
    assert next_name(once, TOKENS) != once


def test_after_forgetting_nothing_is_found_and_what_is_held_stays() -> None:
    """Breaks when keys of old weights begin a new text."""
    pages = Pages(2, 4)
    kept, held = pages.take(), pages.take()
    assert kept is not None and held is not None
    name = next_name(first_name(""), TOKENS)
    pages.name(kept, name)
    pages.give_back([kept])
    pages.forget()
    assert pages.find(name) is None and pages.available == 1 and pages.holders(held) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "back", "name", "find", "forget"]), st.integers(0, 7))))
def test_no_page_is_lost_or_held_twice_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """Breaks when the sum of free, kept and held pages changes, or a holder's page is given to another."""
    pages = Pages(4, 4)
    holds: list[int] = []
    for what, number in steps:
        mine = holds[number % len(holds)] if holds else None
        if what == "take":
            page = pages.take()
            assert (page is None) == (len(set(holds)) == 4)
            if page is not None:
                assert page not in holds
                holds.append(page)
        elif what == "find":
            page = pages.find(bytes([number]))
            holds += [] if page is None else [page]
        elif what == "forget":
            pages.forget()
        elif mine is not None and what == "hold":
            pages.hold(mine)
            holds.append(mine)
        elif mine is not None and what == "back":
            pages.give_back([mine])
            holds.remove(mine)
        elif mine is not None and what == "name":
            pages.name(mine, bytes([number]))
        assert pages.held == len(set(holds)) and pages.available == 4 - pages.held
        assert all(pages.holders(page) == holds.count(page) for page in range(4))
