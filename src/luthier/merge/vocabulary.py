"""One vocabulary for parents that have several: rows of embedding and head are matched by the text of their tokens.

Idea: two tunes of one base differ in the tokens that were added to them, and one text may have two numbers. The merged
model has the tokens of the first parent under their numbers, and those that others have added behind them. Each row is
merged from the parents that know its token; what a parent does not know is filled with the mean of those that do, so
that it moves nothing. Tokens that were not added but belong to another way of cutting text cannot be put together: with
`first` they are left out, and counted.

Use when: models are merged. It reads tokenizer.json as it stands, and needs no tokenizer library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final

import numpy as np
from jaxtyping import Int

from luthier.core.errors import CorruptError, RecipeError
from luthier.data.hub import ModelFiles, read_bytes
from luthier.merge.parents import TOKENIZER, Parent
from luthier.model.editing.role_names import tensor_roles

MAX_TOKENIZER: Final = 256 * 1024 * 1024
Choice = Literal["auto", "first", "union"]
_SHOWN: Final = 3


@final
@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model: their numbers by text, and how those were added that do not come from its base."""

    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    whole: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, files: ModelFiles) -> Vocabulary | None:
        """What tokenizer.json says; None where there is none. Raises CorruptError for a file that says nothing."""
        path = files.find(TOKENIZER)
        if path is None:
            return None
        try:
            whole = json.loads(read_bytes(path, most=MAX_TOKENIZER))
            own = whole["model"]["vocab"]
            pairs = own.items() if isinstance(own, dict) else ((entry[0], place) for place, entry in enumerate(own))
            added = {str(entry["content"]): entry for entry in whole.get("added_tokens") or ()}
            numbers = {str(text): int(number) for text, number in pairs}
            numbers |= {text: int(entry["id"]) for text, entry in added.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as failure:
            raise CorruptError(f"no tokenizer: {type(failure).__name__}: {failure}", where=str(path),
                               do="fetch the file again") from None  # fmt: skip
        return cls(numbers, added, whole)


@final
@dataclass(frozen=True)
class United:
    """Rows by parent (none where all vocabularies are one), tokens that were added to the first's, and what to tell."""

    rows: Mapping[int, Int[np.ndarray, " rows"]] = field(default_factory=dict)
    count: int = 0
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def united(parents: Sequence[Parent], choice: Choice) -> United:
    """The vocabulary of a merge, whose first tokens are those of the first parent.

    Raises RecipeError where vocabularies cannot be put together.
    """
    heights = [_height(parent) for parent in parents]
    if _one_file(parents) and len(set(heights)) == 1:
        return United()
    known = [Vocabulary.of(parent.texts) for parent in parents]
    if lacking := [parent.name for parent, own in zip(parents, known, strict=True) if own is None]:
        if len(set(heights)) == 1:
            return United(notices=(f"tokenizer: {', '.join(lacking)} has no {TOKENIZER}; rows are matched by number",))
        raise RecipeError(f"{lacking[0]} has no {TOKENIZER}, and embeddings have {heights} rows",
                          allowed="tokenizers to match rows by, or embeddings of one size")  # fmt: skip
    whole = [own for own in known if own is not None]
    if all(own.numbers == whole[0].numbers for own in whole) and len(set(heights)) == 1:
        return United()
    return _matched(parents, whole, heights, choice)


def _matched(
    parents: Sequence[Parent], known: Sequence[Vocabulary], heights: Sequence[int], choice: Choice
) -> United:
    numbers = dict(known[0].numbers)
    more: dict[str, Mapping[str, Any]] = {}
    notices = []
    for parent, own in zip(parents[1:], known[1:], strict=True):
        new = [text for text in own.numbers if text not in numbers]
        deep = [text for text in new if text not in own.added]
        if deep and choice != "first":
            raise RecipeError(
                f"{parent.name} cuts text otherwise than {parents[0].name}: {len(deep):,} tokens of its vocabulary "
                f"({_some(deep)}) are unknown there and were not added later",
                allowed="tokenizers that differ in added tokens",
                do="to keep the first's tokenizer and leave these out: --set tokenizer=first",
            )
        if choice == "first":
            if new:
                notices.append(f"tokenizer: {len(new):,} tokens of {parent.name} ({_some(new)}) are left out")
            continue
        behind = max(numbers.values(), default=-1) + 1
        for place, text in enumerate(new, behind):
            numbers[text] = place
            more[text] = {**own.added[text], "id": numbers[text]}
        if new:
            notices.append(f"tokenizer: {len(new):,} tokens of {parent.name} ({_some(new)}) are added to the first's")
    count = max(heights[0], max(numbers.values()) + 1)
    rows = {}
    for place, (parent, own) in enumerate(zip(parents, known, strict=True)):
        rows[place] = _rows(numbers, own.numbers, count, heights[place])
        lacks = sum(text not in own.numbers for text in numbers)
        moved = sum(own.numbers.get(text, number) != number for text, number in numbers.items())
        if lacks or moved:
            notices.append(f"tokenizer: {parent.name} lacks {lacks:,} of {len(numbers):,} tokens, and has {moved:,} "
                           "under another number; rows are matched by text")  # fmt: skip
    return United(rows, count, more, tuple(notices))


def _rows(numbers: Mapping[str, int], own: Mapping[str, int], count: int, height: int) -> Int[np.ndarray, " rows"]:
    """For each row of the result the parent's row; -1 where it has none. Rows that no token has keep their number."""
    found = np.full(count, -1, np.int64)
    taken = set(own.values())
    tokens = set(numbers.values())
    for row in range(count):
        if row not in tokens and row < height and row not in taken:
            found[row] = row
    for text, number in numbers.items():
        row = own.get(text, -1)
        found[number] = row if row < height else -1
    return found


def _height(parent: Parent) -> int:
    """Rows of the embedding; 0 where there is none that is known by its name."""
    return next((slot.rows for name, slot in parent.shards.slots.items() if "embed" in tensor_roles(name)), 0)


def _one_file(parents: Sequence[Parent]) -> bool:
    paths = [parent.texts.find(TOKENIZER) for parent in parents]
    if any(path is None for path in paths):
        return False
    texts = (read_bytes(path, most=MAX_TOKENIZER) for path in paths if path is not None)
    first = next(texts)
    return all(text == first for text in texts)


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text)[:40] for text in texts[:_SHOWN])
    return shown + (", ..." if len(texts) > _SHOWN else "")
