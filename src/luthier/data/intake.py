"""The intake: rows of all files through the renderer and the checks; each is kept with its views, or refused.

Idea: the one pass over data, for a run, a check and a count alike. Rows come and go in small batches, one being made
into tokens while the template is asked about the next; what stays is what the caller takes. A refused row leaves no
trace in the renderer's counts, so what they say is true of what is kept.

A pass without a renderer finds all rows that cannot even be read, before the slow work of rendering begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, final

from luthier.core.errors import DataError, RecipeError
from luthier.data.checks import check_rendered, sound_rows
from luthier.data.conversation import Asked, Choices, Content, Conversation, Judged, Labelled, Preference, Row, Tagged
from luthier.data.findings import Noted, noted
from luthier.data.reading.rows import SourceFile, open_source
from luthier.data.rendering.layout import Filled
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.renderer import Renderer, Staged

BATCH_ROWS = 256
BATCH_CHARACTERS = 2**18
"""Rows that are rendered together: enough that a call for all costs little, few enough to stay in the caches."""
FIRST_ROWS = 32
"""Rows that are rendered together at first, and then twice as many: of the first the shapes are not known."""


@dataclass(slots=True)
class FileReport:
    """What became of one file: `start` is the number of its first row where files are numbered as one sequence."""

    source: SourceFile
    format: str
    why: str
    start: int
    read: int = 0
    kept: int = 0

    @property
    def rejected(self) -> int:
        return self.read - self.kept


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that may be trained on, and its views (none when it was dropped for its length).

    `noted` is what is known of it from a look at many rows.
    """

    file: int
    row: Row
    views: list[Rendered]
    noted: Noted | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used, and everything that is wrong with it; `rendering` says that it could be read."""

    file: int
    errors: tuple[DataError, ...]
    rendering: bool


@dataclass(frozen=True, slots=True)
class Read:
    """What an earlier pass has read of the same sources: the files, and each row with the number of its file."""

    files: Sequence[FileReport]
    rows: Sequence[tuple[int, Row]]


@final
class Intake:
    """One pass over `sources`; `files` counts while it is iterated. Without a renderer rows are only read.

    With `read`, all of whose rows could be read, the files are not read again.
    """

    def __init__(self, sources: Sequence[SourceFile], renderer: Renderer | None, *, read: Read | None = None) -> None:
        if not sources:
            raise RecipeError("no data file is named", allowed="at least one")
        self.sources = sources
        self.files: list[FileReport] = []
        self._renderer = renderer
        self._read = read

    @property
    def read(self) -> int:
        return sum(file.read for file in self.files)

    @property
    def kept(self) -> int:
        return sum(file.kept for file in self.files)

    def __iter__(self) -> Iterator[Kept | Refused]:
        if self._renderer is None:
            for file, item in self.items():
                yield Refused(file, (item,), rendering=False) if isinstance(item, DataError) else Kept(file, item, [])
            return
        with ThreadPoolExecutor(1, "templates") as thread:
            waiting: _Batch | None = None
            for items in self._batches():
                staged = [item if isinstance(item, DataError) else self._renderer.stage(item) for _, item in items]
                asked = self._renderer.fill([one for one in staged if isinstance(one, Staged)])
                # The template's process works on the next rows while these become tokens.
                ahead = thread.submit(self._renderer.ask, asked) if asked else None
                if waiting is not None:
                    yield from self._finished(waiting, self._renderer)
                waiting = _Batch([file for file, _ in items], staged, ahead)
            if waiting is not None:
                yield from self._finished(waiting, self._renderer)

    def items(self) -> Iterator[tuple[int, Row | DataError]]:
        """Everything as it is read, counted, with the number of its file; none of it is rendered."""
        for file, item in self._items():
            counts = self.files[file]
            counts.read += 1
            if not isinstance(item, DataError):
                counts.kept += 1
            yield file, item

    def _batches(self) -> Iterator[list[tuple[int, Row | DataError]]]:
        batch: list[tuple[int, Row | DataError]] = []
        size, most = 0, min(FIRST_ROWS, BATCH_ROWS)
        for file, item in self._items():
            batch.append((file, item))
            size += size_of(item) if isinstance(item, Row) else 0
            if len(batch) == most or size > BATCH_CHARACTERS:
                yield batch
                batch, size, most = [], 0, min(2 * most, BATCH_ROWS)
        if batch:
            yield batch

    def _items(self) -> Iterator[tuple[int, Row | DataError]]:
        if self._read is not None:
            self.files = [replace(file, read=0, kept=0) for file in self._read.files]
            yield from self._read.rows
            return
        number = 0
        for file, source in enumerate(self.sources):
            opened = open_source(source)
            self.files.append(FileReport(source, opened.format, opened.why, start=number))
            for item in opened.items:
                if isinstance(item, Row):
                    # In one file a row keeps the number it has there; several files are numbered as one sequence.
                    yield file, item if len(self.sources) == 1 else replace(item, number=number)
                    number += 1
                else:
                    yield file, item

    def _finished(self, batch: _Batch, renderer: Renderer) -> Iterator[Kept | Refused]:
        if batch.ahead is not None:
            batch.ahead.result()
        renderer.encode_ahead([one for one in batch.staged if isinstance(one, Staged)])
        ready, stops, same = iter(_ready(renderer)), renderer.stop_ids, True
        for file, one in zip(batch.files, batch.staged, strict=True):
            if isinstance(one, DataError):
                yield self._counted(file, one)
                continue
            ahead = next(ready, None) if isinstance(one.ready, Filled) else None
            if ahead is not None and same:
                renderer.accept(one.row, ahead.filled, len(ahead.view.tokens), ahead.trained)
                yield self._counted(file, Kept(file, one.row, [ahead.view], ahead.noted))
                continue
            made = renderer.finish(one)
            # Where one more token ends turns, the rows behind have to be looked at again.
            same = same and renderer.stop_ids == stops
            errors = (made,) if isinstance(made, DataError) else _problems(one.row, made, renderer)
            if errors:
                renderer.take_back()
                yield self._counted(file, Refused(file, errors, rendering=True))
            elif not isinstance(made, DataError):
                yield self._counted(file, Kept(file, one.row, made))

    def _counted(self, file: int, item: Kept | Refused | DataError) -> Kept | Refused:
        self.files[file].read += 1
        self.files[file].kept += isinstance(item, Kept)
        return Refused(file, (item,), rendering=False) if isinstance(item, DataError) else item


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows on their way, the file of each, and the renderings that are being made for them."""

    files: Sequence[int]
    staged: Sequence[Staged | DataError]
    ahead: Future[None] | None


class _Ready(NamedTuple):
    """A row that was made and checked together with others: its view, how much of it carries loss, and its digests."""

    filled: Filled
    view: Rendered
    trained: int
    noted: Noted


def _ready(renderer: Renderer) -> list[_Ready | None]:
    """The rows that were encoded last and are laid out; None for one that has to be looked at by itself."""
    batch = renderer.weigh_ahead()
    if batch is None:
        return []
    sound, notes = sound_rows(batch, renderer), noted(batch, renderer)
    made = zip(sound, zip(batch.filled, batch.views(), batch.trained, notes, strict=True), strict=True)
    return [_Ready(*each) if is_sound else None for is_sound, each in made]


def _problems(row: Row, views: Sequence[Rendered], renderer: Renderer) -> tuple[DataError, ...]:
    return tuple(problem.error() for view in views for problem in check_rendered(view, renderer, row))


def size_of(row: Row) -> int:
    """About how many characters a row has."""
    return _characters(row.content)


def _characters(content: Content) -> int:
    if isinstance(content, Conversation):
        return sum([len(message.content) for message in content.messages])
    if isinstance(content, Preference | Judged | Asked):
        answers = content.answers if isinstance(content, Preference) else ()
        answers = (content.answer,) if isinstance(content, Judged) else answers
        return _characters(content.asked) + sum(len(message.content) for answer in answers for message in answer)
    if isinstance(content, Tagged):
        return sum(map(len, content.words))
    if isinstance(content, Choices):
        return len(content.prompt) + sum(map(len, content.answers))
    return len(content.text) + (len(content.pair) if isinstance(content, Labelled) else 0)
