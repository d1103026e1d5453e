"""From data files to training and held-out rows: read, render, check, split, and count every row on the way.

Idea: the one path from files to tokens, whether a run, a check or a look at the data asks for it. Reading always
happens, because it is what finds bad rows; rendering and checking happen once for the same content and settings and
are cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Row, Text
from luthier.data.rendered import Rendered
from luthier.data.renderer import OverLength, Renderer, TrainOn
from luthier.data.rows import OnBadRow, RowReport, SourceFile, find_sources, read_rows
from luthier.data.statistics import LengthHistogram
from luthier.data.template import choose
from luthier.data.token_store import TokenStore, store_key
from luthier.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become tokens: everything but the tokenizer."""

    format: str | None = None
    columns: dict[str, str] | None = None
    template: str = "auto"
    train_on: TrainOn = "answers"
    max_tokens: int | None = None
    over_length: OverLength = "raise"
    on_bad_row: OnBadRow = "raise"


@final
@dataclass(frozen=True)
class Views:
    """Some of the views of a store, by index: a training set, or the rows that were held out of it."""

    store: TokenStore
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Rendered:
        return self.store[int(self.indices[index])]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.store.lengths[self.indices]


@dataclass(frozen=True)
class Prepared:
    """Data ready for a run, with the counts of everything that happened to it."""

    report: RowReport
    renderer: Renderer
    store: TokenStore
    train: Views
    held_out: Views
    notices: tuple[str, ...] = ()

    def counts(self) -> dict[str, Any]:
        """What became of the rows, as plain values."""
        return {
            "read": self.report.read,
            "kept": self.report.kept,
            "rejected": self.report.rejected,
            "files": [
                {"path": str(file.source.path), "format": file.format, "why": file.why, "rows": file.kept}
                for file in self.report.files
            ],
            "rendered": self.store.counts.as_dict(),
            "train_views": len(self.train),
            "held_out_views": len(self.held_out),
        }

    def histogram(self) -> LengthHistogram:
        return LengthHistogram.of(self.store.lengths, trained_count=self.store.trained_count)


def make_renderer(
    tokenizer: Tokenizer, reading: Reading, *, context_tokens: int | None = None
) -> tuple[Renderer, tuple[str, ...]]:
    """The renderer of a reading, and what a user should know about the choice of its template.

    Without a limit of its own, rows may be as long as the model's context.
    """
    limit = reading.max_tokens or context_tokens
    if context_tokens is not None and limit is not None and limit > context_tokens:
        raise RecipeError(f"data.max_tokens is {limit}", allowed=f"at most the model's {context_tokens} positions")
    notices: list[str] = []
    template = choose(reading.template, tokenizer, notice=notices.append)
    renderer = Renderer(
        tokenizer,
        template,
        train_on=reading.train_on,
        over_length=reading.over_length,
        max_tokens=limit,
    )
    return renderer, tuple(notices)


def sources_of(paths: str | Path | Sequence[str | Path], reading: Reading) -> list[SourceFile]:
    """The files that paths, globs and folders stand for, each with the reading's format or columns."""
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [source for path in listed for source in find_sources(path)]
    return [replace(source, format=reading.format, columns=reading.columns) for source in found]


def prepare(
    train: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    reading: Reading,
    *,
    evaluation: str | Path | Sequence[str | Path] | None = None,
    fraction: float = 0.0,
    seed: int = 0,
    context_tokens: int | None = None,
    cache: Path | None = None,
) -> Prepared:
    """Read, render, check and split. Raises DataError with the address of what cannot be used.

    With `evaluation` files their rows are held out; else a `fraction` of the rows, drawn by `seed`. All views of a row
    fall on the same side.
    """
    renderer, notices = make_renderer(tokenizer, reading, context_tokens=context_tokens)
    train_sources = sources_of(train, reading)
    held_sources = sources_of(evaluation, reading) if evaluation is not None else []
    report = _numbered(read_rows([*train_sources, *held_sources], on_bad_row=reading.on_bad_row))
    key = store_key(
        [Path(source.path) for source in [*train_sources, *held_sources]],
        renderer,
        reading={
            "format": reading.format,
            "columns": reading.columns,
            "on_bad_row": reading.on_bad_row,
            "limits": [source.limit for source in [*train_sources, *held_sources]],
        },
    )
    store = TokenStore.open_or_build(lambda: report.rows, renderer, key=key, folder=cache)
    if len(store) == 0:
        raise DataError(
            f"none of the {report.read:,} rows is left to train on", do="look at the counts of: luthier data check"
        )
    held = _held_out(report, store, len(train_sources), fraction=fraction, seed=seed)
    train_views, held_views = Views(store, np.flatnonzero(~held)), Views(store, np.flatnonzero(held))
    return Prepared(report, renderer, store, train_views, held_views, notices)


def _numbered(report: RowReport) -> RowReport:
    """Rows of several files numbered as one sequence; in one file a row keeps the number it has there."""
    if len(report.files) == 1:
        return report
    rows = tuple(Row(index, row.where, row.content) for index, row in enumerate(report.rows))
    return replace(report, rows=rows)


def _held_out(
    report: RowReport, store: TokenStore, train_files: int, *, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Which views are held out."""
    if len(report.files) > train_files:
        first = report.files[train_files].start
        held_rows = np.array([row.number for row in report.rows[first:]], dtype=np.int64)
        return np.isin(store.rows, held_rows)
    rows = np.unique(store.rows)
    if len(rows) == 1 and isinstance(report.rows[0].content, Text):
        # One long text: its pieces share no token, so the last ones can be held out.
        share = min(max(1, round(fraction * len(store))), len(store) - 1) if fraction > 0 else 0
        return np.arange(len(store)) >= len(store) - share
    count = round(fraction * len(rows))
    if fraction > 0 and len(rows) > 1:
        count = max(1, min(count, len(rows) - 1))
    chosen = np.random.default_rng([seed, 0x5EED]).permutation(rows)[:count]
    return np.isin(store.rows, chosen)
