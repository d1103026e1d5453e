"""Rendered rows on disk: made once for the same data, tokenizer, template and policy, then mapped into memory.

Idea: the folder's name is a digest of everything the tokens depend on, so a store can be used without asking whether
it is still right. It is written beside its place and renamed, so a crash leaves nothing that looks whole; a manifest
tells each flipped bit, and what does not match it is made again. Arrays are plain .npy files, read without pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import StorageError
from luthier.core.paths import cache_folder
from luthier.data.forest import Ints
from luthier.data.rendering.classes import in_order, ranks
from luthier.data.rendering.counts import RenderCounts
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.renderer import Renderer
from luthier.store.disk import explained
from luthier.store.manifest import verify, write_manifest

_FORMAT: Final = 1
_ARRAYS: Final[Mapping[str, tuple[type[np.generic], tuple[int, ...]]]] = {
    "tokens": (np.int32, ()),
    "weights": (np.float32, ()),
    "roles": (np.uint8, ()),
    "spans": (np.int32, (2,)),
    "rows": (np.int32, ()),
    "offsets": (np.int64, ()),
}
_OPTIONAL: Final[Mapping[str, tuple[type[np.generic], float]]] = {
    "labels": (np.int32, -1),
    "types": (np.uint8, 0),
    "answers": (np.uint8, 0),
    "scores": (np.float32, math.nan),
}
"""Arrays that only some rows need, one value a token, and what stands for the tokens of rows without."""
_HEADER_BYTES: Final = 128
_AT_ONCE: Final = 64
"""Views that are written together."""
_CHUNK: Final = 2**20
"""Tokens whose classes are renumbered at once."""
_LONG: Final = 2**16
"""Tokens of a view that is not held until others join it."""


def store_key(sources: Sequence[Path], renderer: Renderer, *, reading: Mapping[str, Any] | None = None) -> str:
    """The digest of all that the tokens depend on; `reading` is how rows are read (format, columns, limits)."""
    digests: list[str] = []
    for source in sources:
        try:
            with source.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", where=str(source)) from error
    state = {
        "format": _FORMAT,
        "sources": digests,
        "reading": dict(reading or {}),
        **renderer.state,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@final
@dataclass(frozen=True, slots=True)
class TokenStore:
    """All views of a data set. `counts` and `stop_ids` are the renderer's, from when the store was made.

    `more` are the arrays that only some data sets have, by name: see `Rendered`.
    `classes` are the names of the numbers in `labels`, in order; there are none where rows have no classes.
    """

    folder: Path
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    roles: NDArray[np.uint8]
    spans: NDArray[np.int32]
    rows: NDArray[np.int32]
    offsets: NDArray[np.int64]
    counts: RenderCounts
    stop_ids: frozenset[int]
    more: Mapping[str, NDArray[Any]]
    classes: tuple[str, ...] = ()

    @classmethod
    def open_or_build(
        cls, make: Callable[[Path], Generator[Rendered]], renderer: Renderer, *, key: str, folder: Path | None = None
    ) -> TokenStore:
        """The store of `key` if it is whole; otherwise it is written with the views of `make(its folder)`.

        `make` has rendered and checked them, and may leave files of its own in the folder. Either way the renderer ends
        with the counts and stop tokens of exactly these rows.
        """
        home = folder if folder is not None else cache_folder() / "tokens"
        place = home / key
        found = cls.open(place, key=key)
        if found is not None:
            renderer.recall(found.counts, found.stop_ids)
            return found
        renderer.recall(RenderCounts(), frozenset())
        with explained("write the token cache", home):
            home.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=home))
        try:
            with explained("write the token cache", place):
                with closing(make(made)) as views:
                    _write(views, renderer, made, key)
                # What was read back from the disk for the manifest a moment ago is not read again.
                own = write_manifest(made, {"key": key}).files
                is_own = _take_place(made, place, lambda: cls.open(place, key=key) is not None)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        found = cls.open(place, key=key, trusted=own if is_own else ())
        if found is None:
            raise StorageError("the token cache was written but cannot be read back", where=str(place))
        return found

    @classmethod
    def open(cls, place: Path, *, key: str, trusted: Collection[str] = ()) -> TokenStore | None:
        """The store in `place`, or None when there is none that is whole, to the bit, and has this key.

        Of `trusted` files only the size is looked at.
        """
        try:
            verify(place, trusted=trusted)
            about = json.loads((place / "store.json").read_text(encoding="utf-8"))
            names = [*_ARRAYS, *(name for name in _OPTIONAL if name in about["lengths"])]
            arrays = {name: _open_array(place, name, about) for name in names}
            if about["key"] != key or about["format"] != _FORMAT or not _agree(arrays):
                return None
            counts = RenderCounts(**about["counts"])
            stop_ids = frozenset(int(token) for token in about["stop_ids"])
            classes = tuple(str(name) for name in about.get("classes", ()))
        except (OSError, ValueError, LookupError, TypeError):
            return None
        more = {name: arrays.pop(name) for name in _OPTIONAL if name in arrays}
        return cls(folder=place, counts=counts, stop_ids=stop_ids, classes=classes, more=more, **arrays)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Rendered:
        if not -len(self) <= index < len(self):
            raise IndexError(f"view {index} of {len(self)}")
        view = index % len(self)
        part = slice(int(self.offsets[view]), int(self.offsets[view + 1]))
        return Rendered(
            row=int(self.rows[view]),
            text="",
            tokens=self.tokens[part],
            weights=self.weights[part],
            roles=self.roles[part],
            spans=self.spans[part],
            **{name: _own(array[part], name) for name, array in self.more.items()},
        )

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """The class at each token, where rows have classes."""
        return self.more.get("labels")

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each view."""
        return np.diff(self.offsets)

    @property
    def token_count(self) -> int:
        return int(self.offsets[-1])

    @property
    def trained_count(self) -> int:
        return self.counts.trained_tokens


def _write(views: Iterable[Rendered], renderer: Renderer, made: Path, key: str) -> None:
    """Write the views into `made`, as they come."""
    with _Arrays(made) as arrays:
        arrays.append("offsets", np.zeros(1, np.int64))
        waiting: list[Rendered] = []
        for view in views:
            waiting.append(view)
            # Many at once: a call for each array of each view costs more than the writing.
            if len(waiting) == _AT_ONCE or len(view.tokens) > _LONG:
                arrays.take(waiting)
                waiting.clear()
        arrays.take(waiting)
    about = {
        "format": _FORMAT,
        "key": key,
        "lengths": arrays.lengths,
        "counts": renderer.counts.as_dict(),
        "stop_ids": sorted(renderer.stop_ids),
    }
    if len(renderer.classes):
        given, names = renderer.classes.given, renderer.classes.names
        about["classes"] = names if given else in_order(names)
        if not given and "labels" in arrays.lengths:
            _renumber(made / "labels.npy", ranks(names))
    with (made / "store.json").open("w", encoding="utf-8") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())


def _renumber(path: Path, numbers: Ints) -> None:
    """Give classes the numbers that do not depend on the order of rows, in place of the order in which they came."""
    labels = np.load(path, mmap_mode="r+", allow_pickle=False)
    for start in range(0, len(labels), _CHUNK):
        part = labels[start : start + _CHUNK]
        part[part >= 0] = numbers[part[part >= 0]]
    labels.flush()


def _take_place(made: Path, place: Path, is_whole: Callable[[], bool]) -> bool:
    """Rename `made` to `place`, and say whether that is where it is: a whole store that somebody else put there
    meanwhile stays."""
    if place.exists():
        if is_whole():
            return False
        shutil.rmtree(place)
    made.chmod(0o755)
    try:
        made.rename(place)
    except OSError:
        if not is_whole():
            raise
        return False
    directory = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return True


def _open_array(place: Path, name: str, about: Mapping[str, Any]) -> NDArray[Any]:
    array = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    kind, tail = _shape(name)
    if array.dtype != kind or array.shape != (about["lengths"][name], *tail):
        raise ValueError(f"{name} is not what the store says")
    return np.asarray(array)


def _agree(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the arrays fit each other."""
    offsets, total = arrays["offsets"], len(arrays["tokens"])
    per_token = all(len(arrays[name]) == total for name in ("weights", "roles", "spans", *_OPTIONAL) if name in arrays)
    if not per_token or len(offsets) != len(arrays["rows"]) + 1:
        return False
    return bool(offsets[0] == 0 and offsets[-1] == total and (np.diff(offsets) >= 0).all())


class _Arrays:
    """The .npy files of a store, written piece by piece so that memory does not grow with the data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self.lengths: dict[str, int] = {}
        for name in _ARRAYS:
            self._begin(name)

    def __enter__(self) -> _Arrays:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, file in self._files.items():
            with file:
                if kind is None:
                    file.seek(0)
                    file.write(_header(name, self.lengths[name]))
                    file.flush()
                    os.fsync(file.fileno())

    def take(self, views: Sequence[Rendered]) -> None:
        """Append the views, in order."""
        if not views:
            return
        for name in _OPTIONAL:
            self._take_optional(name, views)
        ends = self.lengths["tokens"] + np.cumsum([len(view.tokens) for view in views])
        self.append("tokens", np.concatenate([view.tokens for view in views]))
        self.append("weights", np.concatenate([view.weights for view in views]))
        self.append("roles", np.concatenate([view.roles for view in views]))
        self.append("spans", np.concatenate([view.spans for view in views]))
        self.append("rows", np.array([view.row for view in views], np.int32))
        self.append("offsets", ends)

    def _take_optional(self, name: str, views: Sequence[Rendered]) -> None:
        """Append what the views have of an array that exists from the first view on that has any of it."""
        found: list[NDArray[Any] | None] = [getattr(view, name) for view in views]
        if name not in self._files and all(values is None for values in found):
            return
        kind, fill = _OPTIONAL[name]
        if name not in self._files:
            self._begin(name)
            while self.lengths[name] < self.lengths["tokens"]:
                self.append(name, np.full(min(self.lengths["tokens"] - self.lengths[name], _CHUNK), fill, kind))
        for view, values in zip(views, found, strict=True):
            self.append(name, np.full(len(view.tokens), fill, kind) if values is None else values)

    def _begin(self, name: str) -> None:
        self._files[name] = (self._folder / f"{name}.npy").open("wb")
        self._files[name].write(b" " * _HEADER_BYTES)
        self.lengths[name] = 0

    def append(self, name: str, values: NDArray[Any]) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=_shape(name)[0]).data)
        self.lengths[name] += len(values)


def _own(values: NDArray[Any], name: str) -> NDArray[Any] | None:
    """A row's part of an array that only some rows need; None where it has none of answers or of their scores."""
    if (name == "answers" and not values.any()) or (name == "scores" and np.isnan(values).all()):
        return None
    return values


def _shape(name: str) -> tuple[type[np.generic], tuple[int, ...]]:
    return _ARRAYS[name] if name in _ARRAYS else (_OPTIONAL[name][0], ())


def _header(name: str, length: int) -> bytes:
    """The first 128 bytes of a version 1.0 .npy file: magic, length of the description, description."""
    kind, tail = _shape(name)
    about = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (length, *tail)}
    text = repr(about).encode("latin1").ljust(_HEADER_BYTES - 11, b" ") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
