"""The list of runs: one row for each run directory, read from its plain files.

Nothing is kept beside the runs: a directory that is copied here appears, one that is deleted is gone. A run that cannot
be read is a row that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import LuthierError
from luthier.store.disk import explained
from luthier.store.runs import RunDirectory, is_run

_HEAD_RECORDS: Final = 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """What a list shows of a run. Losses are None where nothing was measured."""

    name: str
    folder: str
    state: str
    problem: str = ""
    created: str = ""
    model: str = ""
    adapter: str = ""
    step: int = 0
    loss: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for `--json`."""
        return asdict(self)


def list_runs(folder: Path) -> list[RunRow]:
    """The runs in `folder`, the newest first."""
    if not folder.is_dir():
        return []
    with explained("list", folder):
        found = [path for path in sorted(folder.iterdir()) if is_run(path)]
    return sorted((summary(path) for path in found), key=lambda row: (row.created, row.name), reverse=True)


def summary(folder: Path) -> RunRow:
    """The row of one run."""
    try:
        return _read(RunDirectory.open(folder))
    except LuthierError as error:
        return RunRow(name=folder.name, folder=str(folder), state="unreadable", problem=str(error))


def _read(run: RunDirectory) -> RunRow:
    status = run.status()
    recipe = run.read_recipe() if (run.folder / "recipe.yaml").exists() else {}
    head = list(islice(run.events.read(), _HEAD_RECORDS))
    tail = run.events.tail()
    steps = [record for record in tail if record.get("kind") == "step"]
    return RunRow(
        name=run.folder.name,
        folder=str(run.folder),
        state=status.state,
        problem=status.reason,
        created=run.created,
        model=str(recipe.get("model", "")),
        adapter=_method(recipe.get("adapter")),
        step=int(steps[-1].get("step", 0)) if steps else 0,
        loss=_number(steps[-1], "loss") if steps else None,
        loss_before=_first_loss(head),
        loss_after=_first_loss(reversed(tail)),
    )


def _first_loss(records: Iterable[Mapping[str, Any]]) -> float | None:
    """The held-out loss of the first evaluation in `records`."""
    return next((_number(record, "loss") for record in records if record.get("kind") == "evaluation"), None)


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) or value in ("NaN", "Infinity", "-Infinity") else None


def _method(value: object) -> str:
    if isinstance(value, Mapping):
        return str(value.get("method", ""))
    return str(value or "")
