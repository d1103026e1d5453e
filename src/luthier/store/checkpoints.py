"""Checkpoints: saved so that a kill, a full disk or a power cut at any moment leaves a verified one.

Idea: everything is written into a temporary folder, made durable, and appears under its name by one rename; then it is
read back and compared with its manifest, and only then is it announced, linked, and an older one removed. What is
found at a start that is not whole is set aside and named, never used.
Names: `step-000120/` committed; `.tmp-<step>-<pid>/` being written; `.del-<name>-<pid>/` being removed;
`.bad-<name>-<n>/` set aside; `best`, `last` and `finite` (pinned when a run met numbers that are not) relative links.
No link is read to find the newest state: that is the highest step that verifies.

All methods need the lock of the run to be held.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, final

from luthier.core.errors import CorruptError, StorageError
from luthier.store.disk import REAL, Disk, explained, require_space
from luthier.store.folder import Writer, fill_folder
from luthier.store.manifest import Manifest, verify

Link = Literal["best", "last", "finite"]
LINKS: Final[tuple[Link, ...]] = ("best", "last", "finite")
_COMMITTED: Final = re.compile(r"step-(\d{6,})")
_LEFTOVER: Final = re.compile(r"\.(?:tmp|del|link)-.*")


@final
class CheckpointStore:
    """The checkpoints of one run. `notices` collects what was skipped, set aside or repaired, in sentences."""

    def __init__(self, folder: Path, *, run: str = "", disk: Disk = REAL) -> None:
        self.folder = folder
        self.run = run
        self.disk = disk
        self.notices: list[str] = []
        self._verified: set[str] = set()

    def save(
        self,
        step: int,
        writer: Writer,
        facts: Mapping[str, Any],
        *,
        best: bool = False,
        needed_bytes: int | None = None,
    ) -> Path:
        """Save what `writer` puts into the folder it is given; return once it is durable, verified and linked.

        What the writer tells of its files is read back and compared all the same. `facts` must be plain JSON values.
        Raises StorageError when it cannot be saved; nothing older is touched then.
        """
        self._prepare(self._expected_bytes() if needed_bytes is None else needed_bytes)
        beside = self.folder / f".tmp-{step}-{os.getpid()}"
        place = self.folder / _name(step)
        with self._removed_on_error(beside), explained("write", beside, needed_bytes=needed_bytes):
            whole = {**facts, "run": self.run, "step": step}
            fill_folder(beside, writer, whole, disk=self.disk, needed_bytes=needed_bytes)
            if self._occupied(place):
                # The same step of a deterministic run holds the same bits; the one that is there stays.
                self.disk.remove(beside)
            else:
                self.disk.rename(beside, place)
        with explained("write", place):
            self.disk.sync_folder(self.folder)
        self._verify_saved(place)
        self.point("last", step)
        if best:
            self.point("best", step)
        return place

    def steps(self) -> list[int]:
        """The committed steps, ascending, whether they verify or not."""
        with explained("list", self.folder):
            if not self.folder.is_dir():
                return []
            found = [_COMMITTED.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def latest_valid(self) -> Path | None:
        """The newest checkpoint that verifies, or None; changes nothing. Those passed over are in `notices`."""
        for step in reversed(self.steps()):
            place = self.folder / _name(step)
            try:
                self._check(place)
            except CorruptError as error:
                self.notices.append(f"checkpoint {place.name} is passed over: {error}")
                continue
            return place
        return None

    def require(self, step: int) -> Path:
        """The checkpoint of `step`, every byte verified now. Raises CorruptError."""
        place = self.folder / _name(step)
        self._check(place)
        return place

    def recover(self) -> Path | None:
        """Clean up after whatever happened; the newest valid checkpoint, or None when there never was one.

        Leftovers are removed, damaged checkpoints set aside (and named in `notices`), links put right. Raises
        StorageError when there are checkpoints and none is valid.
        """
        with explained("clean up", self.folder):
            if not self.folder.is_dir():
                return None
            for path in sorted(self.folder.iterdir()):
                if _LEFTOVER.fullmatch(path.name):
                    self.disk.remove(path)
        newest = self._newest_valid()
        for name in LINKS:
            self._mend(name, newest)
        with explained("clean up", self.folder):
            self.disk.sync_folder(self.folder)
        return newest

    def cut(self, step: int) -> None:
        """Remove the checkpoints after `step`: a run that goes on from there makes them again."""
        for newer in self.steps():
            if newer > step:
                self._remove(self.folder / _name(newer))
        self.recover()

    def valid_steps(self) -> list[int]:
        """The committed steps that verify, ascending."""
        return [step for step in self.steps() if self._is_valid(self.folder / _name(step))]

    def rotate(self, keep: int, pinned: Collection[int] = ()) -> list[int]:
        """Remove old checkpoints; give back their steps.

        What stays: the targets of the links, the `pinned` steps, and the newest `keep` verified ones besides these.
        Nothing is removed before a newer one has verified.
        """
        protected = {*pinned, *(step for name in LINKS if (step := self.linked(name)) is not None)}
        kept = safe = 0
        removed = []
        for step in reversed(self.steps()):
            place = self.folder / _name(step)
            if step in protected:
                safe += self._is_valid(place)
            elif kept < keep:
                valid = self._is_valid(place)
                kept, safe = kept + valid, safe + valid
            elif safe:
                self._remove(place)
                removed.append(step)
        return sorted(removed)

    def point(self, name: Link, step: int) -> None:
        """Let the link `name` point to the checkpoint of `step`, in one step. Raises CorruptError if it is damaged."""
        target = _name(step)
        if not self._is_valid(self.folder / target):
            raise CorruptError(f"{self.folder / target} is not valid", allowed=f"{name} points to verified checkpoints")
        beside = self.folder / f".link-{name}-{os.getpid()}"
        with self._removed_on_error(beside), explained("link", self.folder / name):
            self.disk.link(beside, target)
            self.disk.rename(beside, self.folder / name)
            self.disk.sync_folder(self.folder)

    def linked(self, name: Link) -> int | None:
        """The step that a link points to; None when the link is missing or points elsewhere."""
        link = self.folder / name
        with explained("read", link):
            match = _COMMITTED.fullmatch(str(link.readlink())) if link.is_symlink() else None
            return int(match[1]) if match and (self.folder / match[0]).is_dir() else None

    def _prepare(self, needed_bytes: int) -> None:
        with explained("make", self.folder):
            if not self.folder.is_dir():
                self.disk.make_folder(self.folder)
                self.disk.sync_folder(self.folder.parent)
        require_space(self.folder, needed_bytes, disk=self.disk)

    def _expected_bytes(self) -> int:
        """What the newest checkpoint took: the next one will take about as much."""
        steps = self.steps()
        if not steps:
            return 0
        place = self.folder / _name(steps[-1])
        with explained("measure", place):
            return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())

    def _occupied(self, place: Path) -> bool:
        """Whether a valid checkpoint is there already; a damaged one is set aside to free the name."""
        if not place.exists() and not place.is_symlink():
            return False
        try:
            self._check(place)
        except CorruptError as error:
            self._set_aside(place, error)
            return False
        return True

    def _verify_saved(self, place: Path) -> None:
        try:
            self._check(place)
        except CorruptError as error:
            self._set_aside(place, error)
            raise

    def _newest_valid(self) -> Path | None:
        steps = self.steps()
        for step in reversed(steps):
            place = self.folder / _name(step)
            try:
                self._check(place)
            except CorruptError as error:
                self._set_aside(place, error)
                continue
            return place
        with explained("list", self.folder):
            aside = [path.name for path in sorted(self.folder.iterdir()) if path.name.startswith(".bad-")]
        if steps or aside:
            raise StorageError(
                f"{self.folder}: no checkpoint is valid ({'; '.join(self.notices) or ', '.join(aside)})",
                do="start again in another run directory; the damaged ones are kept as .bad-*",
            )
        return None

    def _mend(self, name: Link, newest: Path | None) -> None:
        link = self.folder / name
        step = self.linked(name)
        if step is not None and not self._is_valid(self.folder / _name(step)):
            step = None
        if name == "last" and newest is not None and step != _step(newest):
            self.point("last", _step(newest))
        elif step is None:
            with explained("remove", link):
                if link.is_symlink():
                    told = f"the link {name} pointed to {link.readlink()}, which is not valid; it was removed"
                    self.disk.remove(link)
                    self.notices.append(told)

    def _check(self, place: Path) -> Manifest:
        """The manifest of a checkpoint that is whole and where it belongs. Raises CorruptError."""
        self._verified.discard(place.name)
        with explained("read", place):
            if place.is_symlink() or not place.is_dir():
                raise CorruptError(f"{place} is no folder")
            manifest = verify(place)
        if manifest.facts.get("step") != _step(place):
            raise CorruptError(f"{place} holds step {manifest.facts.get('step')}")
        if self.run and manifest.facts.get("run") != self.run:
            raise CorruptError(f"{place} belongs to run {manifest.facts.get('run')!r}, not to {self.run!r}")
        self._verified.add(place.name)
        return manifest

    def _is_valid(self, place: Path) -> bool:
        """Whether it verified, now or earlier in this process; a damaged one leaves a notice."""
        try:
            with explained("read", place):
                if place.name in self._verified and place.is_dir():
                    return True
            self._check(place)
        except CorruptError as error:
            self.notices.append(f"checkpoint {place.name} is not valid: {error}")
            return False
        return True

    def _set_aside(self, place: Path, error: CorruptError) -> None:
        number = 1
        with explained("set aside", place):
            while (aside := self.folder / f".bad-{place.name}-{number}").exists():
                number += 1
            self.disk.rename(place, aside)
            self.disk.sync_folder(self.folder)
        self._verified.discard(place.name)
        self.notices.append(f"checkpoint {place.name} is set aside as {aside.name}: {error}")

    def _remove(self, place: Path) -> None:
        beside = self.folder / f".del-{place.name}-{os.getpid()}"
        with explained("remove", place):
            self.disk.rename(place, beside)
            self.disk.sync_folder(self.folder)
            self._verified.discard(place.name)
            self.disk.remove(beside)

    @contextmanager
    def _removed_on_error(self, beside: Path) -> Iterator[None]:
        """Nothing of ours stays beside the checkpoints when the block fails; a kill leaves it to `recover`."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                try:
                    if beside.exists() or beside.is_symlink():
                        self.disk.remove(beside)
                except OSError as failure:
                    self.notices.append(f"{beside.name} could not be removed ({failure.strerror}); the next start will")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(place: Path) -> int:
    match = _COMMITTED.fullmatch(place.name)
    if match is None:
        raise ValueError(f"{place} is no checkpoint")
    return int(match[1])
