"""Rows in C++: roles, weights, digests and the checks of a row's tokens, each in one pass over them.

Idea: a row has a hundred tokens, for which a call of numpy takes longer than the work, and thirty such calls a row are
most of the time that a row takes. What is said here is said of rows as nearly all are; of any other it is None, and the
twins in Python look: `data/checks.py`, `data/findings.py`, `data/rendering/causal.py`.
No torch: data is looked at without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from struct import pack
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.kernels.words import NativeSpellings, compiled

_TURNS: Final = 64
"""Turns of a row at most."""
_FEW: Final = 2**12
"""Tokens that there is room for at first."""

# To compare with the name of a type makes one of these each time.
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@final
@dataclass(frozen=True, slots=True)
class Turns:
    """Where a row's turns stand. Message m ends at the character `ends[m]` and has the role `roles[m]`.

    Turn t begins at the token `starts[t]`; what it says ends at the character `endings[t]`, what a template writes
    behind that at `behinds[t]`; it has a loss weight.
    """

    ends: Sequence[int]
    roles: bytes
    starts: Sequence[int]
    endings: Sequence[int]
    behinds: Sequence[int]
    weights: Sequence[float]


@final
class NativeRows:
    """What is worked out of rows. Make one with `build`; it is not for several threads at once."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        # Said once, since a call is otherwise mostly the making of its arguments.
        text, count, place = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p
        self._sound, self._weigh, self._marks = loaded.rows_sound, loaded.rows_weigh, loaded.rows_marks
        yes = ctypes.c_int32
        self._sound.argtypes = (place, text, text, text, count, text, count, yes, text, count, count, place, count)
        self._sound.restype = count
        self._weigh.argtypes = (
            *(text, text, count, text, text, count, text, text, text, text, count),
            *(text, count, text, count, count, place, place, place),
        )  # fmt: skip
        self._weigh.restype = count
        self._marks.argtypes = (text, text, text, count, text, count, yes, place)
        self._marks.restype = None
        self._answer = loaded.rows_answer
        self._answer.argtypes, self._answer.restype = (text, text, count, text, count, text, count), count
        self._found, self._ats = np.empty(2 * _TURNS, np.int32), np.empty(_TURNS, np.int32)
        self._made = np.empty(3, np.uint64)
        self._places = [each.ctypes.data for each in (self._found, self._ats, self._made)]
        self._roles, self._weights = np.empty(0, np.uint8), np.empty(0, np.float32)
        self._widen(_FEW)
        self._packed: dict[Collection[int], bytes] = {}

    @classmethod
    def build(cls) -> NativeRows:
        """One of these. Raises MissingError where nothing can be compiled."""
        return cls(compiled())

    def sound(
        self, spellings: NativeSpellings, row: tuple[Ints, Floats, Ints, str], stops: frozenset[int], bos: int | None
    ) -> list[tuple[int, int]] | int | None:
        """The [start, stop) of each run of tokens with weight, where the row is known to be sound.

        The row is ids (n,), weights (n,), spans (n, 2) and text. `stops` are the tokens that end a turn, `bos` is what
        may begin a row. A number is the place of a token that has to be put first.
        """
        ids, weights, spans, text = row
        raw = _raw(ids, weights, spans)
        if raw is None:
            return None
        try:
            said = text.encode()
        except UnicodeEncodeError:  # half a character, which no tokens say
            return None
        ended = self._pack(stops)
        found: int = self._sound(
            spellings.handle, *raw, len(ids), said, len(said), len(said) == len(text), ended, len(stops),
            -1 if bos is None else bos, self._places[0], _TURNS,
        )  # fmt: skip
        if found < 0:
            return None if found == -1 else -2 - found
        flat = self._found[: 2 * found].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def weigh(
        self, ids: Ints, spans: Ints, turns: Turns, *, stops: frozenset[int], ends: frozenset[int], bos: int | None
    ) -> tuple[NDArray[np.uint8], Floats, list[int]] | None:
        """The role (n,) and the weight (n,) of each token, and the place of the stop token of each turn.

        None unless each turn ends in one of `stops` and has none before, nor one of `ends`, which might end it too.
        """
        count, bounds, said = len(ids), len(turns.ends), len(turns.starts)
        if said > _TURNS or not bounds or ids.dtype != _INT32 or spans.dtype != _INT32:
            return None
        if count > len(self._roles):
            self._widen(2 * count)
        numbers = f"{said}i"
        refused = self._weigh(
            ids.tobytes(), spans.tobytes(), count, pack(f"{bounds}i", *turns.ends), turns.roles, bounds,
            pack(numbers, *turns.starts), pack(numbers, *turns.endings), pack(numbers, *turns.behinds),
            pack(f"{said}d", *turns.weights), said, self._pack(stops), len(stops), self._pack(ends), len(ends),
            -1 if bos is None else bos, *self._room, self._places[1],
        )  # fmt: skip
        if refused:
            return None
        return self._roles[:count].copy(), self._weights[:count].copy(), self._ats[:said].tolist()

    def marks(self, ids: Ints, weights: Floats, spans: Ints, text: str) -> tuple[int, int, int] | None:
        """The digests of a row's tokens, of its text without capitals and white space, and of its trained tokens."""
        raw, made = _raw(ids, weights, spans), not text.isascii()
        if raw is None:
            return None
        if made:
            # Capitals and white space of all languages are Python's to know.
            text = " ".join(text[int(spans[0, 0]) : int(spans[-1, 1])].casefold().split())
        said = text.encode("utf-8", "surrogatepass")
        self._marks(*raw, len(ids), said, len(said), made, self._places[2])
        one, two, three = self._made.tolist()
        return one, two, three

    def answer(self, ids: Ints, weights: Floats, stops: frozenset[int], specials: frozenset[int]) -> int:
        """How many tokens with weight stand before the last of them, where that one alone is a stop token.

        -1 where that is not so, or where all before it are special.
        """
        if ids.dtype != _INT32 or weights.dtype != _FLOAT32 or len(ids) != len(weights):
            return -1
        ended, special = self._pack(stops), self._pack(specials)
        return int(
            self._answer(ids.tobytes(), weights.tobytes(), len(ids), ended, len(stops), special, len(specials))
        )

    def _pack(self, ids: frozenset[int]) -> bytes:
        """Ids as bytes. There are few different sets, so those are kept."""
        known = self._packed.get(ids)
        if known is None:
            if len(self._packed) >= _TURNS:
                self._packed.clear()
            known = self._packed[ids] = np.array(sorted(ids), np.int32).tobytes()
        return known

    def _widen(self, count: int) -> None:
        self._roles, self._weights = np.empty(count, np.uint8), np.empty(count, np.float32)
        self._room: tuple[Any, Any] = (self._roles.ctypes.data, self._weights.ctypes.data)


def _raw(ids: Ints, weights: Floats, spans: Ints) -> tuple[bytes, bytes, bytes] | None:
    """Their bytes; None where they do not fit each other, or are not what C++ takes."""
    if not len(ids) == len(weights) == len(spans) > 0:
        return None
    if ids.dtype != _INT32 or weights.dtype != _FLOAT32 or spans.dtype != _INT32:
        return None
    return ids.tobytes(), weights.tobytes(), spans.tobytes()
