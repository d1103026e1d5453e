"""A folder matches its manifest to the byte, or is refused by the name of the file at fault."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.core.errors import CorruptError
from luthier.store.manifest import NAME, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "x"
    (place / "inner").mkdir(parents=True)
    (place / "a.bin").write_bytes(bytes(range(256)) * 4)
    (place / "inner/b.json").write_text('{"x": 1}')
    (place / "empty").write_bytes(b"")
    write_manifest(place, {"step": 3, "note": "é", "loss": 0.1})
    return place


def test_a_whole_folder_verifies(folder: Path) -> None:
    manifest = verify(folder)
    assert sorted(manifest.files) == ["a.bin", "empty", "inner/b.json"]
    assert manifest.facts == {"step": 3, "note": "é", "loss": 0.1}
    assert manifest.total_bytes == 1024 + 8
    assert manifest.digest == read_manifest(folder).digest


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "extra").write_bytes(b""), "extra is not in the manifest"),
        (lambda f: (f / "a.bin").write_bytes(bytes(1000)), "a.bin is incomplete or altered (1,000 of 1,024 bytes)"),
        (lambda f: (f / "a.bin").write_bytes(bytes(1024)), "a.bin does not match its manifest (sha256 expected"),
        (lambda f: (f / "inner/b.json").rename(f / "b.json"), "is not in the manifest"),
        (lambda f: (f / "link").symlink_to("a.bin"), "link is no regular file"),
        (lambda f: (f / NAME).unlink(), "manifest.json is missing"),
        (lambda f: (f / NAME).write_bytes(b"{}"), "is no manifest"),
        (lambda f: (f / NAME).write_bytes((f / NAME).read_bytes() + b" "), "does not match itself"),
        (lambda f: (f / NAME).write_bytes((f / NAME).read_bytes().replace(b":3", b":4")), "does not match itself"),
        (lambda f: (f / NAME).write_bytes((f / NAME).read_bytes().replace(b'"format":1', b'"format":2')), "format 2"),
        (lambda f: (f / NAME).write_bytes(b"[" * 50_000), "is no manifest"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    with pytest.raises(CorruptError) as caught:
        verify(folder)
    assert words in str(caught.value)


def test_no_single_flip_or_cut_passes(folder: Path, tmp_path: Path) -> None:
    dice = random.Random(0)
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    for trial in range(90):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        path = copy / dice.choice(files).relative_to(folder)
        data = bytearray(path.read_bytes())
        place = dice.randrange(len(data))
        if trial % 3 == 0:
            data = data[:place]
        else:
            data[place] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptError):
            verify(copy)
        shutil.rmtree(copy)
