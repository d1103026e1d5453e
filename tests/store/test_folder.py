"""A folder is there whole or not at all, whatever fails while it is written or replaced."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.core.errors import CorruptError, RefusedError, StorageError
from luthier.store.folder import recover_folder, write_folder
from luthier.store.manifest import verify
from tests.store.faults import FaultyDisk, Killed


def writer(number: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(random.Random(number).randbytes(2000))
        (folder / "more").mkdir()
        (folder / "more/tokenizer.json").write_bytes(random.Random(-number).randbytes(500))

    return write


def holds(place: Path) -> int | None:
    """Which folder is in `place`, by its facts, after every byte was verified; None when there is none."""
    if not place.exists():
        return None
    number = int(verify(place).facts["number"])
    assert (place / "model.safetensors").read_bytes() == random.Random(number).randbytes(2000)
    return number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_whole_and_carries_its_facts(tmp_path: Path) -> None:
    """Breaks when a file is not in the manifest, parents are not made, or something stays beside."""
    place = tmp_path / "a/b/adapter"
    manifest = write_folder(place, writer(1), {"number": 1})
    assert verify(place) == manifest and manifest.facts == {"number": 1}
    assert sorted(manifest.files) == ["model.safetensors", "more/tokenizer.json"]
    assert names(place.parent) == ["adapter"]


def test_what_is_there_is_only_replaced_when_told(tmp_path: Path) -> None:
    """Breaks when a folder is written over unasked, or the old one stays beside the new one."""
    place = tmp_path / "adapter"
    write_folder(place, writer(1), {"number": 1})
    with pytest.raises(RefusedError, match="is there already; nothing was changed"):
        write_folder(place, writer(2), {"number": 2})
    assert holds(place) == 1
    write_folder(place, writer(2), {"number": 2}, replace=True)
    assert holds(place) == 2 and names(tmp_path) == ["adapter"]
    (tmp_path / "plain").write_text("x", encoding="utf-8")
    write_folder(tmp_path / "plain", writer(3), {"number": 3}, replace=True)
    assert holds(tmp_path / "plain") == 3 and names(tmp_path) == ["adapter", "plain"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_writer_that_fails_leaves_nothing(replace: bool, tmp_path: Path) -> None:
    """Breaks when half a folder stays, or the old one suffers."""

    def broken(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    place = tmp_path / "adapter"
    if replace:
        write_folder(place, writer(1), {"number": 1})
    with pytest.raises(KeyboardInterrupt):
        write_folder(place, broken, {}, replace=replace)
    assert names(tmp_path) == ["adapter"] * replace and holds(place) == (1 if replace else None)


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Breaks when the free space is not asked for."""
    with pytest.raises(StorageError, match="bytes needed"):
        write_folder(tmp_path / "adapter", writer(1), {}, needed_bytes=1 << 60)
    assert names(tmp_path) == []


def test_a_folder_that_does_not_read_back_is_not_kept(tmp_path: Path) -> None:
    """Breaks when the new folder is not verified from disk, or replaces a good one all the same."""

    place = tmp_path / "adapter"
    with pytest.raises(CorruptError, match=r"model\.safetensors does not match its manifest"):
        write_folder(place, writer(1), {"number": 1}, disk=Once())
    assert names(tmp_path) == []
    write_folder(place, writer(1), {"number": 1})
    with pytest.raises(CorruptError, match=r"model\.safetensors does not match its manifest"):
        write_folder(place, writer(2), {"number": 2}, replace=True, disk=Once())
    assert holds(place) == 1 and names(tmp_path) == ["adapter"]


class Once(FaultyDisk):
    """Flips a bit in the new folder as it gets its name, and in nothing later."""

    def __init__(self) -> None:
        super().__init__(10**6)
        self.spoil = 1

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if target.name == "adapter":
            data = bytearray((target / "model.safetensors").read_bytes())
            data[1000] ^= self.spoil
            (target / "model.safetensors").write_bytes(data)
            self.spoil = 0


@pytest.mark.parametrize("old", [None, 1])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("forever", [False, True])
def test_after_every_failing_operation_the_place_holds_the_old_folder_or_the_new_one(
    tmp_path: Path, old: int | None, code: int, forever: bool
) -> None:
    """Breaks when an error between two operations leaves a mix, or something that a healthy disk would not leave."""
    number, reached = 1, True
    while reached:
        place = tmp_path / str(number) / "adapter"
        if old:
            write_folder(place, writer(old), {"number": old})
        disk = FaultyDisk(number, code=code, forever=forever)
        failed = False
        try:
            write_folder(place, writer(2), {"number": 2}, disk=disk, replace=True)
        except StorageError as error:
            failed = True
            assert os.strerror(code) in str(error)
        assert failed == disk.reached
        if not forever and failed and holds(place) != 2:
            # One failure: everything is as it was, and nothing is beside it.
            assert holds(place) == old and (not place.parent.exists() or names(place.parent) == ["adapter"] * bool(old))
        _well_after(place, old)
        reached, number = disk.reached, number + 1
    assert number > 8 + 2 * bool(old)


@pytest.mark.parametrize("old", [None, 1])
def test_a_kill_at_every_operation_leaves_the_old_folder_or_the_new_one(tmp_path: Path, old: int | None) -> None:
    """Breaks when a kill between two operations loses both folders, or leaves something no later write removes."""
    number, reached, seen = 1, True, set()
    while reached:
        place = tmp_path / str(number) / "adapter"
        if old:
            write_folder(place, writer(old), {"number": old})
        disk = FaultyDisk(number, kills=True)
        with contextlib.suppress(Killed):
            write_folder(place, writer(2), {"number": 2}, disk=disk, replace=True)
        seen.add(holds(place))
        _well_after(place, old)
        reached, number = disk.reached, number + 1
    assert number > 8 + 2 * bool(old) and 2 in seen


@pytest.mark.parametrize("successor", ["missing", "torn", "whole"])
def test_a_kill_while_a_killed_write_is_cleaned_up_loses_nothing_either(successor: str, tmp_path: Path) -> None:
    """Breaks when cleaning up is not itself safe against a kill."""
    number, reached = 1, True
    while reached:
        place = tmp_path / str(number) / "adapter"
        write_folder(place, writer(1), {"number": 1})
        place.rename(place.with_name(".old-adapter-77"))
        place.with_name(".tmp-adapter-77").mkdir()
        if successor != "missing":
            write_folder(place.with_name("next"), writer(2), {"number": 2})
            place.with_name("next").rename(place)
        if successor == "torn":
            (place / "model.safetensors").write_bytes(b"torn")
        disk = FaultyDisk(number, kills=True)
        with contextlib.suppress(Killed):
            recover_folder(place, disk=disk)
        recover_folder(place)
        assert holds(place) == (2 if successor == "whole" else 1) and names(place.parent) == ["adapter"]
        reached, number = disk.reached, number + 1
    assert number > 2


def test_leftovers_of_other_folders_are_not_touched(tmp_path: Path) -> None:
    """Breaks when one folder's cleaning takes what belongs to another of a longer name."""
    for name in (".tmp-adapter-1", ".tmp-adapter-2-1", ".tmp-other-1", ".del-adapter-9"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "adapter", writer(1), {"number": 1})
    assert names(tmp_path) == [".tmp-adapter-2-1", ".tmp-other-1", "adapter"]


def test_a_negative_control_writing_in_place_is_torn_by_a_kill(tmp_path: Path) -> None:
    """Breaks when the campaign above could not tell a torn folder from a whole one."""
    place = tmp_path / "adapter"
    write_folder(place, writer(1), {"number": 1})
    (place / "model.safetensors").write_bytes(random.Random(2).randbytes(2000))
    with pytest.raises(CorruptError, match="does not match its manifest"):
        holds(place)


def _well_after(place: Path, old: int | None) -> None:
    """The next start finds the old folder or the new one, whole and alone; the next write is good."""
    recover_folder(place)
    assert holds(place) in (old, 2)
    if place.parent.exists():
        assert names(place.parent) == ["adapter"] * place.exists()
    write_folder(place, writer(3), {"number": 3}, replace=True)
    assert holds(place) == 3 and names(place.parent) == ["adapter"]


def test_whoever_may_enter_the_folder_may_read_its_files(tmp_path: Path) -> None:
    """Breaks when a colleague cannot load a result, because safetensors made its file for the owner only."""

    def private(folder: Path) -> None:
        (folder / "weights").write_bytes(b"1")
        (folder / "weights").chmod(0o600)

    write_folder(tmp_path / "result", private, {})
    expected = (tmp_path / "result").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "result").iterdir()} == {expected}
