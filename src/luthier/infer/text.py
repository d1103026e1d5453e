"""The text of one continuation as it grows, token by token.

Idea: what tokens read as depends on their neighbours (half a character, a leading space, a joining mark), so the newest
are read together with the few before them, and only what that adds is told. Held back is what may still change: half of
a character, and an ending that a stop string could begin with. What was told stays as it is.
Cost: a token, or some tokens at once, cost two readings of a few tokens, however long the text is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

import numpy as np

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints

Decode = Callable[[Ints | list[int]], str]

_HALF: Final = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""
_MOST_HALVES: Final = 3
"""A character has at most four bytes, so of its marks at the end of a text at most three may become one."""
_WINDOW: Final = 32
"""Tokens that are read together at most."""
_CONTEXT: Final = 8
"""Tokens of the text before that are read along at the beginning."""


@final
class TextStream:
    """Tokens in, text out: `push` gives what is certain by now, `end` the rest.

    The text ends before the stop string that is complete first (of those that end together, the longest), wherever
    it lies in the tokens; `stopped` then says which one it was. Tokens of `skip` are not part of the text. Where tokens
    continue those of `after`, a space between the two is kept that decoders take away from the beginning of a text.
    `spelled` tokens (see data/spellings.py) say the same wherever they stand: none are read along before them.
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str] = (),
        *,
        skip: frozenset[int] = frozenset(),
        after: Sequence[int] | Ints = (),
        spelled: bool = False,
    ) -> None:
        for text in stop:
            if not text:
                raise RecipeError(f"the stop strings {list(stop)} hold an empty one", allowed="strings of characters")
        self.stopped: str | None = None
        self._stop = tuple(stop)
        self._skip = skip
        self._decode = decode
        self._spelled = spelled
        self._window = [int(token) for token in after[-_CONTEXT:] if int(token) not in skip]
        before = self._read(self._window)
        self._told = before[: _certain(before)]
        self._whole = len(self._window) if self._told == before else 0
        self._held = ""
        if spelled and self._whole:
            self._begin()

    def push(self, token: int) -> str:
        """The text that is certain with `token` and was not told before."""
        return self.push_all((token,))

    def push_all(self, tokens: Sequence[int]) -> str:
        """The same of some tokens at once, which are read together: two readings, however many there are."""
        new = [token for token in tokens if token not in self._skip]
        if self.stopped is not None or not new:
            return ""
        if self._spelled and not self._window:
            # Of whole characters nothing is kept, so there is nothing to read them with.
            text = self._decode(new)
            if _HALF not in text:
                return self._until_stop(text)
        text = self._read([*self._window, *new])
        odd = _HALF in text or not text.startswith(self._told)
        if len(new) > 1 and (odd or len(self._window) + len(new) > _WINDOW):
            # A window at a time, and bytes one by one: some decoders read none of them while one is missing.
            middle = len(new) // 2
            return self.push_all(new[:middle]) + self.push_all(new[middle:])
        self._window += new
        if not text.startswith(self._told):
            # Bytes that were read as characters before are none together with the new one: it stands alone.
            self._window, self._whole, self._told = new, 0, ""
            text = self._read(self._window)
        certain = _certain(text)
        told = text[len(self._told) : certain]
        if certain == len(text) and self._spelled:
            self._begin()
        elif certain == len(text) and told:
            self._window = self._window[self._whole :]
            self._whole = len(self._window)
            self._told = self._read(self._window)
        elif told:
            self._told = text[:certain]
        if len(self._window) > _WINDOW:
            self._shorten(text)
        return self._until_stop(told)

    def end(self) -> str:
        """The rest of the text, when no token comes any more."""
        if self.stopped is not None:
            return ""
        rest = self._until_stop(self._read(self._window)[len(self._told) :])
        if self.stopped is None:
            rest, self._held = rest + self._held, ""
        self._begin()
        return rest

    def _begin(self) -> None:
        """Go on as if nothing had been read."""
        self._window, self._whole, self._told = [], 0, ""

    def _read(self, tokens: list[int]) -> str:
        return self._decode(np.array(tokens, np.int32)) if tokens else ""

    def _shorten(self, text: str) -> None:
        """Forget the first half of a window that never came to a whole character: random bytes, or empty tokens."""
        for cut in range(_WINDOW // 2, len(self._window)):
            left, right = self._read(self._window[:cut]), self._read(self._window[cut:])
            if left + right == text and len(left) <= len(self._told):
                self._window, self._whole, self._told = self._window[cut:], 0, self._told[len(left) :]
                return

    def _until_stop(self, new: str) -> str:
        """What may be told of the held text and the new one, with regard to stop strings."""
        if not self._stop:
            return new
        text = self._held + new
        met = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if met:
            _, start, self.stopped = min(met)
            self._held = ""
            return text[:start]
        hold = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _certain(text: str) -> int:
    """How many characters of a reading no further token can change."""
    return len(text) - min(_MOST_HALVES, len(text) - len(text.rstrip(_HALF)))


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
