"""An explicit mapping of columns: the format of files whose column names nobody can guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.conversation import Content, Text
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import exchange
from luthier.data.formats._fields import column, filled

KEYS = ("prompt", "answer", "system", "text")


@final
@dataclass(frozen=True)
class Mapped(Format):
    """Columns by name: `text` alone, or `prompt` and `answer`, perhaps with `system`."""

    prompt: str = ""
    answer: str = ""
    system: str = ""
    text: str = ""

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
        if set(columns) not in ({"text"}, {"prompt", "answer"}, {"prompt", "answer", "system"}):
            raise RecipeError(
                f"data.columns names {', '.join(columns) or 'nothing'}", allowed="prompt and answer, or text alone"
            )
        return cls(**{key: columns[key] for key in columns})

    @property
    def name(self) -> str:
        return "columns"

    def looks_like(self, record_values: Values) -> bool:
        return all(name in record_values for name in self.columns(record_values))

    def columns(self, values: Values) -> tuple[str, ...]:
        return tuple(name for name in (self.prompt, self.answer, self.system, self.text) if name)

    def read(self, values: Values, where: str) -> Content:
        if self.text:
            return Text(filled(column(values, self.text, where), (self.text,), where, what="the text"))
        asked, answered = column(values, self.prompt, where), column(values, self.answer, where)
        system = column(values, self.system, where) if self.system else None
        return exchange(asked, answered, ((self.prompt,), (self.answer,)), where, system=system)
