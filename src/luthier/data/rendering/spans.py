"""Where tokens stand in a text, as arrays: spans that cover it, whose words each token is, places to cut.

A span is a pair of character offsets, as the tokenizer gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.forest import Floats, Ints
from luthier.data.rendering.rendered import TOKEN_ROLES
from luthier.data.rendering.shown import Shown
from luthier.data.rendering.turns import View

_ROLES: Mapping[str, int] = {name: number for number, name in enumerate(TOKEN_ROLES)}


def alike(one: Ints, two: Ints) -> bool:
    """Whether the ids are the same: what `np.array_equal` says, in a third of its time for the length of a row."""
    if one.dtype != two.dtype:
        return bool(np.array_equal(one, two))
    return len(one) == len(two) and one.tobytes() == two.tobytes()


def lead(tokens: Ints, bos: int) -> int:
    """How many BOS stand at the start."""
    count = 0
    while count < len(tokens) and int(tokens[count]) == bos:
        count += 1
    return count


def leading(tokens: Ints, spans: Ints, text: str, bos: int) -> tuple[int, int]:
    """The [start, stop) of the BOS at the start, before which a template may write white space; empty without one."""
    start = 0
    while start < len(tokens) and text[int(spans[start, 0]) : int(spans[start, 1])].isspace():
        start += 1
    count = lead(tokens[start:], bos)
    return (start, start + count) if count else (0, 0)


def whole_character(spans: Ints, index: int) -> int:
    """The last place up to `index` where no character is cut in two."""
    while index > 0 and spans[index, 0] < spans[index - 1, 1]:
        index -= 1
    return index


def role_of_each(spans: Ints, view: View, shown: Sequence[Shown]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The role (an index of TOKEN_ROLES) of each token."""
    names = [_ROLES[shown[message].role] for _, message in view.bounds]
    roles = np.array([*names, names[-1]], np.uint8)[_owners(spans, view)]
    # A token that no character stands for, such as an added BOS, is nobody's.
    roles[spans[:, 0] == spans[:, 1]] = _ROLES["template"]
    return roles


def roles_of(view: View, shown: Sequence[Shown]) -> bytes:
    """The role (an index of TOKEN_ROLES) of each of the view's bounds."""
    return bytes([_ROLES[shown[message].role] for _, message in view.bounds])


def message_weights(spans: Ints, view: View, shown: Sequence[Shown]) -> Floats:
    """The loss weight of each token where every message is trained."""
    values = [shown[message].weight if shown[message].role == "assistant" else None for _, message in view.bounds]
    weights = [1.0 if value is None else value for value in values]
    return np.array([*weights, weights[-1]], np.float32)[_owners(spans, view)]


def _owners(spans: Ints, view: View) -> NDArray[np.int64]:
    """For each token the place of its message among the bounds; one more, which is as the last, behind them all."""
    return np.array([end for end, _ in view.bounds], np.int32).searchsorted(spans[:, 0], side="right")
