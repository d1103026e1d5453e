"""Spellings: the text of tokens, put together from the bytes that each of them stands for.

Idea: a byte-level tokenizer writes each byte as a letter of its own, and its decoder joins the bytes of all tokens and
reads them as UTF-8. What a token stands for is the same wherever it stands, so the tokenizer is asked once for each
token, and a text is then a look-up and a join: several times as fast as the decoder, and the same text. A tokenizer
with any other decoder has no spellings. Of many tokens the bytes are joined in C++ (`kernels/words.py`), where that was
compiled for words.

Source: the decoder ByteLevel of the tokenizers library, and the alphabet of GPT-2's `bytes_to_unicode`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from threading import Lock
from types import MappingProxyType
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import MissingError
from luthier.data.forest import Ints
from luthier.kernels.rows import NativeRows, Rows
from luthier.kernels.words import Joined, NativeSpellings, is_compiled

_SHOWN: Final = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
"""The bytes that are written as the character of that number; the others follow behind the last byte, in order."""
_HIDDEN: Final = tuple(byte for byte in range(256) if byte not in _SHOWN)
BYTE_OF: Final[Mapping[str, int]] = MappingProxyType(
    {chr(byte): byte for byte in _SHOWN} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}
)
"""Each letter of the alphabet, and the byte it stands for."""


_MANY: Final = 2**13
"""Tokens after which it is looked whether they can be joined in C++."""
_AT_ONCE: Final = 2**13
"""Tokens that are joined at once: there has to be room for the longest token as often."""


@final
class Spellings:
    """The bytes of the tokens seen so far. Make one with `of`; several threads may use it."""

    def __init__(self, backend: Any) -> None:
        self._known = _Known(backend)
        self._spelled = 0
        self._lock = Lock()
        self._native: NativeSpellings | None = None
        self._put = np.zeros(0, np.bool_)

    @classmethod
    def of(cls, backend: Any) -> Spellings | None:
        """The spellings of a `tokenizers.Tokenizer`; None where its decoder does anything but join bytes."""
        decoder = backend.decoder
        if decoder is None or json.loads(decoder.__getstate__()).get("type") != "ByteLevel":
            return None
        return cls(backend)

    def text(self, ids: Sequence[int] | Ints) -> str:
        """What the tokens say, as the tokenizer's own decoder has it: U+FFFD stands for what is no character."""
        if isinstance(ids, np.ndarray):
            if ids.dtype == np.int32 and (spelled := self._quickly(ids)) is not None:
                return spelled.decode("utf-8", "replace")
            ids = ids.tolist()
        return b"".join(map(self._known.__getitem__, ids)).decode("utf-8", "replace")

    def foresee(self, texts: Sequence[Ints]) -> None:
        """Look up what the tokens of these texts stand for, at once: they will be asked for text by text."""
        if self._native is not None and texts:
            with self._lock:
                self._told(self._native, np.concatenate(texts))

    def sound(
        self,
        rows: NativeRows,
        given: Rows,
        texts: Joined,
        turns: Sequence[int],
        *,
        stops: frozenset[int],
        bos: int | None,
    ) -> tuple[NDArray[np.int64], Ints] | None:
        """For each row how many turns it has, where it says its text, among all else that `NativeRows.sound` looks at.

        -1 where that is not known; and the turns. None where nothing is compiled.
        """
        native = self._built(len(given.ids))
        if native is None:
            return None
        with self._lock:
            found = rows.sound(native, given, texts, turns, stops=stops, bos=bos)
            if (found[0] < -1).any() and self._told(native, given.ids):
                found = rows.sound(native, given, texts, turns, stops=stops, bos=bos)
        return found

    def _quickly(self, ids: Ints) -> bytes | None:
        """The bytes of tokens, joined in C++ where that is compiled and enough was asked for; else None."""
        native = self._built(len(ids))
        if native is None:
            return None
        spelled: list[bytes] = []
        with self._lock:
            for start in range(0, len(ids), _AT_ONCE):
                piece = ids[start : start + _AT_ONCE]
                if isinstance(made := native.text(piece), int):
                    if not self._told(native, piece):
                        return None
                    made = native.text(piece)
                if isinstance(made, int):
                    return None
                spelled.append(made)
        return b"".join(spelled)

    def _told(self, native: NativeSpellings, ids: Ints) -> bool:
        """Say in C++ what these tokens stand for; False where one is none, or may be added later."""
        if not len(ids) or int(ids.min()) < 0:
            return False
        last = int(ids.max())
        if last >= len(self._put):
            if not self._is_token(last):
                return False
            self._put = np.concatenate([self._put, np.zeros(last + 1, np.bool_)])
        new = np.unique(ids[~self._put[ids]]).tolist()
        spelled = [self._known[token] for token in new]
        if not self._known.keys() >= set(new):
            return False
        if new:
            native.put(new, spelled)
            self._put[new] = True
        return True

    def _is_token(self, token: int) -> bool:
        return self._known[token] is self._known.get(token)

    def _built(self, count: int) -> NativeSpellings | None:
        if self._native is None:
            self._spelled += count
            if self._spelled >= _MANY:
                self._spelled = 0
                try:
                    self._native = NativeSpellings.build() if is_compiled() else None
                except MissingError:
                    return None  # the twin does the same, slower
        return self._native


@final
class _Known(dict[int, bytes]):
    """The bytes of tokens by id, asked for when first wanted."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token: int) -> bytes:
        written = self._backend.id_to_token(token)
        if written is None:
            return b""  # not remembered: a token may be added later
        try:
            spelled = bytes(map(BYTE_OF.__getitem__, written))
        except KeyError:
            # A control token may hold a sign that no byte is written as: then it stands for itself.
            spelled = written.encode()
        self[token] = spelled
        return spelled
