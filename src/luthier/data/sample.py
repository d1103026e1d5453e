"""A sample: what a model answered to a prompt, with what the data row knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.core.errors import DataError
from luthier.data.conversation import Message


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An answer to a prompt; `ended` is "stop" or "length", `facts` are the other columns of the data row.

    Where the data row writes its prompt as a text, that is `text`, whatever messages a chat makes of it.
    """

    prompt: tuple[Message, ...] | str
    answer: str
    tokens: tuple[int, ...] = ()
    ended: str = "stop"
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None

    @property
    def plain(self) -> str | None:
        """The prompt where it is a text; None for messages."""
        return self.prompt if isinstance(self.prompt, str) else self.text

    @property
    def said(self) -> str:
        """The answer without what was thought: what follows the last </think>, and nothing while thinking goes on."""
        said = self.answer.rpartition("</think>")[2]
        return "" if "<think>" in said else said.strip()

    def fact(self, column: str) -> Any:
        """What the data row says in a column. Raises DataError where it has none."""
        if column not in self.facts:
            raise DataError(f"the row has no column {column!r}", allowed=f"one of {', '.join(self.facts) or 'none'}")
        return self.facts[column]
