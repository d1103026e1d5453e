"""Rows in C++: roles, weights, digests and the checks of rows' tokens, each in one pass over many rows.

Idea: a row has a hundred tokens, for which a call of numpy takes longer than the work, and thirty such calls a row are
most of the time that a row takes. Rows come in batches, one behind the other in the same arrays; one row is a batch of
one. What is said here is said of rows as nearly all are; of any other it is said that it is not known, and the twins
in Python look: `data/checks.py`, `data/findings.py`, `data/rendering/causal.py`.
No torch: data is looked at without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.kernels.words import Joined, NativeSpellings, compiled

_SETS: Final = 64
"""Sets of ids that are kept as bytes."""

# To compare with the name of a type makes one of these each time.
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_KINDS: Final = (_INT32, _INT32, _FLOAT32)
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Rows one behind the other: `ids` (n,), `spans` (n, 2) and, once they are known, `weights` (n,) of their tokens.

    `ends` says for each row where its tokens end.
    """

    ids: Ints
    spans: Ints
    weights: Floats
    ends: Longs

    @classmethod
    def of(cls, ids: Ints, spans: Ints, weights: Floats) -> Rows | None:
        """One row; None where its arrays do not fit each other, or are not what C++ takes."""
        arrays = ids, spans, weights
        if not len(ids) == len(weights) == len(spans) > 0 or tuple(each.dtype for each in arrays) != _KINDS:
            return None
        ends = np.array([len(ids)], np.int64)
        return cls(np.ascontiguousarray(ids), np.ascontiguousarray(spans), np.ascontiguousarray(weights), ends)


@final
@dataclass(frozen=True, slots=True)
class Turns:
    """Where the turns of rows stand, all rows one behind the other. Row r has messages up to `bound_stops[r]`, answers
    up to `answer_stops[r]`.

    Message m ends at the character `bounds[m]` and has the role `roles[m]`. Answer a begins behind its prompt, which
    has the tokens of `prompts` up to `prompt_ends[a]`, from `prompt_start` on; what it says ends at the character
    `endings[a]`, what a template writes behind that at `behinds[a]`; it has a loss weight.
    """

    bounds: Sequence[int]
    roles: bytes
    bound_stops: Sequence[int]
    prompts: Ints
    prompt_start: int
    prompt_ends: Longs
    endings: Sequence[int]
    behinds: Sequence[int]
    weights: Sequence[float]
    answer_stops: Sequence[int]


@final
@dataclass(frozen=True, slots=True)
class Weighed:
    """The role (n,) and the weight (n,) of each token of rows, the place of the stop token of each turn in its row, and
    for each row whether that is known: each turn follows its prompt, ends in a stop token and has none before, nor one
    that might end it too; and the row begins with one BOS, where it is to begin with it."""

    roles: NDArray[np.uint8]
    weights: Floats
    stops: Ints
    known: NDArray[np.bool_]


@final
class NativeRows:
    """What is worked out of rows. Make one with `build`; it is not for several threads at once."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        place, count = ctypes.c_void_p, ctypes.c_int64
        self._sound, self._weigh = loaded.rows_sound, loaded.rows_weigh
        self._marks, self._answer = loaded.rows_marks, loaded.rows_answer
        ids = (place, count)
        self._sound.argtypes = (*(place,) * 5, count, place, place, *ids, count, place, place, place)
        self._weigh.argtypes = (
            *(place, place, place, count, place, place, place, place, count, place, place, place, place, place),
            *(*ids, *ids, count, place, place, place, place),
        )  # fmt: skip
        self._marks.argtypes = (*(place,) * 4, count, *(place,) * 4)
        self._answer.argtypes = (place, place, place, count, *ids, *ids, place)
        for function in (self._sound, self._weigh, self._marks, self._answer):
            function.restype = None
        self._packed: dict[frozenset[int], bytes] = {}

    @classmethod
    def build(cls) -> NativeRows:
        """One of these. Raises MissingError where nothing can be compiled."""
        return cls(compiled())

    def sound(
        self,
        spellings: NativeSpellings,
        rows: Rows,
        texts: Joined,
        turns: Sequence[int],
        *,
        stops: frozenset[int],
        bos: int | None,
    ) -> tuple[Longs, Ints]:
        """For each row how many runs of tokens with weight it has, where it is known to be sound, and the runs.

        Row r has at most as many as there are from `turns[r - 1]` to `turns[r]`, and its [start, stop) stand there.
        `stops` are the tokens that end a turn, `bos` is what a row begins with. -1 is a row that is not known to be
        sound, less than that one with a token that has to be put first.
        """
        limits = np.array(turns, np.int64)
        made, found = np.empty((int(limits[-1]) if len(limits) else 0, 2), np.int32), np.empty(len(limits), np.int64)
        ended = self._pack(stops)
        self._sound(
            spellings.handle, _at(rows.ids), _at(rows.weights), _at(rows.spans), _at(rows.ends), len(rows.ends),
            texts.raw, _at(texts.ends), ended, len(stops), -1 if bos is None else bos, _at(made), _at(limits),
            _at(found),
        )  # fmt: skip
        return found, made

    def weigh(
        self, rows: Rows, turns: Turns, *, stops: frozenset[int], ends: frozenset[int], bos: int | None
    ) -> Weighed:
        """The roles and weights of tokens, which are written into those of `rows` too.

        `stops` end a turn, `ends` might end it too, `bos` is what a row begins with.
        """
        roles, places = np.empty(len(rows.ids), np.uint8), np.empty(len(turns.endings), np.int32)
        known = np.empty(len(rows.ends), np.bool_)
        bounds, endings, behinds = (np.array(each, np.int32) for each in (turns.bounds, turns.endings, turns.behinds))
        bound_stops, answer_stops = (np.array(each, np.int64) for each in (turns.bound_stops, turns.answer_stops))
        weights = np.array(turns.weights, np.float64)
        self._weigh(
            _at(rows.ids), _at(rows.spans), _at(rows.ends), len(rows.ends), _at(bounds), turns.roles, _at(bound_stops),
            _at(turns.prompts), turns.prompt_start, _at(turns.prompt_ends), _at(endings), _at(behinds), _at(weights),
            _at(answer_stops), self._pack(stops), len(stops), self._pack(ends), len(ends), -1 if bos is None else bos,
            _at(roles), _at(rows.weights), _at(places), _at(known),
        )  # fmt: skip
        return Weighed(roles, rows.weights, places, known)

    def marks(self, rows: Rows, texts: Joined) -> list[tuple[int, int, int]]:
        """For each row the digests of its tokens, of its text without capitals and white space, and of its trained
        tokens."""
        made = bytes(not text.isascii() for text in texts.texts)
        if any(made):
            # Capitals and white space of all languages are Python's to know.
            begins = [0, *rows.ends.tolist()]
            edges = zip(texts.texts, made, begins, begins[1:], strict=False)
            texts = Joined.of(
                [_folded(text, rows.spans, first, after - 1) if one else text for text, one, first, after in edges]
            )
        found = np.empty((len(rows.ends), 3), np.uint64)
        self._marks(
            _at(rows.ids), _at(rows.weights), _at(rows.spans), _at(rows.ends), len(rows.ends), texts.raw,
            _at(texts.ends), made, _at(found),
        )  # fmt: skip
        return [(one, two, three) for one, two, three in found.tolist()]

    def answer(self, rows: Rows, stops: frozenset[int], specials: frozenset[int]) -> list[int]:
        """For each row how many tokens with weight stand before the last of them, where that one alone is a stop token.

        -1 where that is not so, or where all before it are special.
        """
        found = np.empty(len(rows.ends), np.int64)
        ended, special = self._pack(stops), self._pack(specials)
        self._answer(
            _at(rows.ids), _at(rows.weights), _at(rows.ends), len(rows.ends), ended, len(stops), special,
            len(specials), _at(found),
        )  # fmt: skip
        return list(map(int, found.tolist()))

    def _pack(self, ids: frozenset[int]) -> bytes:
        """Ids as bytes. There are few different sets, so those are kept."""
        known = self._packed.get(ids)
        if known is None:
            if len(self._packed) >= _SETS:
                self._packed.clear()
            known = self._packed[ids] = np.array(sorted(ids), np.int32).tobytes()
        return known


def _folded(text: str, spans: Ints, first: int, last: int) -> str:
    """What the tokens of a row say, from the first to the last, without capitals and white space."""
    return " ".join(text[int(spans[first, 0]) : int(spans[last, 1])].casefold().split())


def _at(values: NDArray[Any]) -> int:
    """The address of an array, which has to be kept by name until C++ is done with it."""
    return values.ctypes.data
