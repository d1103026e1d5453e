"""An explicit mapping of columns: the format of files whose column names nobody can guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.conversation import Content, Meaning, Text
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import exchange
from luthier.data.formats._compared import judged
from luthier.data.formats._fields import column, filled
from luthier.data.formats.asked import asked
from luthier.data.formats.choices import choices
from luthier.data.formats.labelled import labelled
from luthier.data.formats.preference import pair
from luthier.data.formats.tagged import tagged

SHAPES: Mapping[frozenset[str], Meaning] = {
    frozenset({"text"}): "text",
    frozenset({"prompt", "answer"}): "conversation",
    frozenset({"prompt", "answer", "system"}): "conversation",
    frozenset({"text", "label"}): "labelled",
    frozenset({"text", "pair", "label"}): "labelled",
    frozenset({"words", "tags"}): "tagged",
    frozenset({"prompt", "choices", "answer"}): "choices",
    frozenset({"prompt", "chosen", "rejected"}): "preference",
    frozenset({"chosen", "rejected"}): "preference",
    frozenset({"prompt", "answer", "good"}): "judged",
    frozenset({"prompt"}): "asked",
    frozenset({"prompt", "system"}): "asked",
}
"""The roles that columns may have together, and what rows then mean."""
KEYS = (
    "prompt", "answer", "system", "text", "label", "pair", "words", "tags", "choices", "chosen", "rejected",
    "good",
)  # fmt: skip


@final
@dataclass(frozen=True)
class Mapped(Format):
    """Columns by name, together as one of `SHAPES`."""

    names: Mapping[str, str]

    title: ClassVar[str] = "columns named in the recipe"
    specificity: ClassVar[int] = 100
    example: ClassVar[str] = "{prompt: COLUMN, answer: COLUMN} or {text: COLUMN}"
    known: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def checked(cls, columns: Mapping[str, str]) -> Mapped:
        """A mapping that makes sense. Raises RecipeError for unknown keys and for half a pair."""
        for key, name in columns.items():
            if key not in KEYS:
                raise RecipeError(f"data.columns has the unknown key {key!r}", do=did_you_mean(str(key), KEYS))
            if not isinstance(name, str) or not name:
                raise RecipeError(f"data.columns.{key} is {name!r}", allowed="the name of a column")
        if frozenset(columns) not in SHAPES:
            raise RecipeError(
                f"data.columns names {', '.join(columns) or 'nothing'}",
                allowed="prompt and answer (and system), or text alone; text (and pair) and label; words and tags; "
                "prompt, choices and answer; chosen and rejected (and prompt); prompt, answer and good; prompt alone",
            )
        return cls({key: columns[key] for key in KEYS if key in columns})

    @property
    def name(self) -> str:
        return "columns"

    @property
    def meaning(self) -> Meaning:  # type: ignore[override]
        return SHAPES[frozenset(self.names)]

    def looks_like(self, record_values: Values) -> bool:
        return all(name in record_values for name in self.columns(record_values))

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(self.names.values())

    def read(self, values: Values, where: str) -> Content:
        names = self.names
        meaning = self.meaning
        if meaning == "text":
            return Text(filled(column(values, names["text"], where), (names["text"],), where, what="the text"))
        if meaning == "labelled":
            texts = tuple(names[key] for key in ("text", "pair") if key in names)
            return labelled(values, texts, names["label"], where)
        if meaning == "tagged":
            return tagged(values, names["words"], names["tags"], where)
        if meaning == "choices":
            return choices(values, (names["prompt"], names["choices"], names["answer"]), where)
        if meaning == "preference":
            return pair(values, (names.get("prompt"), names["chosen"], names["rejected"]), where, scores=None)
        if meaning == "judged":
            return judged(values, (names["prompt"], names["answer"], names["good"]), where)
        if meaning == "asked":
            return asked(values, names["prompt"], where, system=names.get("system"))
        question, answered = column(values, names["prompt"], where), column(values, names["answer"], where)
        system = column(values, names["system"], where) if "system" in names else None
        return exchange(question, answered, ((names["prompt"],), (names["answer"],)), where, system=system)
