"""The plain files of a run, read without trust: what is missing, cut short or odd is noted, never an error.

Idea: a report is wanted most when something went wrong, so reading must not fail where writing did. Every value passes
one of the small functions below before it is used: a number that is not finite, a text where a list should be, an
unknown event are all possible in the directory of a run that was ended by force.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RunFiles:
    """What a run directory holds, as far as it can be read; `problems` says in words what could not be."""

    run: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    problems: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind in order of steps; of a step that ran twice (before and after a resume) the later."""
        found = {step: event for event in self.events if event.get("kind") == kind and (step := step_of(event)) >= 0}
        return [found[step] for step in sorted(found)]


def read_run(run: Path) -> RunFiles:
    files = RunFiles(run)
    files.events = _read_lines(files, "events.jsonl", "there are no curves")
    files.samples = _read_lines(files, "samples.jsonl", "there are no answers to compare")
    summary = _read_json(files, "summary.json", "the run has not finished, or was ended before it could say so")
    files.summary = mapping(summary)
    files.status = mapping(_read_json(files, "status.json", ""))
    files.environment = mapping(_read_json(files, "environment.json", ""))
    worst = _read_json(files, "worst_rows.json", "") or []
    files.worst = [entry for entry in listing(worst) if isinstance(entry, dict)]
    files.recipe = _read_text(files, "recipe.yaml", "the recipe cannot be shown") or ""
    return files


def _read_text(files: RunFiles, name: str, without: str) -> str | None:
    try:
        return (files.run / name).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        if without:
            files.problems.append(f"{name} is missing: {without}.")
    except OSError as error:
        files.problems.append(f"{name} cannot be read: {error.strerror}.")
    return None


def _read_json(files: RunFiles, name: str, without: str) -> Any:
    text = _read_text(files, name, without)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        files.problems.append(f"{name} is not complete JSON and was left out.")
        return None


def _read_lines(files: RunFiles, name: str, without: str) -> list[dict[str, Any]]:
    found, broken = [], 0
    for line in (_read_text(files, name, without) or "").split("\n"):
        try:
            content = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            broken += 1
        elif content:
            found.append(content)
    if broken:
        lines = "1 line was" if broken == 1 else f"{broken:,} lines were"
        files.problems.append(f"{name}: {lines} cut short or unreadable and left out.")
    return found


def number(value: Any) -> float | None:
    """A finite number, or None. Numbers that are not finite are written as texts and are no points of a curve."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return None
    # A denormal would make an axis without ticks; at this size it is 0 to every reader.
    return float(value) if math.fabs(value) > 1e-300 else 0.0


def first_of(*values: Any) -> float | None:
    """The first that is a finite number."""
    return next((found for value in values if (found := number(value)) is not None), None)


def text_of(value: Any) -> str:
    """Text as it is; nothing for None; anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def step_of(event: dict[str, Any]) -> int:
    """The step of an event, or -1."""
    step = number(event.get("step"))
    return -1 if step is None else round(step)
