"""Spellings: the text of tokens, put together from the bytes that each of them stands for.

Idea: a byte-level tokenizer writes each byte as a letter of its own, and its decoder joins the bytes of all tokens and
reads them as UTF-8. What a token stands for is the same wherever it stands, so the tokenizer is asked once for each
token, and a text is then a look-up and a join: several times as fast as the decoder, and the same text. A tokenizer
with any other decoder has no spellings.

Source: the decoder ByteLevel of the tokenizers library, and the alphabet of GPT-2's `bytes_to_unicode`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, final

_SHOWN: Final = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
"""The bytes that are written as the character of that number; the others follow behind the last byte, in order."""
_HIDDEN: Final = tuple(byte for byte in range(256) if byte not in _SHOWN)
BYTE_OF: Final[Mapping[str, int]] = MappingProxyType(
    {chr(byte): byte for byte in _SHOWN} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}
)
"""Each letter of the alphabet, and the byte it stands for."""


@final
class Spellings:
    """The bytes of the tokens seen so far. Make one with `of`; several threads may use it."""

    def __init__(self, backend: Any) -> None:
        self._known = _Known(backend)

    @classmethod
    def of(cls, backend: Any) -> Spellings | None:
        """The spellings of a `tokenizers.Tokenizer`; None where its decoder does anything but join bytes."""
        decoder = backend.decoder
        if decoder is None or json.loads(decoder.__getstate__()).get("type") != "ByteLevel":
            return None
        return cls(backend)

    def text(self, ids: Sequence[int]) -> str:
        """What the tokens say, as the tokenizer's own decoder has it: U+FFFD stands for what is no character."""
        return b"".join(map(self._known.__getitem__, ids)).decode("utf-8", "replace")


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
