"""Spectra of base weights, kept: one base is tuned many times, and its decomposition is what a look at a change costs.

Idea: a decomposition is filed under the digest of the very numbers that were decomposed, in the cache folder, so no
name, run or model can mix it up, and whatever holds the same matrix finds it. What is read back is checked against the
matrix. Files are there whole or not at all; when they take more than their share of room the oldest go. A disk that
is short of room gets none: then every look pays for its own decomposition.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from luthier.core.errors import LuthierError, StorageError
from luthier.maths.spectra import Spectrum, decomposed
from luthier.model.files.tensor_files import load_tensors
from luthier.store.files import write_bytes

FOLDER = "spectra"
MOST_BYTES = 8 * 2**30
SPARE_ROOM = 4
"""A file is kept where the disk has room for so many of it."""
ABANDONED = 3600.0
"""Seconds after which a file that is being written is taken for what a killed process has left."""


@dataclass(frozen=True)
class BaseSpectra:
    """Where decompositions are kept; nowhere without a folder."""

    folder: Path | None
    most_bytes: int = MOST_BYTES

    @torch.no_grad()
    def of(self, weight: Float[Tensor, "out in"]) -> Spectrum:
        """All singular values and vectors of a matrix, from the folder where they are."""
        weight = weight.float().contiguous()
        path = None if self.folder is None else self.folder / f"{_digest(weight)}.safetensors"
        found = None if path is None else _read(path, weight)
        if found is not None:
            return found
        made = decomposed(weight)
        if path is not None:
            self._keep(path, made)
        return made

    def has(self, weight: Float[Tensor, "out in"]) -> bool:
        """Whether a decomposition is there already."""
        return self.folder is not None and (self.folder / f"{_digest(weight)}.safetensors").is_file()

    def kept(self) -> dict[str, Any]:
        """Where they lie, how many there are, what they take and may take; empty where none is kept."""
        sizes = [] if self.folder is None else [size for _, size, _ in _files(self.folder)]
        if not sizes:
            return {}
        return {"folder": str(self.folder), "files": len(sizes), "bytes": sum(sizes), "most_bytes": self.most_bytes}

    def _keep(self, path: Path, made: Spectrum) -> None:
        tensors = {"left": made.left, "sizes": made.sizes, "right": made.right}
        data = save({name: each.cpu().contiguous() for name, each in tensors.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(data) > self.most_bytes or shutil.disk_usage(path.parent).free < SPARE_ROOM * len(data):
            return
        try:
            _make_room(path.parent, self.most_bytes - len(data))
            write_bytes(path, data)
        except (StorageError, OSError):
            # What can be made again need not be kept: the disk filled up meanwhile, or is not ours to write.
            return


def _digest(weight: Tensor) -> str:
    total = hashlib.sha256(f"{tuple(weight.shape)}\n".encode())
    total.update(weight.float().cpu().contiguous().numpy().data)
    return total.hexdigest()


def _read(path: Path, weight: Float[Tensor, "out in"]) -> Spectrum | None:
    """What a file holds, when that is the decomposition of the matrix; None when it is damaged or not there."""
    if not path.is_file():
        return None
    try:
        held = load_tensors(path)
        os.utime(path)
    except (LuthierError, OSError):
        return None
    size = min(weight.shape)
    shapes = {"left": (weight.shape[0], size), "sizes": (size,), "right": (weight.shape[1], size)}
    if {name: tuple(each.shape) for name, each in held.items()} != shapes:
        return None
    found = Spectrum(*(held[name].to(weight) for name in shapes))
    # One vector through both: whatever is damaged in the file shows in it.
    x = torch.randn(weight.shape[1], 1, generator=torch.Generator().manual_seed(0)).to(weight)
    wanted = weight @ x
    error = (found.left @ (found.sizes[:, None] * (found.right.t() @ x)) - wanted).norm()
    return found if bool(error <= 1e-4 * wanted.norm()) else None


def _make_room(folder: Path, most: int) -> None:
    """Let the files of a folder take `most` bytes: those go that were used longest ago."""
    total = 0
    for path, size, _ in sorted(_files(folder), key=lambda file: file[2], reverse=True):
        total += size
        if total > most:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        # A process that was killed while it wrote one has left it; nobody writes for so long.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """Each file with its bytes and when it was last used; another process may take one away meanwhile."""
    found = []
    for path in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):
            told = path.stat()
            found.append((path, told.st_size, told.st_mtime))
    return found
