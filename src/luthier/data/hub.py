"""The files of a model, in a folder or of a hub id: found by name, JSON read strictly.

Idea: luthier asks for each file it uses by its name, and reads it itself. So nothing else that a folder holds is ever
looked at: no Python file, no adapter inside a base, no list of further files. A file of a folder lies in that folder:
a link out of it is refused.
The hub's client asks for every file of a model anew, and waits longer each time nobody answers. So one short question
comes first. Without an answer what is in the hub cache is used, and where that is nothing the error comes at once.

Use when: a model or a tokenizer is about to be loaded.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final, final

from luthier.core.errors import (
    CorruptError,
    DataError,
    LuthierError,
    MissingError,
    StorageError,
    UnsafeArtifactError,
)
from luthier.data.strict_json import Place, decode_text, parse

MAX_JSON: Final = 16 * 1024 * 1024
"""Bytes of a JSON file of a model; the largest in use, an index of ninety thousand tensors, has nine million."""
AGAIN: Final = "look whether it is the file that was meant, or fetch it again"
"""What to do about a file of a model that is no JSON: no run is at stake."""
_HUB_ID: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
SECONDS = 4
"""How long the hub may take to answer the first question."""
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


@final
@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the files of a model are; make one with `of`. `folder` is None for a hub id.

    `cached` says that the hub cache has to do.
    """

    source: str
    folder: Path | None
    cached: bool

    @classmethod
    def of(cls, source: str | Path) -> ModelFiles:
        """The files of a folder or a hub id. Raises MissingError when a hub id cannot be reached and is not cached."""
        folder = Path(source)
        if folder.is_dir():
            return cls(str(source), folder, cached=True)
        if not _HUB_ID.fullmatch(str(source)):
            raise MissingError(
                f"there is no model folder {str(source)!r}",
                do="check the path; a folder must exist, a hub id has the form owner/name",
            )
        return cls(str(source), None, cached=only_cached(str(source)))

    def find(self, name: str) -> Path | None:
        """The file of that name, None when there is none; downloaded first where needed."""
        if self.folder is None:
            return _download(self.source, name, cached=self.cached)
        path = self.folder / name
        if not os.path.lexists(path):
            return None
        real, inside = path.resolve(), [self.folder.resolve()]
        if inside[0].parent.name == "snapshots":
            inside.append(inside[0].parent.parent / "blobs")  # a snapshot of the hub cache is a folder of links
        if not any(real.is_relative_to(place) for place in inside):
            raise UnsafeArtifactError(
                f"{name} is a link to {real}",
                allowed="files inside the model's folder",
                do="put a copy of the file in its place if you trust where it leads",
                where=str(path),
            )
        if not real.is_file():
            raise CorruptError(f"{name} is no regular file", do=AGAIN, where=str(path))
        return path

    def json(self, name: str) -> dict[str, object]:
        """The JSON object in the file of that name; empty when there is no such file."""
        path = self.find(name)
        return {} if path is None else read_json(path)


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file of a model. Raises CorruptError with the place of what is not strict JSON."""
    try:
        value = parse(decode_text(read_bytes(path, most=MAX_JSON), Place(str(path))), Place(str(path)))
    except DataError as failure:
        allowed = failure.allowed or "valid JSON"
        received = f"no valid JSON: {failure.received}"
        raise CorruptError(received, allowed=allowed, do=AGAIN, where=failure.where) from None
    if not isinstance(value, dict):
        raise CorruptError(f"a JSON {type(value).__name__}", allowed="a JSON object", do=AGAIN, where=str(path))
    return value


def read_bytes(path: Path, *, most: int) -> bytes:
    """The bytes of a regular file of at most that many bytes."""
    with open_regular(path) as (file, size):
        if size > most:
            raise CorruptError(f"{size} bytes", allowed=f"at most {most} bytes", do=AGAIN, where=str(path))
        return file.read(most + 1)


def no_model_but(files: ModelFiles) -> str:
    """What somebody meant who named a run or an adapter where a model belongs, and what to do; "" for anything else."""
    from luthier.store.runs import is_run

    if files.folder is None:
        return ""
    if is_run(files.folder):
        return f"it is a run: name its base, or make a model of it: luthier export {files.folder} --out DIR"
    if (files.folder / "adapter_config.json").is_file():
        return f"it is an adapter: name its run, or its base and --adapter {files.folder}"
    return ""


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[FileIO, int]]:
    """A regular file, unbuffered, and its size.

    Raises MissingError when there is none, CorruptError for a folder, a pipe or a device, StorageError for the rest.
    """
    try:
        # Without O_NONBLOCK a named pipe would keep us waiting for a writer.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with closing(FileIO(_regular(number, path), "rb")) as file:
            yield file, os.fstat(number).st_size
    except LuthierError:
        raise
    except FileNotFoundError as failure:
        raise MissingError(f"there is no file {path}") from failure
    except OSError as failure:
        raise StorageError(f"the file cannot be read: {failure}", where=str(path)) from failure


def _regular(number: int, path: Path) -> int:
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise CorruptError("no regular file", do=AGAIN, where=str(path))
    return number


def _download(source: str, name: str, *, cached: bool) -> Path | None:
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            source,
            name,
            local_files_only=cached,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError) as failure:
        words = " ".join(str(failure).split())[:300]
        raise MissingError(
            f"{source!r} was not found on disk or on the hub: {words}",
            do="check the name; a folder must exist, a hub id has the form owner/name",
        ) from failure
    return None if found is None else Path(found)


def only_cached(source: str) -> bool:
    """Whether the files of the hub id `source` can come from the hub cache alone: offline is asked for, or needed.

    Raises MissingError when the hub does not answer and the cache holds nothing of `source`.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if _answers(constants.ENDPOINT):
        return False
    if not _is_cached(source):
        raise MissingError(
            f"{source!r} is no folder here and not in the hub cache, and {constants.ENDPOINT} does not answer",
            do="check the name and the network; a folder must exist, a hub id has the form owner/name",
        )
    return True


def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library behind the client is not ours to name; its errors are what the client's own derive from.
    failures = tuple(kind for kind in (*HfHubHTTPError.__bases__, OSError) if issubclass(kind, Exception))
    try:
        get_session().head(endpoint, timeout=SECONDS)
    except failures:
        return False
    return True


def _is_cached(source: str) -> bool:
    return any(in_cache(source, name) is not None for name in FILES)


def in_cache(source: str, name: str) -> Path | None:
    """The file of that name of a hub id, in the hub cache; None where it is not there. Nobody is asked for it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
