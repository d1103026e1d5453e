"""The manifest: what a folder must hold, to the byte.

`manifest.json` lists every other file with its size and sha256, carries facts (step, run, versions, ...), and its own
digest over its canonical form (sorted keys, no spaces, one final newline). The file must equal that form, so not even a
blank can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, final

from luthier.core.errors import CorruptError
from luthier.store.disk import REAL, Disk, explained

NAME: Final = "manifest.json"
_FORMAT: Final = 1


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """The size and digest of one file."""

    bytes: int
    sha256: str


@final
@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a folder (by relative path) and the facts that belong to them."""

    files: Mapping[str, Entry]
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the canonical form without the digest itself: it identifies the folder's whole content."""
        return hashlib.sha256(_canonical(self._body())).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def encoded(self) -> bytes:
        """The content of `manifest.json`."""
        return _canonical({**self._body(), "self": self.digest})

    def _body(self) -> dict[str, Any]:
        files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in self.files.items()}
        return {"format": _FORMAT, "files": files, "facts": dict(self.facts)}


def write_manifest(
    folder: Path, facts: Mapping[str, Any], *, disk: Disk = REAL, known: Mapping[str, Entry] | None = None
) -> Manifest:
    """Describe the files that lie in `folder`, durably; those that are `known` already are not read."""
    told = known or {}
    with explained("read", folder):
        manifest = Manifest({name: told.get(name) or _measure(folder / name) for name in _files_in(folder)}, facts)
    data = manifest.encoded()
    with explained("write", folder / NAME, needed_bytes=len(data)):
        disk.write_new(folder / NAME, data)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, itself verified; the files are not looked at. Raises CorruptError."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise CorruptError(f"{path} is missing", do="a folder without its manifest is never loaded")
    with explained("read", path):
        data = path.read_bytes()
    try:
        content = json.loads(data)
        own = content["self"]
        files = {str(name): Entry(int(each["bytes"]), str(each["sha256"])) for name, each in content["files"].items()}
        manifest = Manifest(files, dict(content["facts"]))
        # Inside: numbers that are not finite, and values nested too deep, are found out by writing them again.
        digest, again = manifest.digest, manifest.encoded()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        raise CorruptError(f"{path} is no manifest ({len(data):,} bytes)") from None
    if content.get("format") != _FORMAT:
        raise CorruptError(f"{path} has format {content.get('format')!r}", allowed=f"format {_FORMAT}")
    if digest != own or again != data:
        raise CorruptError(f"{path} does not match itself (sha256 expected {str(own)[:12]}, found {digest[:12]})")
    return manifest


def verify(folder: Path, *, trusted: Collection[str] = ()) -> Manifest:
    """The manifest of `folder`, after every byte was read and compared; of `trusted` files only the size.

    Raises CorruptError that names the first file at fault, with what was expected and what was found.
    """
    manifest = read_manifest(folder)
    with explained("read", folder):
        found = _files_in(folder)
        for name in sorted(set(found) ^ set(manifest.files)):
            raise CorruptError(f"{folder / name} is {'not in the manifest' if name in found else 'missing'}")
        for name in sorted(manifest.files):
            _compare(folder / name, manifest.files[name], whole=name not in trusted)
    return manifest


def _compare(path: Path, expected: Entry, *, whole: bool) -> None:
    size = path.stat().st_size
    if size != expected.bytes:
        raise CorruptError(f"{path} is incomplete or altered ({size:,} of {expected.bytes:,} bytes)")
    if not whole:
        return
    found = _measure(path).sha256
    if found != expected.sha256:
        raise CorruptError(
            f"{path} does not match its manifest (sha256 expected {expected.sha256[:12]}, found {found[:12]})"
        )


def _files_in(folder: Path) -> list[str]:
    """The relative paths of all files below `folder`, without the manifest; links and devices are refused."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CorruptError(f"{path} is no regular file", allowed="files and folders")
        if path.is_file() and path != folder / NAME:
            names.append(path.relative_to(folder).as_posix())
    return names


def _measure(path: Path) -> Entry:
    with path.open("rb") as file:
        _drop_pages(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(os.fstat(file.fileno()).st_size, digest)


def _drop_pages(file: BinaryIO) -> None:
    # Where the system lets us, the bytes are read back from the disk and not from memory that has just written them.
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _canonical(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"
