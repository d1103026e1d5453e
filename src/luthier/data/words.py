"""Words: the tokens of a text, put together from the tokens of its words.

Idea: a byte-level tokenizer cuts a text into words with one pattern and makes tokens of each word alone, so a word that
comes again has the tokens it had before. The tokenizer itself is asked once for each different word, and a text is
then a look-up: several times as fast as the tokenizer on the whole text, and the same ids and spans.

What could differ is only where the words are cut. So the patterns are those that are listed here, word for word, and
only ASCII is cut by Python's own regular expressions, where letters, digits and white space are the same for everybody.
Whatever else stands in a text goes to the tokenizer with its surroundings, from a letter before a space to the next
one: no listed pattern makes one word across such a place, or looks back over it. Anything else about a tokenizer that
would let a neighbour change a word's tokens (another kind, a space added in front, tokens that swallow white space)
means that there are no words for it, and the tokenizer does all the work.

Of much text, cutting and looking up is done in C++ (`kernels/words.py`), where there is a compiler.

Source: the pre-tokenizers of the tokenizers library (ByteLevel, Split) and the patterns of GPT-2, Llama 3 and Qwen 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, filterfalse, pairwise
from threading import Lock
from typing import Any, Final, NamedTuple, final

import numpy as np

from luthier.core.errors import MissingError
from luthier.data.covering import closed
from luthier.data.forest import Ints
from luthier.data.spellings import BYTE_OF
from luthier.data.word_patterns import PATTERNS, ascii_pattern, is_plain, pattern_of
from luthier.kernels.words import ORDER, Encoded, Joined, NativeWords, is_compiled

_OTHER: Final = re.compile(r"[^\x00-\x7f]+")
_CUT: Final = re.compile(r"[A-Za-z](?=[ \n])")
_MUCH: Final = 2**20
"""Characters after which it pays to compile; what is compiled is used from the first one on."""
_SLICE: Final = 2**20
"""Characters that are looked up at once: a word costs about ten times its characters in memory."""
_MOST_WORDS, _MOST_TOKENS = 2**17, 2**20
"""What is remembered, at most, about 30 MB; then it begins anew."""
_RECORD_BYTES: Final = 12
_GAP: Final = "\uffff"
"""What stands between words of ASCII that are written at once."""
_LETTERS: Final = {byte: letter for letter, byte in BYTE_OF.items()}
"""The letter that a byte-level tokenizer writes for each byte."""


@final
class Words:
    """The words of one tokenizer seen so far, with their tokens. Make one with `of`; several threads may use it."""

    def __init__(self, backend: Any, pattern: str, added: Sequence[str]) -> None:
        self._backend = backend
        self._pattern = pattern
        self._find = re.compile(ascii_pattern(pattern), re.ASCII).findall
        longest_first = sorted(added, key=len, reverse=True)
        self._specials = frozenset(added)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        self._lock = Lock()
        self._seen = 0
        self._native: NativeWords | None = None
        self._may_build = True
        self._least: int | None = None
        self._begin()

    @classmethod
    def of(cls, backend: Any) -> Words | None:
        """The words of a `tokenizers.Tokenizer`; None where its tokens are not known to be those of its words."""
        pattern = pattern_of(backend)
        added = list(backend.get_added_tokens_decoder().values())
        plain_tokens = not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized or not token.content
            # A text is cut there, and would be in the middle of this token.
            or _CUT.search(token.content)
            for token in added
        )
        if pattern is None or not plain_tokens or not is_plain(backend):
            return None
        return cls(backend, pattern, [token.content for token in added])

    def encode(self, texts: Sequence[str], *, closing: bool = False) -> list[tuple[Ints, Ints]] | None:
        """The ids (n,) of each text and their character spans (n, 2); None when its words do not add up to it.

        With `closing` the spans cover the text, as `covering.closed` makes them.
        """
        with self._lock:
            made, covered = self._encoded(texts)
        if made is None or covered or not closing:
            return made
        return [(ids, closed(spans, text)) for text, (ids, spans) in zip(texts, made, strict=True)]

    def encode_begun(self, texts: Joined, begun: Sequence[tuple[int, int]]) -> Encoded | None:
        """The tokens of texts, and of beginnings: of a text up to one of its characters; with spans that cover them.

        None where they are not many enough to be cut in C++, too many, or words do not add up to one of them.
        """
        with self._lock:
            native = self._built() if len(texts.raw) <= _SLICE else None
            made = None if native is None else self._quickly(native, texts, begun)
        if made is None or made.covered:
            return made
        said = [*texts.texts, *(texts.texts[like][:stop] for like, stop in begun)]
        for text, (start, end) in zip(said, pairwise([0, *made.ends.tolist()]), strict=True):
            made.spans[start:end] = closed(made.spans[start:end], text)
        return made

    @property
    def sizes(self) -> tuple[int, int]:
        """The words that are remembered, and their tokens."""
        return (len(self._known), self._size) if self._native is None else self._native.sizes

    def forget(self) -> None:
        """Let go of the words: they are of use only while many texts are encoded."""
        with self._lock:
            self._begin()

    def _encoded(self, texts: Sequence[str]) -> tuple[list[tuple[Ints, Ints]] | None, bool]:
        """The tokens of texts, and whether their spans are known to cover them."""
        beginnings = _beginnings(texts)
        rests = [text[begun.stop :] if begun.stop else text for text, begun in zip(texts, beginnings, strict=True)]
        if sum(map(len, rests)) <= _SLICE and (native := self._built()) is not None:
            return self._with_beginnings(native, texts, beginnings)
        made: list[tuple[Ints, Ints]] = []
        for group in _groups(rests):
            parts = self._looked_up(group)
            if parts is None:
                return None, False
            made += parts
        return _continued(beginnings, _whole(rests, made)), False

    def _begin(self) -> None:
        # For each word its tokens, as bytes. Three int32 each: the id, how far the token begins behind the end of the
        # one before (-1 in the middle of a character), and how many characters it has.
        self._known: dict[str, bytes] = {}
        self._size = 0
        if self._native is not None:
            self._native.clear()

    def _looked_up(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]] | None:
        """The ids and spans of each text; None when its words do not add up to it."""
        if (native := self._built()) is not None:
            found = self._quickly(native, Joined.of(texts), ())
            return None if found is None else _apart(found)
        self._seen += sum(map(len, texts))
        cut = [self._cut(text) for text in texts]
        known = self._known
        unknown = dict.fromkeys(chain.from_iterable(filterfalse(known.__contains__, words) for words in cut))
        if unknown:
            self._learn(list(unknown))
        records = [b"".join(map(known.__getitem__, words)) for words in cut]
        whole = np.frombuffer(b"".join(records), np.int32).reshape(-1, 3)
        ids = whole[:, 0].copy()
        spans = np.cumsum(whole[:, 1:], dtype=np.int32).reshape(-1, 2)
        made: list[tuple[Ints, Ints]] = []
        token = character = 0
        for text, record in zip(texts, records, strict=True):
            end = token + len(record) // _RECORD_BYTES
            own = spans[token:end]
            own -= character
            if (int(own[-1, 1]) if len(own) else 0) != len(text):
                return None
            made.append((ids[token:end], own))
            token, character = end, character + len(text)
        return made

    def _built(self) -> NativeWords | None:
        """The words in C++, once there is enough text for them; what was learned until then is forgotten.

        Much that was learned is forgotten too.
        """
        words, tokens = self.sizes
        if words > _MOST_WORDS or tokens > _MOST_TOKENS:
            self._begin()
        if self._native is None and self._may_build:
            if self._least is None:
                self._least = 0 if is_compiled() else _MUCH  # asked once: it takes a millisecond
            if self._seen < self._least:
                return None
            self._may_build = False
            try:
                self._native = NativeWords.build(ORDER[PATTERNS.index(self._pattern)], sorted(self._specials))
            except MissingError:
                return None  # the twin does the same, slower
            self._begin()
        return self._native

    def _quickly(
        self, native: NativeWords, texts: Joined, begun: Sequence[tuple[int, int]]
    ) -> Encoded | None:
        """The tokens of texts and of beginnings of them, all in C++; None when words do not add up to one of them."""
        for found in native.cut(texts, begun):
            for words, records, edges in self._asked([word.decode() for word in found]):
                native.put([word.encode() for word in words], records, edges[1:])
        made = native.written()
        sizes = [*map(len, texts.texts), *(stop for _, stop in begun)]
        return made if made is not None and made.characters.tolist() == sizes else None

    def _with_beginnings(
        self, native: NativeWords, texts: Sequence[str], beginnings: Sequence[_Begun]
    ) -> tuple[list[tuple[Ints, Ints]] | None, bool]:
        """What `_encoded` returns, of few enough texts."""
        whole = [place for place, begun in enumerate(beginnings) if not begun.stop]
        place_of = {place: number for number, place in enumerate(whole)}
        rest = [place for place, begun in enumerate(beginnings) if begun.stop]
        begun = [(place_of[beginnings[place].like], len(texts[place])) for place in rest]
        found = self._quickly(native, Joined.of([texts[place] for place in whole]), begun)
        if found is None:
            return None, False
        made = dict(zip([*whole, *rest], _apart(found), strict=True))
        return [made[place] for place in range(len(texts))], found.covered

    def _learn(self, words: Sequence[str]) -> None:
        """Remember the tokens of words."""
        for asked, records, edges in self._asked(words):
            raw = records.tobytes()
            for word, start, end in zip(asked, edges, edges[1:], strict=False):
                self._known[word] = raw[start * _RECORD_BYTES : end * _RECORD_BYTES]
            self._size += len(records)

    def _asked(self, words: Sequence[str]) -> Iterator[tuple[Sequence[str], Ints, list[int]]]:
        """Words in two groups, each with records of their tokens, and where those of each begin and end.

        Of a word of ASCII the tokenizer's model is asked alone: what stands before it there leaves such a word as it
        is, and takes most of the time. Of others the tokenizer is asked, for all at once, as if they stood in a list.
        """
        alone = [word for word in words if word.isascii() and word not in self._specials]
        if alone:
            yield alone, *self._asked_alone(alone)
        if len(alone) < len(words):
            others = [word for word in words if not word.isascii() or word in self._specials]
            yield others, *self._asked_whole(others)

    def _asked_alone(self, words: Sequence[str]) -> tuple[Ints, list[int]]:
        tokenize = self._backend.model.tokenize
        ids: list[int] = []
        sizes: list[int] = []
        edges = [0]
        for word in _GAP.join(words).translate(_LETTERS).split(_GAP):
            found = tokenize(word)
            ids += [token.id for token in found]
            sizes += [len(token.value) for token in found]
            edges.append(len(ids))
        records = np.zeros((len(ids), 3), np.int32)
        records[:, 0], records[:, 2] = ids, sizes
        return records, edges

    def _asked_whole(self, words: Sequence[str]) -> tuple[Ints, list[int]]:
        made = self._backend.encode(words, is_pretokenized=True, add_special_tokens=False)
        records = np.empty((len(made), 3), np.int32)
        starts, ends = np.array(made.offsets, np.int32).reshape(-1, 2).T
        counts = np.bincount(np.array(made.word_ids, np.int64), minlength=len(words))
        edges = [0, *np.cumsum(counts).tolist()]
        before = np.concatenate([[0], ends[:-1]])
        before[[edge for edge in edges[:-1] if edge < len(before)]] = 0  # spans are those in each word
        records[:, 0], records[:, 1], records[:, 2] = made.ids, starts - before, ends - starts
        return records, edges

    def _cut(self, text: str) -> list[str]:
        """The words of a text, in order."""
        words: list[str] = []
        for part, whole in self._parts(text):
            words += [part] if whole else self._find(part)
        return words

    def _parts(self, text: str) -> Iterable[tuple[str, bool]]:
        """A text in parts of ASCII, which are cut into words, and others, each of which stays whole as one word."""
        if self._added is None:
            return _ascii_parts(text)
        first, *more = self._added.split(text)
        return self._all_parts(first, more) if more else _ascii_parts(first)

    def _all_parts(self, first: str, more: Sequence[str]) -> Iterator[tuple[str, bool]]:
        """The same for a text that is `first` and then a control token and a text, again and again."""
        yield from _ascii_parts(first)
        for index, part in enumerate(more):
            if index % 2:
                yield from _ascii_parts(part)
            else:
                yield part, True


class _Begun(NamedTuple):
    """How a text begins: as the text at place `like` does up to the character `stop`; 0 where it shares nothing."""

    like: int
    stop: int


def _beginnings(texts: Sequence[str]) -> list[_Begun]:
    """For each text what it shares with an earlier one that it is the beginning of."""
    found: list[_Begun] = []
    like = -1
    for place, text in enumerate(texts):
        if like < 0 or not texts[like].startswith(text):
            like = place
        found.append(_Begun(like, 0 if like == place else _cut_before(text, 0, len(text))))
    return found


def _apart(found: Encoded) -> list[tuple[Ints, Ints]]:
    """The tokens of each text."""
    begins = [0, *found.ends.tolist()]
    return [(found.ids[start:end], found.spans[start:end]) for start, end in pairwise(begins)]


def _continued(beginnings: Sequence[_Begun], rests: Sequence[tuple[Ints, Ints]]) -> list[tuple[Ints, Ints]]:
    """The tokens of whole texts, from those of their rests."""
    made: list[tuple[Ints, Ints]] = []
    for (like, stop), (ids, spans) in zip(beginnings, rests, strict=True):
        if stop:
            count = int(np.searchsorted(made[like][1][:, 1], stop, side="right"))
            spans += stop
            ids, spans = (np.concatenate([one[:count], two]) for one, two in zip(made[like], (ids, spans), strict=True))
        made.append((ids, spans))
    return made


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, long ones in slices, as many at once as are looked up together."""
    group: list[str] = []
    size = 0
    for text in texts:
        for part in _slices(text):
            group.append(part)
            size += len(part)
            if size >= _SLICE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _slices(text: str) -> list[str]:
    """A text in parts of about `_SLICE` characters, cut where words are always cut."""
    parts: list[str] = []
    done = 0
    while len(text) - done > _SLICE and (cut := _CUT.search(text, done + _SLICE)) is not None:
        parts.append(text[done : cut.end()])
        done = cut.end()
    return [*parts, text[done:]]


def _whole(texts: Sequence[str], made: Sequence[tuple[Ints, Ints]]) -> list[tuple[Ints, Ints]]:
    """The tokens of each text, from those of its slices."""
    whole: list[tuple[Ints, Ints]] = []
    rest = iter(made)
    for text in texts:
        slices = _slices(text)
        parts = [next(rest) for _ in slices]
        start = 0
        for part, (_, spans) in zip(slices, parts, strict=True):
            spans += start
            start += len(part)
        joined = (np.concatenate([part[kind] for part in parts]) for kind in (0, 1))
        whole.append(parts[0] if len(parts) == 1 else (next(joined), next(joined)))
    return whole


def _ascii_parts(text: str) -> Iterable[tuple[str, bool]]:
    """The parts of a text without control tokens; what is not ASCII stays in one piece with its surroundings."""
    return ((text, False),) if text.isascii() else _mixed_parts(text)


def _mixed_parts(text: str) -> Iterator[tuple[str, bool]]:
    done = 0
    while (other := _OTHER.search(text, done)) is not None:
        start = _cut_before(text, done, other.start())
        cut = _CUT.search(text, other.end())
        end = cut.end() if cut else len(text)
        yield text[done:start], False
        yield text[start:end], True
        done = end
    yield text[done:], False


def _cut_before(text: str, start: int, end: int) -> int:
    """The last place in `text` from `start` to `end` where words are always cut; `start` when there is no other."""
    while True:
        end = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        if end < 0:
            return start
        before = text[end - 1]
        if before.isascii() and before.isalpha():
            return end
