"""What rendering did: rows, views, tokens, and what there was to notice, counted, with the first row of each notice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, final


@final
@dataclass(slots=True)
class RenderCounts:
    """What rendering did so far. `answers_too_long` are views dropped because not even their answer fits."""

    rows: int = 0
    views: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: int = 0
    answers_too_long: int = 0
    truncated: int = 0
    notices: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False)
    """For each notice the address of the first row it was given for, and what came there."""

    def notice(self, text: str, example: tuple[str, str]) -> None:
        """Count what there is to notice; `example` is the address of a row and what came there."""
        self.notices[text] = self.notices.get(text, 0) + 1
        self.examples.setdefault(text, example)

    def copy(self) -> RenderCounts:
        """The counts as they are now."""
        # Once a row: dataclasses.replace takes ten times as long.
        return RenderCounts(
            self.rows,
            self.views,
            self.tokens,
            self.trained_tokens,
            self.dropped,
            self.answers_too_long,
            self.truncated,
            dict(self.notices),
            dict(self.examples),
        )

    def as_dict(self) -> dict[str, Any]:
        """What was counted, as plain values; without the examples."""
        values = asdict(self)
        del values["examples"]
        return values
