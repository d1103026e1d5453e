"""Texts as a tokenizer's own post-processor puts them together: with its control tokens, and the side of each token.

Idea: which control tokens stand around a text or between two is the tokenizer's to say ([CLS] and [SEP], </s>, ...), so
it is asked for them and nothing is added by hand. What is cut away later is cut from the words of a side, never from
the control tokens.

Use through the renderers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from luthier.data.forest import Floats, Ints
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.spans import whole_character
from luthier.data.tokenizer import Tokenizer

JOINT = "\n"
"""What stands between the two texts of a pair in `Marked.text`."""
NOBODY = -1


@final
@dataclass(frozen=True, slots=True)
class Marked:
    """The tokens of a text or of a pair.

    For each token (n,): its id, its type (0 or 1), its characters in `text` (n, 2), its side (0 for the first text, 1
    for the second, -1 for a control token that was added) and the number of its word (-1 for none).
    """

    text: str
    ids: Ints
    types: NDArray[np.uint8]
    spans: Ints
    sides: NDArray[np.int8]
    words: Ints

    def __len__(self) -> int:
        return len(self.ids)

    def has(self, side: int) -> bool:
        """Whether a side has any token."""
        return bool((self.sides == side).any())

    def taken(self, which: NDArray[Any]) -> Marked:
        """The tokens that `which` (a mask or places) selects."""
        sides = self.sides[which]
        spans = settled(self.spans[which], sides)
        return Marked(self.text, self.ids[which], self.types[which], spans, sides, self.words[which])

    def shortened(self, limit: int) -> Marked:
        """At most `limit` tokens: the ends of the sides are cut, of the longer one first, and no control token."""
        room = limit - int(np.count_nonzero(self.sides == NOBODY))
        places = [np.flatnonzero(self.sides == side) for side in (0, 1)]
        keep = np.ones(len(self), np.bool_)
        for mine, size in zip(places, longest_first(len(places[0]), len(places[1]), room), strict=True):
            if size < len(mine):
                keep[mine[whole_character(self.spans[mine], size) :]] = False
        return self.taken(keep)

    def view(self, row: int, weights: Floats, *, labels: Ints | None = None) -> Rendered:
        """The tokens as a view of a row."""
        roles = np.array([TOKEN_ROLES.index(name) for name in ("text", "pair", "template")], np.uint8)[self.sides]
        types = self.types if self.types.any() else None
        return Rendered(row, self.text, self.ids, weights, roles, self.spans, labels, types)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of either side stay in `room`: the longer side is cut first, then both alike."""
    if first + second <= room:
        return first, second
    short = min(first, second)
    # The odd token is the longer side's, as the tokenizers library gives it.
    short, long = (room // 2, room - room // 2) if 2 * short > room else (short, room - short)
    return (long, short) if first > second else (short, long)


def settled(spans: Ints, sides: NDArray[np.int8]) -> Ints:
    """The spans, with those of added tokens empty and behind the words that stand before them."""
    ends = np.maximum.accumulate(np.where(sides == NOBODY, 0, spans[:, 1])) if len(spans) else spans[:, 1]
    return np.where(sides[:, None] == NOBODY, ends[:, None], spans).astype(np.int32)


def mark(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Marked]:
    """Each text, or pair of texts, with the tokenizer's own control tokens; the second text may be empty."""
    asked = [(text, pair) if pair else text for text, pair in pairs]
    made = tokenizer.backend.encode_batch(asked, add_special_tokens=True)
    return [
        _marked(text + JOINT + pair if pair else text, one, starts=np.array([0, len(text) + len(JOINT)]), by_word=False)
        for (text, pair), one in zip(pairs, made, strict=True)
    ]


def mark_words(tokenizer: Tokenizer, words: Sequence[str]) -> Marked:
    """The words of a text with the tokenizer's own control tokens; each token knows its word."""
    text, starts = " ".join(words), _starts(words)
    if not takes_words(tokenizer):
        (made,) = mark(tokenizer, [(text, "")])
        return Marked(text, made.ids, made.types, made.spans, made.sides, _words_of(made.spans, made.sides, starts))
    one = tokenizer.backend.encode(list(words), is_pretokenized=True, add_special_tokens=True)
    return _marked(text, one, starts=starts, by_word=True)


def plain(tokenizer: Tokenizer, text: str, pair: str = "") -> Marked:
    """A text or a pair as a causal decoder reads it: one running text, behind BOS where the tokenizer adds one."""
    whole = text + JOINT + pair if pair else text
    ids, spans = tokenizer.encode(whole)
    bos = tokenizer.bos_id
    if bos is not None and tokenizer.adds_bos and not (len(ids) and int(ids[0]) == bos):
        ids = np.concatenate([np.array([bos], np.int32), ids])
        spans = np.concatenate([np.zeros((1, 2), np.int32), spans])
    sides = (spans[:, 0] >= len(text)).astype(np.int8) if pair else np.zeros(len(ids), np.int8)
    if bos is not None and tokenizer.adds_bos:
        sides[0] = NOBODY
    words = np.full(len(ids), -1, np.int32)
    return Marked(whole, ids, np.zeros(len(ids), np.uint8), settled(spans, sides), sides, words)


def plain_words(tokenizer: Tokenizer, words: Sequence[str]) -> Marked:
    """Words as `plain` reads their text, each token with the word it ends in."""
    made = plain(tokenizer, " ".join(words))
    owners = _words_of(made.spans, made.sides, _starts(words))
    return Marked(made.text, made.ids, made.types, made.spans, made.sides, owners)


def takes_words(tokenizer: Tokenizer) -> bool:
    """Whether single words become the tokens that they are in a text: not where only a space makes them so."""
    part = tokenizer.backend.pre_tokenizer
    state = {} if part is None else json.loads(part.__getstate__())
    parts = state.get("pretokenizers", [state])
    return not any(part.get("type") == "ByteLevel" and not part.get("add_prefix_space") for part in parts)


def _marked(text: str, one: Any, *, starts: NDArray[np.int64], by_word: bool) -> Marked:
    """An encoding as arrays; `starts` says where in `text` each word, or each side, begins."""
    sides = np.array([NOBODY if side is None else side for side in one.sequence_ids], np.int8)
    sides[np.array(one.special_tokens_mask, np.bool_)] = NOBODY
    words = np.array([-1 if word is None else word for word in one.word_ids], np.int32)
    spans = np.array(one.offsets, np.int32).reshape(-1, 2)
    spans = spans + starts[words if by_word else sides][:, None]
    return Marked(
        text,
        np.array(one.ids, np.int32),
        np.array(one.type_ids, np.uint8),
        settled(spans.astype(np.int32), sides),
        sides,
        words if by_word else np.full(len(words), -1, np.int32),
    )


def _starts(words: Sequence[str]) -> NDArray[np.int64]:
    """Where each word begins in the text of all, one space apart."""
    return np.concatenate([[0], np.cumsum([len(word) + 1 for word in words[:-1]])]).astype(np.int64)


def _words_of(spans: Ints, sides: NDArray[np.int8], starts: NDArray[np.int64]) -> Ints:
    """The word that holds the last character of each token."""
    owners = np.searchsorted(starts, np.maximum(spans[:, 1] - 1, 0), side="right") - 1
    return np.where((sides == NOBODY) | (spans[:, 0] == spans[:, 1]), -1, owners).astype(np.int32)
