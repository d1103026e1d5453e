"""What a report says of a judge: how many pairs became preferences, how its places weigh, and some of what it said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from luthier.core.units import percent_text
from luthier.store.report_answers import clip
from luthier.store.report_files import mapping, number, text_of

_SHOWN: Final = 3
_LABELS: Final = (
    ("pairs", "Pairs of answers"), ("preferences", "Became preferences"), ("same_answer", "One answer twice, or none"),
    ("ties", "Ties to the judge"), ("failed", "Without a verdict"), ("cut_off", "Answers cut off"),
)  # fmt: skip


def feedback_of(folder: Path | None) -> dict[str, Any] | None:
    """The figures and the first preferences of a run of AI feedback; None where there are none to read."""
    if folder is None:
        return None
    try:
        figures = mapping(json.loads((folder / "feedback.json").read_text("utf-8")))
        lines = (folder / "preferences.jsonl").read_text("utf-8", errors="replace").splitlines()[:_SHOWN]
        rows = [mapping(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return None
    table = [(label, f"{count:,.0f}") for key, label in _LABELS if (count := number(figures.get(key))) is not None]
    bias, placed, sure = (number(figures.get(key)) for key in ("position_bias", "decided_by_place", "certainty"))
    if bias is not None:
        table.append(("The first place is preferred by", f"{bias:+.3f}"))
    if placed is not None:
        table.append(("Pairs decided by the place", percent_text(placed)))
    if sure is not None:
        table.append(("How sure the judge was", percent_text(sure)))
    return {"table": table, "rows": [_shown(row) for row in rows]}


def _shown(row: dict[str, Any]) -> dict[str, str]:
    sure = number(row.get("probability"))
    told = {key: clip(text_of(row.get(key))) for key in ("prompt", "chosen", "rejected", "rationale")}
    return {**told, "sure": "" if sure is None else percent_text(sure)}
