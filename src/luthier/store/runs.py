"""A run: a directory of plain files, and nothing else.

| file | holds |
|---|---|
| `run.json` | what makes the directory a run: its id, its name, when it began |
| `recipe.yaml` | the resolved recipe |
| `plan.json`, `environment.json` | what was expected, what it was made with |
| `status.json` | running, finished, stopped or failed, why, and its numbers so far |
| `events.jsonl`, `samples.jsonl` | everything that happened; what the model answered meanwhile |
| `checkpoints/`, `adapter/` | states to go on from; the result |
| `run.lock` | who is at work here |
| `save` | put there by anybody (`touch RUN/save`): the state is saved after the step at hand, and the file goes |
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import yaml

from luthier.core.errors import CorruptError, DiskFullError, RefusedError, RunLockedError, StorageError
from luthier.core.events import Event, plain
from luthier.core.recipe_file import text_layer
from luthier.store.checkpoints import CheckpointStore
from luthier.store.disk import REAL, Disk, explained
from luthier.store.files import read_json, write_json, write_text
from luthier.store.lines import JsonLines
from luthier.store.lock import holder, locked

State = Literal["new", "running", "finished", "stopped", "failed", "interrupted"]
WRITTEN_STATES: Final[tuple[State, ...]] = ("running", "finished", "stopped", "failed")
SAVE_NOW: Final = "save"
ADAPTER: Final = "adapter"
MODEL: Final = "model"
"""The folder of a result: an adapter, or a model all of whose weights were trained."""
_MARK: Final = "run.json"
_LOCK: Final = "run.lock"
_FORMAT: Final = 1


@final
@dataclass(frozen=True, slots=True)
class Status:
    """How a run stands. `values` are its latest numbers; `updated` is a wall-clock time for people."""

    state: State
    reason: str = ""
    updated: str = ""
    values: Mapping[str, Any] | None = None


@final
class RunDirectory:
    """One run. It is also a `Recorder`: events go to `events.jsonl`."""

    def __init__(self, folder: Path, *, run_id: str, created: str, disk: Disk = REAL) -> None:
        self.folder = folder
        self.run_id = run_id
        self.created = created
        self.disk = disk
        self.events = JsonLines(folder / "events.jsonl")
        self.samples = JsonLines(folder / "samples.jsonl")
        self.checkpoints = CheckpointStore(folder / "checkpoints", run=run_id, disk=disk)
        self._telling = threading.Lock()
        self._told: State | None = None

    @classmethod
    @contextlib.contextmanager
    def begin(cls, folder: Path, *, overwrite: bool = False, disk: Disk = REAL) -> Iterator[RunDirectory]:
        """A new run in `folder`, which does not exist or is empty; within the block its lock is held.

        With `overwrite` a run that is there already is first moved aside to `<folder>.old-<n>`. A run that died before
        its recipe was written has done nothing and is begun again. Raises RefusedError for a folder that holds
        something else, or a run without `overwrite`.
        """
        cls.require_free(folder, overwrite=overwrite)
        if overwrite and is_begun(folder):
            _move_aside(folder, disk)
        _make_durably(folder, disk)
        with locked(folder / _LOCK, name=str(folder)):
            # Again, now that nobody else can: another process may have been quicker.
            _refuse_occupied(folder)
            created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            mark = {"format": _FORMAT, "id": uuid.uuid4().hex, "name": folder.name, "created": created}
            write_json(folder / _MARK, mark, disk=disk)
            run = cls(folder, run_id=str(mark["id"]), created=created, disk=disk)
            with run._at_work():
                yield run

    @staticmethod
    def require_folder(folder: Path) -> None:
        """Raise RefusedError where no folder can be: something else has that name, or that of a folder above it."""
        if folder.is_symlink() or any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
            raise RefusedError(f"{folder} is no folder", allowed="a new or empty folder")

    @classmethod
    def require_free(cls, folder: Path, *, overwrite: bool = False) -> None:
        """Raise RefusedError when `create` would refuse `folder`; changes nothing."""
        cls.require_folder(folder)
        refuse_busy(folder)
        if not overwrite or not is_begun(folder):
            _refuse_occupied(folder)

    @classmethod
    def open(cls, folder: Path, *, disk: Disk = REAL) -> RunDirectory:
        """The run in `folder`. Raises StorageError when there is none."""
        if not is_run(folder):
            raise StorageError(f"{folder} is no run", do="name a run directory: luthier run list shows them")
        mark = read_json(folder / _MARK)
        if mark.get("format") != _FORMAT or not isinstance(mark.get("id"), str):
            raise CorruptError(f"format {mark.get('format')!r}", allowed=f"{_FORMAT}", where=str(folder / _MARK))
        return cls(folder, run_id=mark["id"], created=str(mark.get("created", "")), disk=disk)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process at work here. Raises RunLockedError at once when there is another."""
        with locked(self.folder / _LOCK, name=str(self.folder)), self._at_work():
            yield

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        self._sweep()
        try:
            yield
        except BaseException:
            # What ends the run is what is told; lines that found no space are repeated by whoever goes on.
            with contextlib.suppress(DiskFullError):
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        try:
            self.events.close()
        finally:
            self.samples.close()

    def _sweep(self) -> None:
        """Remove what a process that died here while it replaced a file has left beside it."""
        with explained("clean up", self.folder):
            for path in self.folder.glob(".*.tmp"):
                self.disk.remove(path)

    # ---------------------------------------------------------------------------------------------------- the log

    def record(self, event: Event) -> None:
        """Append an event, with the wall-clock time."""
        self.events.append({**event.as_dict(), "time": round(time.time(), 3)})

    def record_sample(self, values: Mapping[str, Any]) -> None:
        """Append what a model answered."""
        self.samples.append(plain(values))

    def sync_logs(self) -> None:
        """Wait until events and samples are durable: before a checkpoint that has noted their lengths."""
        self.events.sync()
        self.samples.sync()

    def wants_save(self) -> bool:
        """Whether somebody has put a file called `save` here, to have the state saved now; it is taken away."""
        wish = self.folder / SAVE_NOW
        if not wish.exists():
            return False
        with explained("remove", wish):
            self.disk.remove(wish)
        return True

    def rewind(self, events_bytes: int, samples_bytes: int) -> list[str]:
        """Cut the log back to the cursors of a checkpoint; give back what is to be said of damage found."""
        notes = []
        for lines, cursor in ((self.events, events_bytes), (self.samples, samples_bytes)):
            if missing := lines.truncate(cursor):
                notes.append(f"{lines.path} lacks its last {missing:,} bytes; the log has a gap, the state has not")
        return notes

    # ------------------------------------------------------------------------------------------------- plain files

    def write_recipe(self, values: Mapping[str, Any]) -> None:
        """Write the resolved recipe: a file that `luthier train` takes again."""
        text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
        write_text(self.folder / "recipe.yaml", text, disk=self.disk)

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        path = self.folder / "recipe.yaml"
        with explained("read", path):
            data = path.read_bytes()
        try:
            return dict(text_layer(data.decode("utf-8"), name=str(path)).values)
        except UnicodeDecodeError as failure:
            raise CorruptError(f"{path} is not UTF-8 ({failure.reason} at byte {failure.start})") from None

    def write_plan(self, values: Mapping[str, Any]) -> None:
        """Write what the run is expected to do and to need."""
        write_json(self.folder / "plan.json", plain(values), disk=self.disk)

    def write_environment(self, values: Mapping[str, Any]) -> None:
        """Write what the run is made with (`luthier.store.environment.receipt`)."""
        write_json(self.folder / "environment.json", plain(values), disk=self.disk)

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the JSON files of the run: `plan.json`, `environment.json`, ..."""
        return read_json(self.folder / name)

    def write_status(self, state: State, *, reason: str = "", values: Mapping[str, Any] | None = None) -> None:
        """Write how the run stands; `values` are its latest numbers."""
        if state not in WRITTEN_STATES:
            raise ValueError(f"{state!r} is never written; one of {', '.join(WRITTEN_STATES)} is")
        with self._telling:
            self._told = state
            self._tell(state, reason, values or {})

    def write_progress(self, values: Mapping[str, Any]) -> None:
        """Write the latest numbers of a run at work. For the thread that saves: nothing, once the run has ended."""
        with self._telling:
            if self._told == "running":
                self._tell("running", "", values)

    def _tell(self, state: State, reason: str, values: Mapping[str, Any]) -> None:
        updated = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        content = {"state": state, "reason": reason, "updated": updated, "values": plain(values)}
        write_json(self.folder / "status.json", content, disk=self.disk)

    def status(self) -> Status:
        """How the run stands; a run that says it is running while nobody holds its lock was interrupted."""
        path = self.folder / "status.json"
        if not path.exists():
            return Status("new")
        content = read_json(path)
        state = next((known for known in WRITTEN_STATES if known == content.get("state")), None)
        if state is None:
            wrong = f"state {content.get('state')!r}"
            raise CorruptError(wrong, allowed=", ".join(WRITTEN_STATES), where=str(path))
        if state == "running" and holder(self.folder / _LOCK) is None:
            state = "interrupted"
        return Status(
            state=state,
            reason=str(content.get("reason", "")),
            updated=str(content.get("updated", "")),
            values=content.get("values") or {},
        )


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run directory."""
    return (folder / _MARK).is_file()


def is_begun(folder: Path) -> bool:
    """Whether `folder` holds a run that has come as far as its recipe; one that has not has nothing to lose."""
    return is_run(folder) and (folder / "recipe.yaml").is_file()


def refuse_busy(folder: Path) -> None:
    """Raise RunLockedError when another process is at work in `folder`. Quick: it needs no model and no lock."""
    if (user := holder(folder / _LOCK)) is not None:
        raise RunLockedError(
            f"{folder} is used by pid {user.pid} on {user.host} since {user.since}; nothing was changed",
            do="wait until it ends, or use another run directory",
        )


def _move_aside(folder: Path, disk: Disk) -> None:
    with locked(folder / _LOCK, name=str(folder)), explained("move aside", folder):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        disk.rename(folder, aside)
        disk.sync_folder(folder.absolute().parent)


def _refuse_occupied(folder: Path) -> None:
    if is_begun(folder):
        state = RunDirectory.open(folder).status().state
        go_on = "" if state == "finished" else f", go on with it (luthier resume {folder})"
        raise RefusedError(
            f"{folder} holds a run ({state}); nothing was changed",
            do=f"name another folder{go_on}, or add --overwrite to move it aside",
        )
    if folder.is_dir() and not is_run(folder) and any(not _is_trace(path) for path in folder.iterdir()):
        raise RefusedError(
            f"{folder} is not empty and holds no run; nothing was changed", do="name a new folder, or an empty one"
        )


def _is_trace(path: Path) -> bool:
    """Whether this is all that a process leaves which died before its run had a name."""
    return path.name == _LOCK or (path.name.startswith(f".{_MARK}.") and path.suffix == ".tmp")


def _make_durably(folder: Path, disk: Disk) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with explained("make", folder):
        for path in reversed(missing):
            try:
                disk.make_folder(path)
            except FileExistsError:
                # Somebody else made it meanwhile; two runs that race for one folder meet at its lock.
                continue
            disk.sync_folder(path.absolute().parent)
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} may not be written", do="choose a folder of your own with run:")
