"""Drafts against brute force, and what they bring in a text that repeats itself."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as some

from luthier.infer.drafts import Lookup
from luthier.infer.sampler import Chooser, choose_drafted
from luthier.model.speaker import Sampling


def by_search(tokens: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """What followed the last place where the end of the text stood before."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if size <= len(tokens) and tokens[start : start + size] == tokens[len(tokens) - size :]:
                grown = list(tokens)
                while len(grown) < len(tokens) + count:
                    grown.append(grown[start + size + len(grown) - len(tokens)])
                return grown[len(tokens) :]
    return []


@given(
    prompt=some.lists(some.integers(0, 2), max_size=20),
    said=some.lists(some.integers(0, 2), max_size=10),
    longest=some.integers(1, 4),
    shortest=some.integers(1, 4),
    count=some.integers(0, 6),
)
def test_a_draft_is_what_followed_the_latest_longest_match(
    prompt: list[int], said: list[int], longest: int, shortest: int, count: int
) -> None:
    """Breaks when an older or a shorter match wins, the end matches itself, or said tokens are not entered."""
    lookup = Lookup(np.array(prompt, np.int32), longest=longest, shortest=shortest)
    for token in said:
        lookup.said(token)
    assert lookup.propose(count) == by_search([*prompt, *said], longest, shortest, count)


def test_a_text_that_repeats_itself_needs_few_passes() -> None:
    """Breaks when drafts are never right where they should be: a model that counts in a circle of seven."""
    table = torch.full((7, 7), -5.0)
    table[torch.arange(7), (torch.arange(7) + 1) % 7] = 5.0
    chooser, lookup = Chooser(Sampling(), np.array([6], np.int32)), Lookup([6])
    passes, last = 0, 6
    while len(chooser.said) < 70:
        draft = lookup.propose(5)
        passes += 1
        for said in choose_drafted(chooser, table[[last, *draft]], draft):
            lookup.said(said.token)
            last = said.token
    assert chooser.said[:70] == [place % 7 for place in range(70)]
    # The first round is new (9 tokens, until two of them stood before); then six tokens a pass.
    assert passes <= 9 + 12
