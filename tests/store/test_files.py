"""Single files are replaced whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from luthier.core.errors import CorruptError, StorageError
from luthier.store.disk import RealDisk, explained, require_space
from luthier.store.files import read_json, write_bytes, write_json, write_text
from tests.store.faults import FaultyDisk, Killed


def test_a_file_is_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1, "text": "é"})
    write_json(path, {"x": 2})
    assert read_json(path) == {"x": 2}
    write_text(tmp_path / "b.txt", "é")
    assert (tmp_path / "b.txt").read_text("utf-8") == "é"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "b.txt"]


def test_every_failure_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for kills in (False, True):
        number, reached = 1, True
        while reached:
            write_bytes(path, b"old")
            disk = FaultyDisk(number, kills=kills)
            try:
                write_bytes(path, b"new!", disk=disk)
            except (StorageError, Killed) as failure:
                assert isinstance(failure, Killed) is kills
            assert path.read_bytes() in (b"old", b"new!")
            assert [item.name for item in tmp_path.iterdir()] == ["a"]
            reached, number = disk.reached, number + 1
        assert path.read_bytes() == b"new!"
        assert number == 5


def test_an_error_names_file_reason_and_space(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        write_bytes(tmp_path / "a", b"12345", disk=FaultyDisk(1, code=errno.ENOSPC))
    text = str(caught.value)
    assert "cannot write" in text and "No space left on device (5 bytes needed, " in text and "free space" in text
    assert caught.value.exit_code == 74


def test_what_does_not_fit_is_refused_before(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(StorageError, match="bytes needed"):
        require_space(tmp_path, 1 << 60)
    with pytest.raises(StorageError, match="cannot ask"):
        require_space(tmp_path / "none", 1, disk=RealDisk())


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b""])
def test_json_that_is_none_is_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CorruptError):
        read_json(tmp_path / "a")


def test_missing_files_are_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        read_json(tmp_path / "none")
    with pytest.raises(StorageError, match="cannot open x: odd"), explained("open", Path("x")):
        raise OSError("odd")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", {"x": float("nan")})
