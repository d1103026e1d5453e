"""Words in C++: texts cut into words, and their tokens put together from those of words seen before.

Idea: where a tokenizer makes tokens of each word alone, a text is a look-up of its words; cutting and looking up take
0.2 microseconds a word in Python and a tenth of that here, for a thousand texts in one call. What a word's tokens are
is not known here: words that are new are told, and whoever asks says what they are. The way back joins the bytes that
tokens stand for. The twins in Python, which decide when there are words at all and what tokens are, are
`data/words.py` and `data/spellings.py`.
No torch: data is looked at without it.
Use through these, for much text: compiling takes a second or two, once a machine (`native_build.py`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import MissingError
from luthier.kernels.native_build import is_built, library
from luthier.kernels.wanted import wanted_kernels

SOURCES: Final = Path(__file__).parent / "words"
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")  # the name of the library tells the CPU
ORDER: Final = ("gpt2", "llama3", "qwen2", "seedling")
"""The patterns by which it can cut, as words.cpp numbers them."""
_UNKNOWN: Final = 2**14
"""New words that are told at once."""


@final
@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of texts and of beginnings, one behind the other: `ids` (n,), `spans` (n, 2) in characters of theirs.

    For each where its tokens end, and how many characters they make up. `covered` says that no token begins behind
    the end of all before it.
    """

    ids: NDArray[np.int32]
    spans: NDArray[np.int32]
    ends: NDArray[np.int64]
    characters: NDArray[np.int64]
    covered: bool


@final
@dataclass(frozen=True, slots=True)
class Joined:
    """Texts, and what they are one behind the other, as UTF-8, with the byte where each ends."""

    texts: Sequence[str]
    raw: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Joined:
        """These texts. Raises UnicodeEncodeError where one holds half a character."""
        raw, count = "".join(texts).encode(), len(texts)
        ends = np.fromiter(accumulate(map(len, texts)), np.int64, count)
        if count and int(ends[-1]) != len(raw):
            ends = np.fromiter(accumulate(len(text.encode()) for text in texts), np.int64, count)
        return cls(texts, raw, ends)


@final
class NativeWords:
    """The words of one tokenizer. Make one with `build`; it is not for several threads at once."""

    def __init__(self, loaded: ctypes.CDLL, pattern: str, controls: Sequence[str]) -> None:
        self._library = loaded
        loaded.words_new.restype = ctypes.c_void_p
        loaded.words_cut.restype = loaded.words_count.restype = ctypes.c_int64
        told = Joined.of(sorted(controls, key=len, reverse=True))
        count = ctypes.c_int64(len(controls))
        number = ctypes.c_int32(ORDER.index(pattern))
        self._handle = ctypes.c_void_p(loaded.words_new(number, told.raw, _at(told.ends), count))
        self._texts = 0
        weakref.finalize(self, loaded.words_free, self._handle)

    @classmethod
    def build(cls, pattern: str, controls: Sequence[str]) -> NativeWords:
        """The words of a tokenizer that cuts by this pattern, and at the texts of its control tokens.

        Raises MissingError where nothing can be compiled.
        """
        return cls(compiled(), pattern, controls)

    @property
    def sizes(self) -> tuple[int, int]:
        """The words that are remembered, and their tokens."""
        sizes = np.zeros(2, np.int64)
        self._library.words_sizes(self._handle, _at(sizes))
        return int(sizes[0]), int(sizes[1])

    def clear(self) -> None:
        """Forget all words."""
        self._library.words_clear(self._handle)

    def put(self, words: Sequence[bytes], records: NDArray[np.int32], ends: Sequence[int]) -> None:
        """Remember words: each has the records (n, 3) up to its one of `ends`, as `data/words.py` has them."""
        raw = b"".join(words)
        edges = np.fromiter(accumulate(map(len, words)), np.int64, len(words))
        tokens, rows = np.array(ends, np.int64), np.ascontiguousarray(records, np.int32)
        count = ctypes.c_int64(len(words))
        self._library.words_put(self._handle, raw, _at(edges), _at(rows), _at(tokens), count)

    def cut(self, texts: Joined, begun: Sequence[tuple[int, int]]) -> Iterator[list[bytes]]:
        """Cut texts, and beginnings: of the text at a place its first so many characters. Yields words to be put.

        All of them are to be put, and then `written` has the tokens.
        """
        likes, stops = np.array(begun, np.int64).reshape(len(begun), 2).T.copy()
        self._texts = len(texts.ends) + len(begun)
        counts = [ctypes.c_int64(each) for each in (len(texts.ends), len(begun))]
        ends = _at(texts.ends), _at(likes), _at(stops)
        missing = self._library.words_cut(self._handle, texts.raw, ends[0], counts[0], ends[1], ends[2], counts[1])
        for first in range(0, missing, _UNKNOWN):
            found = np.empty((min(missing - first, _UNKNOWN), 2), np.int64)
            told = ctypes.c_int64(first), ctypes.c_int64(len(found))
            self._library.words_missing(self._handle, *told, _at(found))
            yield [texts.raw[start:end] for start, end in found.tolist()]

    def written(self) -> Encoded | None:
        """The tokens of what was cut last, texts and then beginnings; None where a word has not been put."""
        count = self._library.words_count(self._handle)
        if count < 0:
            return None
        ids, spans = np.empty(count, np.int32), np.empty((count, 2), np.int32)
        ends, characters = np.empty(self._texts, np.int64), np.empty(self._texts, np.int64)
        covered = np.zeros(1, np.int32)
        self._library.words_write(self._handle, *map(_at, (ids, spans, ends, characters, covered)))
        return Encoded(ids, spans, ends, characters, bool(covered[0]))


@final
class NativeSpellings:
    """The bytes of tokens, joined in C++. Make one with `build`; it is not for several threads at once."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        loaded.spellings_new.restype = ctypes.c_void_p
        self.handle = ctypes.c_void_p(loaded.spellings_new())
        # Said once, since a call of these is otherwise mostly the making of its arguments.
        self._put, self._text = loaded.spellings_put, loaded.spellings_text
        self._put.argtypes = (
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64
        )  # fmt: skip
        self._text.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._text.restype = ctypes.c_int64
        self._longest = 1
        self._made = np.empty(0, np.uint8)
        self._address = 0
        weakref.finalize(self, loaded.spellings_free, self.handle)

    @classmethod
    def build(cls) -> NativeSpellings:
        """Empty ones. Raises MissingError where nothing can be compiled."""
        return cls(compiled())

    def put(self, tokens: Sequence[int], spelled: Sequence[bytes]) -> None:
        """Remember what each of some tokens stands for."""
        sizes = [len(each) for each in spelled]
        ids, ends = np.array(tokens, np.int64).tobytes(), np.cumsum(sizes, dtype=np.int64).tobytes()
        self._put(self.handle, ids, b"".join(spelled), ends, len(tokens))
        self._longest = max(self._longest, *sizes)

    def text(self, ids: NDArray[np.int32]) -> bytes | int:
        """The bytes of tokens, or the place of the first one that has not been put."""
        room = len(ids) * self._longest
        if room > len(self._made):
            self._made = np.empty(2 * room, np.uint8)
            self._address = self._made.ctypes.data
        size = int(self._text(self.handle, ids.tobytes(), len(ids), self._address, room))
        return self._made[:size].tobytes() if size >= 0 else -1 - size


def is_compiled() -> bool:
    """Whether `build` would find it compiled."""
    return is_built(SOURCES, FLAGS)


def compiled() -> ctypes.CDLL:
    """The C++ of words and rows. Raises MissingError where nothing can be compiled, or nothing shall be."""
    if wanted_kernels() not in ("auto", "native"):
        raise MissingError(f"LUTHIER_KERNELS is {wanted_kernels()}")
    return library(SOURCES, FLAGS)[0]


def _at(values: NDArray[Any]) -> ctypes.c_void_p:
    """The address of an array, which has to be kept by name until C++ is done with it."""
    return ctypes.c_void_p(values.ctypes.data)
