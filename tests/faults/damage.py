"""What disks, copies and hands do to files: one damage to one file or folder, drawn from the dice."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

Damage = Callable[[Path, random.Random], str]
"""Damages a file and says in words what it did; empty when it could not do anything to this one."""


def flip(path: Path, dice: random.Random) -> str:
    """One bit."""
    data = bytearray(path.read_bytes())
    if not data:
        return ""
    place, bit = dice.randrange(len(data)), dice.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))
    return f"bit {bit} of byte {place}"


def truncate(path: Path, dice: random.Random) -> str:
    """The end is missing: often much of it, sometimes one byte."""
    data = path.read_bytes()
    if not data:
        return ""
    keep = dice.choice((0, len(data) - 1, dice.randrange(len(data))))
    path.write_bytes(data[:keep])
    return f"cut to {keep} of {len(data)} bytes"


def append(path: Path, dice: random.Random) -> str:
    """Something stands behind the end."""
    more = dice.choice((b"\0", b"\n", b" ", b"}", dice.randbytes(dice.randrange(1, 300))))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes more"


def zero(path: Path, dice: random.Random) -> str:
    """A range of zeros, as a file system leaves it that had the length before the data."""
    data = bytearray(path.read_bytes())
    if not data:
        return ""
    start = dice.randrange(len(data))
    stop = min(len(data), start + dice.choice((1, 16, 512, 4096)))
    if not any(data[start:stop]):
        return ""
    data[start:stop] = bytes(stop - start)
    path.write_bytes(bytes(data))
    return f"bytes {start} to {stop} are zero"


def delete(path: Path, _dice: random.Random) -> str:
    """The file is gone."""
    path.unlink()
    return "gone"


def link(path: Path, _dice: random.Random) -> str:
    """A symbolic link to the same content elsewhere, which may change at any time."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    return "a symbolic link"


def swap(path: Path, dice: random.Random) -> str:
    """The content of another file of the same folder or of one beside it."""
    others = [
        other
        for folder in (path.parent, *sorted(path.parent.parent.iterdir()))
        if folder.is_dir() and not folder.is_symlink()
        for other in sorted(folder.iterdir())
        if other.is_file() and other != path and other.suffix == path.suffix
    ]
    if not others:
        return ""
    other = dice.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    if one == two:
        return ""
    path.write_bytes(two)
    other.write_bytes(one)
    return f"swapped with {other.parent.name}/{other.name}"


def become_a_folder(path: Path, _dice: random.Random) -> str:
    """A folder stands in its place."""
    path.unlink()
    path.mkdir()
    return "a folder"


SINGLE: Final[Sequence[Damage]] = (flip, flip, flip, truncate, append, zero, delete, link, swap, become_a_folder)
"""Damages to one file; flips more often, as they are the hardest to see."""


def extra_file(folder: Path, dice: random.Random) -> str:
    """A file that nobody wrote."""
    name = dice.choice(("extra.safetensors", "pytorch_model.bin", ".hidden", "model.safetensors.tmp"))
    (folder / name).write_bytes(dice.randbytes(40))
    return f"an extra {name}"


def swap_folders(folder: Path, dice: random.Random) -> str:
    """Two folders have each other's name."""
    other = _another(folder, dice)
    if other is None:
        return ""
    between = folder.with_name(".between")
    folder.rename(between)
    other.rename(folder)
    between.rename(other)
    return f"swapped with {other.name}"


def delete_folder(folder: Path, _dice: random.Random) -> str:
    """The whole folder is gone."""
    shutil.rmtree(folder)
    return "gone as a whole"


def older_copy(folder: Path, dice: random.Random) -> str:
    """The content of another checkpoint under this name, with its own manifest: a backup put back wrongly."""
    other = _another(folder, dice)
    if other is None:
        return ""
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    return f"a copy of {other.name}"


def _another(folder: Path, dice: random.Random) -> Path | None:
    """One of the folders beside this one."""
    others = [
        other for other in sorted(folder.parent.iterdir())
        if other.is_dir() and not other.is_symlink() and other != folder and not other.name.startswith(".")
    ]  # fmt: skip
    return dice.choice(others) if others else None


WHOLE: Final[Sequence[Damage]] = (extra_file, swap_folders, delete_folder, older_copy)
"""Damages to a whole folder."""
