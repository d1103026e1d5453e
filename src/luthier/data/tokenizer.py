"""Text to token ids and back, with everything the renderer must know about a tokenizer.

Idea: what ends a turn, whether a BOS is added, and which ids are control tokens are read once, from the files, and are
then plain fields. Padding is never looked at: nothing in luthier infers a mask from an id. Nothing that could run code
is loaded: only fast tokenizers, no remote code, no pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np

from luthier.core.errors import DataError, UnsafeArtifactError
from luthier.data.covering import closed
from luthier.data.forest import Ints
from luthier.data.hub import ModelFiles
from luthier.data.known_tokenizers import known_tokenizer, remember_tokenizer
from luthier.data.spellings import Spellings
from luthier.data.tokenizer_facts import TokenizerFacts
from luthier.data.tokenizer_files import read_tokenizer, stop_ids
from luthier.data.words import Words


@dataclass(frozen=True, slots=True)
class Specials:
    """The control tokens: ids, those that may end a turn, what finds their texts, and which swallow white space."""

    ids: frozenset[int]
    ends: frozenset[int]
    pattern: re.Pattern[str] | None
    texts: frozenset[str]
    swallow_left: frozenset[str]
    swallow_right: frozenset[str]
    firsts: tuple[str, ...]
    """The characters that these texts begin with."""

    @classmethod
    def of(cls, facts: TokenizerFacts) -> Specials:
        """Those that a tokenizer's facts tell of."""
        pattern = "(" + "|".join(re.escape(text) for text in facts.texts) + ")"
        return cls(
            ids=frozenset(facts.special_ids),
            ends=facts.ends,
            pattern=re.compile(pattern) if facts.texts else None,
            texts=frozenset(facts.texts),
            swallow_left=frozenset(facts.swallow_left),
            swallow_right=frozenset(facts.swallow_right),
            firsts=tuple(sorted({text[:1] for text in facts.texts})),
        )

    def split(self, text: str) -> list[str]:
        """`text` cut at control tokens: text, token, text, token, ..., text."""
        return self.pattern.split(text) if self.pattern else [text]

    def within(self, text: str) -> bool:
        """Whether `text` holds the text of a control token."""
        if self.pattern is None:
            return False
        for first in self.firsts:
            if first in text:  # seldom, and found much faster
                return self.pattern.search(text) is not None
        return False


@final
@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer as luthier uses it; make one with `load` or `of`. `backend` is that of the tokenizers library.

    `eos_ids` are the tokenizer's own eos, first, and those of generation_config.json; `stop_ids` the same as a set.
    `prefix_space` says that a space is added before a text that follows a control token or nothing. `words` and
    `spellings` are the quick ways to tokens and back, where there are any; what comes out is the same either way.
    """

    backend: Any = field(repr=False, compare=False)
    facts: TokenizerFacts = field(repr=False)
    specials: Specials = field(repr=False)
    words: Words | None = field(repr=False, compare=False)
    spellings: Spellings | None = field(repr=False, compare=False)
    _whole: Callable[[], Any] = field(repr=False, compare=False)
    _write: Callable[[Path], object] = field(repr=False, compare=False)

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """The tokenizer in a folder, or of a hub id (from the hub cache alone when HF_HUB_OFFLINE is set).

        Raises MissingError when there is none, UnsafeArtifactError for one that needs code, CorruptError for damage.
        """
        files = ModelFiles.of(source)
        known = known_tokenizer(files)
        if known is not None:
            return cls._of(known.core, known.facts, lambda: read_tokenizer(files), known.save)
        raw = read_tokenizer(files)
        made = cls.of(raw, generation_eos=stop_ids(files.json("generation_config.json")))
        remember_tokenizer(files, raw, made.facts)
        return made

    @classmethod
    def of(cls, raw: Any, *, generation_eos: Sequence[int] = ()) -> Tokenizer:
        """A transformers tokenizer that is already in memory."""
        if not getattr(raw, "is_fast", False):
            raise UnsafeArtifactError(
                f"{type(raw).__name__} is a tokenizer without character offsets",
                allowed="tokenizers that have a tokenizer.json",
                do="convert it once with the tokenizers library and save it",
            )
        # A tokenizer.json may carry settings that cut texts short without a word.
        raw.backend_tokenizer.no_truncation()
        raw.backend_tokenizer.no_padding()
        facts = TokenizerFacts.of(raw, generation_eos)
        return cls._of(raw.backend_tokenizer, facts, lambda: raw, lambda folder: raw.save_pretrained(str(folder)))

    @classmethod
    def _of(
        cls, backend: Any, facts: TokenizerFacts, whole: Callable[[], Any], write: Callable[[Path], object]
    ) -> Tokenizer:
        return cls(
            backend=backend,
            facts=facts,
            specials=Specials.of(facts),
            words=Words.of(backend),
            spellings=Spellings.of(backend),
            _whole=cache(whole),
            _write=write,
        )

    @property
    def raw(self) -> Any:
        """The transformers object. Of a tokenizer that is known it is made when it is first asked for."""
        return self._whole()

    @property
    def digest(self) -> str:
        return self.facts.digest

    @property
    def bos_id(self) -> int | None:
        return self.facts.roles.get("bos")

    @property
    def unknown_id(self) -> int | None:
        return self.facts.roles.get("unk")

    @property
    def pad_id(self) -> int | None:
        return self.facts.roles.get("pad")

    @property
    def mask_id(self) -> int | None:
        return self.facts.roles.get("mask")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.facts.eos_ids

    @property
    def adds_bos(self) -> bool:
        return self.facts.adds_bos

    @property
    def chat_template(self) -> str | None:
        return self.facts.chat_template

    @property
    def vocabulary_size(self) -> int:
        return self.facts.vocabulary_size

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens and their ids, those that were added among them."""
        return dict(self.backend.get_vocab(with_added_tokens=True))

    @property
    def prefix_space(self) -> bool:
        return self.facts.prefix_space

    @property
    def special_ids(self) -> frozenset[int]:
        return self.specials.ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids at which generation stops without being told more."""
        return frozenset(self.eos_ids)

    @property
    def eos_id(self) -> int | None:
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """What a chat template may name: bos_token, eos_token, ... as text."""
        return dict(self.facts.named)

    def encode(self, text: str) -> tuple[Ints, Ints]:
        """The ids (n,) of `text` and their character spans (n, 2); no token is added."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]]:
        """Ids and spans of each text, as `encode` gives them; many at once take less time than one by one.

        Raises DataError for half of a surrogate pair, as Python makes of bytes that are no UTF-8.
        """
        try:
            made = self.words.encode(texts) if self.words is not None else None
            if made is not None:
                return made
            return [
                (np.array(one.ids, np.int32), np.array(one.offsets, np.int32).reshape(-1, 2))
                for one in self.backend.encode_batch(list(texts), add_special_tokens=False)
            ]
        except (UnicodeEncodeError, TypeError):
            _require_characters(texts)
            raise

    def encode_closed(self, texts: Sequence[str]) -> list[tuple[Ints, Ints]]:
        """Ids and spans of each text, the spans such that they cover it, as `covering.closed` makes them."""
        try:
            made = self.words.encode(texts, closing=True) if self.words is not None else None
        except (UnicodeEncodeError, TypeError):
            _require_characters(texts)
            raise
        if made is not None:
            if self.spellings is not None:
                self.spellings.foresee([ids for ids, _ in made])  # whoever checks them reads them back
            return made
        return [(ids, closed(spans, text)) for text, (ids, spans) in zip(texts, self.encode_many(texts), strict=True)]

    def encode_after(self, before: Ints, text: str) -> tuple[Ints, Ints] | None:
        """The ids of `text` as a continuation of the ids `before`; None when no encoding reads as that text there."""
        start = self.decode(before)
        # An encoding on its own may begin with an added space; behind a line break or a letter it does not.
        for anchor in ("", "\n", "a"):
            ids, spans = self.encode(anchor + text)
            skip = int(np.searchsorted(spans[:, 1], len(anchor), side="right")) if anchor else 0
            if anchor and (skip == 0 or (skip < len(ids) and spans[skip, 0] < len(anchor))):
                continue
            read = self.decode(np.concatenate([before, ids[skip:]]))
            if read.startswith(start) and self._says(read[len(start) :], text, begins=False):
                return ids[skip:], np.maximum(spans[skip:] - len(anchor), 0)
        return None

    def decode(self, ids: Sequence[int] | Ints) -> str:
        """The text of `ids`, control tokens included, nothing cleaned up."""
        if self.spellings is not None:
            return self.spellings.text(ids if isinstance(ids, np.ndarray) else [int(token) for token in ids])
        plain = ids.tolist() if isinstance(ids, np.ndarray) else [int(token) for token in ids]
        # Not through `raw.decode`, which looks at the type of each id before it makes this same call.
        return str(self.backend.decode(plain, skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """The text of one token as it reads inside a text (with its leading space, where it has one)."""
        return self.decode([token, token])[len(self.decode([token])) :]

    def differing(self, other: Tokenizer) -> list[str]:
        """The tokens that are not the same number in both vocabularies."""
        own, theirs = self.vocabulary, other.vocabulary
        return sorted(token for token in {*own, *theirs} if own.get(token) != theirs.get(token))

    def reads_as(self, ids: Sequence[int] | Ints, text: str) -> bool:
        """Whether `ids` say exactly `text`.

        The only liberties are those the tokenizer itself declares: white space swallowed by a control token, and the
        space it adds before a text that follows a control token or nothing.
        """
        return self._says(self.decode(ids), text, begins=True)

    def reads_alike(self, ids: Sequence[int] | Ints, text: str) -> bool:
        """Whether `ids` say `text` as far as this tokenizer tells texts apart.

        That is but for what its normalizer folds (capitals, accents), for white space, and for what it does not know.
        """
        if self.reads_as(ids, text):
            return True
        wanted = _squeezed("".join(map(self._normal, self.specials.split(text))))
        unknown = self.unknown_id
        known: list[list[int]] = [[]]
        for token in map(int, ids):
            known.append([]) if token == unknown else known[-1].append(token)
        said = [_squeezed(self._spelled(part)) for part in known]
        if len(said) == 1:
            return said[0] == wanted
        if not wanted.startswith(said[0]):
            return False
        at = len(said[0])
        for part in said[1:-1]:
            at = wanted.find(part, at)
            if at < 0:
                return False
            at += len(part)
        return len(wanted) - at >= len(said[-1]) and wanted.endswith(said[-1])

    def _normal(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return text if normalizer is None or text in self.specials.texts else str(normalizer.normalize_str(text))

    def _spelled(self, ids: Sequence[int]) -> str:
        """The letters of `ids`. A decoder of word pieces changes words (do not, don't), so those are put together."""
        model = self.backend.model
        prefix = getattr(model, "continuing_subword_prefix", None) if type(model).__name__ == "WordPiece" else None
        if prefix is None:
            return self.decode(ids)
        return "".join(str(self.backend.id_to_token(token)).removeprefix(prefix) for token in ids)

    def _says(self, decoded: str, text: str, *, begins: bool) -> bool:
        if decoded == text:
            return True
        found, wanted = self.specials.split(decoded), self.specials.split(text)
        if len(found) != len(wanted) or found[1::2] != wanted[1::2]:
            return False
        for index in range(0, len(wanted), 2):
            before = wanted[index - 1] if index else ""
            after = wanted[index + 1] if index + 1 < len(wanted) else ""
            free = self.prefix_space and (begins or index > 0)
            if not self._same(found[index], wanted[index], before=before, after=after, prefix_space=free):
                return False
        return True

    def _same(self, found: str, wanted: str, *, before: str, after: str, prefix_space: bool) -> bool:
        if found == wanted or (prefix_space and found == " " + wanted):
            return True
        if before in self.specials.swallow_right:
            found, wanted = found.lstrip(), wanted.lstrip()
        if after in self.specials.swallow_left:
            found, wanted = found.rstrip(), wanted.rstrip()
        return found == wanted or (prefix_space and not before and " " + found == wanted)

    def save(self, folder: Path, *, chat_template: str | None = None) -> None:
        """Write the tokenizer's files beside a model, with `chat_template` in the place of its own when given."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        # The class that every version of transformers has, and that reads tokenizer.json as it stands, as we do.
        path = folder / "tokenizer_config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _squeezed(text: str) -> str:
    """A text without white space, also where a tokenizer writes it as a sign of its own."""
    return "".join(text.replace("\u2581", " ").split())


def _require_characters(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as failure:
            what = text[failure.start]
            byte = f", the byte {ord(what) - 0xDC00:#x}" if 0xDC80 <= ord(what) <= 0xDCFF else ""
            raise DataError(
                f"a text has {what!r}{byte} at character {failure.start + 1}, which is no character",
                allowed="whole characters",
                do="give the text in UTF-8",
            ) from None
