"""Which files hold the weights of a model: one, or those that an index names, and nothing outside of its folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from luthier.core.errors import CorruptError, LuthierError, MissingError, RecipeError, UnsafeArtifactError
from luthier.data.hub import ModelFiles
from luthier.data.strict_json import excerpt
from luthier.model.files.tensor_headers import CONVERT, PICKLES

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
AGAIN: Final = "fetch the model again"
_PIECE: Final = 1 << 22
_SHARD: Final = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")


def weight_files(files: ModelFiles) -> list[Path]:
    """The files that hold the weights of a model.

    Raises UnsafeArtifactError where there are only pickles, or where an index names anything but a safetensors file
    beside it.
    """
    single = files.find(SINGLE)
    return [single] if single is not None else sorted({path for path, _ in indexed_files(files).values()})


def indexed_files(files: ModelFiles) -> dict[str, tuple[Path, str]]:
    """The file of each shard that an index names, by tensor, and how the index calls it."""
    index = files.json(INDEX)
    if not index:
        raise _no_weights(files)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CorruptError(f"{INDEX} has no weight_map", where=files.source, do="fetch the file again")
    found: dict[str, Path] = {}
    for shard in sorted({str(name) for name in shards.values()}):
        if Path(shard).suffix.lower() in PICKLES or not _SHARD.fullmatch(shard) or shard.startswith("."):
            raise UnsafeArtifactError(
                f"{INDEX} names the file {excerpt(shard)}",
                allowed="names of safetensors files in the same folder",
                do="choose another model",
                where=files.source,
            )
        path = files.find(shard)
        if path is None:
            raise MissingError(f"{INDEX} names {shard}, which is not there ({files.source})", do=AGAIN)
        found[shard] = path
    return {str(name): (found[str(shard)], str(shard)) for name, shard in shards.items()}


def folder_digest(folder: Path, *, wanted: Callable[[], bool] = lambda: True) -> str:
    """sha256 over all weight files of a model folder, by name: identifies a base model on disk.

    Empty when it is not `wanted` any more before all is read.
    """
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.name.encode())
        one = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                if not wanted():
                    return ""
                one.update(piece)
        total.update(one.digest())
    return total.hexdigest()


def _no_weights(files: ModelFiles) -> LuthierError:
    names = sorted(path.name for path in files.folder.iterdir()) if files.folder is not None else []
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if pickles:
        return UnsafeArtifactError(
            f"{files.source} holds its weights as {', '.join(pickles[:3])}, a pickle that could run code when loaded",
            allowed="safetensors",
            do=CONVERT,
        )
    if files.folder is None:
        return UnsafeArtifactError(
            f"{files.source} has no safetensors weights on the hub, or they are not in the cache",
            allowed="safetensors",
            do=f"choose a model that has a {SINGLE}",
        )
    other = [name for name in names if name.endswith(".safetensors")]
    return RecipeError(
        f"{files.source} has a config but no weights" + (f" called {SINGLE} (it has {other[0]})" if other else ""),
        do=f"write fresh:{files.source} to draw new ones, or add {SINGLE}",
    )
