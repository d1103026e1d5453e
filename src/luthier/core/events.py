"""Events: what a run says of itself while it runs.

An event has a kind (`step`, `evaluation`, `checkpoint`, `bad_step`, ...), plain values and, where it has one, the step
it belongs to. Whoever wants to know implements `Recorder`: a run directory writes lines, a terminal shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final


@final
@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run. `values` are plain: numbers, texts, lists and mappings of them."""

    kind: str
    values: Mapping[str, Any]
    step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The event as one flat mapping that JSON can hold."""
        head: dict[str, Any] = {"kind": self.kind} if self.step is None else {"kind": self.kind, "step": self.step}
        return {**head, **{key: plain(value) for key, value in self.values.items() if key not in ("kind", "step")}}


class Recorder(Protocol):
    """Takes events."""

    def record(self, event: Event) -> None:
        """Take one event; it may be shown, written or counted, but never changed."""


@final
class Several:
    """A recorder that hands every event to several others, in order."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self.recorders = tuple(recorders)

    def record(self, event: Event) -> None:
        for recorder in self.recorders:
            recorder.record(event)


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: numbers that are not finite become `"NaN"`, `"Infinity"`, `"-Infinity"`.

    JSON has no such numbers, and a null or a 0 in their place would hide them.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
