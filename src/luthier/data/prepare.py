"""From data files to training and held-out rows: read, render, check, split, and count every row on the way.

Idea: the one path from files to tokens, for a run and for its evaluation. Rows stream: a file is read once to find all
rows that cannot be read, and once more, where it is large, to render, check and store the others; memory holds a few
numbers a row, and no more than some 80 MB of rows. For
the same content and settings all of it is cached, the log of the rows included.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import CorruptError, DataError, RecipeError
from luthier.core.paths import cache_folder
from luthier.data import findings
from luthier.data.class_counts import classes_of_rows, demand_classes
from luthier.data.conversation import WORDS, Meaning
from luthier.data.intake import Intake
from luthier.data.reading.rows import OnBadRow, SourceFile, Stamp, find_sources
from luthier.data.rendering.causal import CausalRenderer
from luthier.data.rendering.encoder import EncoderRenderer
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import MODELS, Kind, OverLength, Renderer, TrainOn
from luthier.data.rendering.seq2seq import Seq2SeqRenderer
from luthier.data.rendering.template import Template, choose
from luthier.data.row_log import KEPT_CHARACTERS, RowLog, RowReport, demand_readable
from luthier.data.split import Split, split
from luthier.data.statistics import LengthHistogram
from luthier.data.token_store import TokenStore, store_key
from luthier.data.tokenizer import Tokenizer

MEANINGS: Mapping[Kind, tuple[Meaning, ...]] = {
    "causal": WORDS,
    "encoder": EncoderRenderer.takes,
    "seq2seq": Seq2SeqRenderer.takes,
}
"""What rows may mean for a kind of model where nothing else is wanted: a causal decoder learns words."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become tokens: everything but the tokenizer.

    `now` is the date that templates see, as YYYY-MM-DD; today when it is empty. A run that is to go on on another day
    keeps the date of its first one.

    `kind` is the kind of model that the tokens are for, `start_id` the token that the decoder of an encoder-decoder
    starts with. `wanted` is what rows may mean, the kind's own choice when it is None; a format has to give that.
    `classes` are the names of a trained model's classes in order; those of the data are used when it is None.
    """

    format: str | None = None
    columns: dict[str, str] | None = None
    template: str = "auto"
    train_on: TrainOn = "answers"
    max_tokens: int | None = None
    over_length: OverLength = "raise"
    on_bad_row: OnBadRow = "raise"
    now: str | None = None
    kind: Kind = "causal"
    start_id: int | None = None
    wanted: tuple[Meaning, ...] | None = None
    classes: tuple[str, ...] | None = None

    @property
    def meanings(self) -> tuple[Meaning, ...]:
        """What rows may mean."""
        return MEANINGS[self.kind] if self.wanted is None else self.wanted


Together = Literal["copies", "prompts"]


@dataclass(frozen=True)
class Holding:
    """Which rows a run holds out of its training rows: the shares, the seed of the draw, and what stays together."""

    fraction: float
    reserve: float
    seed: int
    together: Together


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
    """Data ready for a run, with the counts of everything that happened to it; `notices` are for a person to read."""

    report: RowReport
    renderer: Renderer
    store: TokenStore
    train: Views
    held_out: Views
    notices: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers; none where rows have no classes."""
        return self.store.classes

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


_RENDERERS: Mapping[Kind, type[Renderer]] = {
    "causal": CausalRenderer,
    "encoder": EncoderRenderer,
    "seq2seq": Seq2SeqRenderer,
}


def make_renderer(
    tokenizer: Tokenizer, reading: Reading, *, context_tokens: int | None = None, at_once: bool = True
) -> tuple[Renderer, tuple[str, ...]]:
    """The renderer of a reading, and what a user should know about the choice of its template.

    Without a limit of its own, rows may be as long as the model's context. Without `at_once` the template is compiled
    when it is needed.
    """
    limit = reading.max_tokens or context_tokens
    if context_tokens is not None and limit is not None and limit > context_tokens:
        raise RecipeError(f"data.max_tokens is {limit}", allowed=f"at most the model's {context_tokens} positions")
    takes = _RENDERERS[reading.kind].takes
    if wrong := [meaning for meaning in reading.meanings if meaning not in takes]:
        raise RecipeError(f"{MODELS[reading.kind]} is to be given {wrong[0]} rows", allowed=" | ".join(takes))
    over = reading.over_length
    if reading.kind == "encoder":
        plain = Template("", tokenizer.special_tokens, name="no chat template", at_once=False)
        return EncoderRenderer(tokenizer, plain, over_length=over, max_tokens=limit, classes=reading.classes), ()
    if reading.kind == "seq2seq":
        if reading.start_id is None:
            raise RecipeError("an encoder-decoder without start_id", allowed="the token that its decoder starts with")
        plain = Template("", tokenizer.special_tokens, name="no chat template", at_once=False)
        start, train_on = reading.start_id, reading.train_on
        return Seq2SeqRenderer(
            tokenizer, plain, start_id=start, train_on=train_on, over_length=over, max_tokens=limit
        ), ()
    notices: list[str] = []
    now = _midnight(reading.now)
    template = choose(reading.template, tokenizer, notice=notices.append, now=now, at_once=at_once)
    renderer = CausalRenderer(
        tokenizer,
        template,
        train_on=reading.train_on,
        over_length=over,
        max_tokens=limit,
        classes=reading.classes,
    )
    return renderer, tuple(notices)


def _midnight(day: str | None) -> datetime | None:
    if day is None:
        return None
    try:
        return datetime.combine(date.fromisoformat(day), datetime.min.time()).astimezone()
    except ValueError:
        raise RecipeError(f"the date {day!r}", allowed="a date such as 2026-11-21") from None


def sources_of(paths: str | Path | Sequence[str | Path], reading: Reading) -> list[SourceFile]:
    """The files that paths, globs and folders stand for, each with the reading's format or columns."""
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [source for path in listed for source in find_sources(path)]
    meanings = reading.meanings
    return [replace(one, format=reading.format, columns=reading.columns, wanted=meanings) for one in found]


def prepare(
    train: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    reading: Reading,
    *,
    evaluation: str | Path | Sequence[str | Path] | None = None,
    fraction: float = 0.0,
    seed: int = 0,
    together: Together = "copies",
    reserve: float = 0.0,
    context_tokens: int | None = None,
    cache: Path | None = None,
) -> Prepared:
    """Read, render, check and split. Raises DataError with the address of what cannot be used.

    With `evaluation` files their rows are held out; else a `fraction` of the rows, drawn by `seed`. All views of a row
    fall on the same side, and so do the copies of a row; with `together` all rows that have one prompt. Of the rows
    that are split, a share `reserve` is on neither side.
    """
    # Where the tokens are cached, no template has to be compiled for them.
    renderer, chosen = make_renderer(tokenizer, reading, context_tokens=context_tokens, at_once=False)
    train_sources = sources_of(train, reading)
    sources = [*train_sources, *(sources_of(evaluation, reading) if evaluation is not None else [])]
    # Closed here and not by a finalizer later: an exception in one (a request to stop) would be printed and lost.
    with closing(renderer.template):
        store, report = _stored(sources, renderer, reading, cache)
    if tokenizer.words is not None:
        tokenizer.words.forget()
    report.answers.demand()
    if len(store) == 0:
        raise DataError(
            f"none of the {report.read:,} rows is left to train on", do="look at the counts of: luthier data check"
        )
    chat, labelled = bool(report.answers.trained), store.labels is not None
    parts = _split(report, store, len(train_sources), Holding(fraction, reserve, seed, together))
    if reading.classes is None and store.labels is not None:
        demand_classes(store, parts.held_views, report.where)
    notices = [
        *chosen,
        *rendering_notices(report, renderer),
        *report.answers.warnings(),
        *parts.notices,
        *findings.warnings(
            report.records, parts.held_rows, parts.train_rows, report.address, chat=chat, classes=labelled
        ),
    ]
    sides = Views(store, np.flatnonzero(parts.train_views)), Views(store, np.flatnonzero(parts.held_views))
    return Prepared(report, renderer, store, *sides, tuple(notices))


def rendering_notices(report: RowReport, renderer: Renderer) -> list[str]:
    """What rendering noticed: how often, and where first."""
    told = []
    for text, count in renderer.counts.notices.items():
        where, words = report.examples.get(text, ("", ""))
        first = f", first {where}{f': {words}' if words else ''}" if where else ""
        told.append(f"{text} ({count:,} times{first})")
    return told


def _stored(
    sources: Sequence[SourceFile], renderer: Renderer, reading: Reading, cache: Path | None
) -> tuple[TokenStore, RowReport]:
    """The tokens of all rows, and the log of the reading that made them: from the cache, or made now."""
    stamps = [Stamp.of(source.path) for source in sources]
    key = store_key(
        [Path(source.path) for source in sources],
        renderer,
        reading={
            "format": reading.format,
            "columns": reading.columns,
            "on_bad_row": reading.on_bad_row,
            "limits": [source.limit for source in sources],
            # Only what is not the rule: keys stay what they were before rows could mean other things.
            **({} if reading.meanings == WORDS else {"wanted": list(reading.meanings)}),
        },
    )

    def make(folder: Path) -> Generator[Rendered]:
        if reading.kind == "causal":
            renderer.template.compile()
        # What cannot be read is found in seconds; rendering takes minutes where there are many rows.
        read = demand_readable(sources, keep=KEPT_CHARACTERS) if reading.on_bad_row == "raise" else None
        log = RowLog(Intake(sources, renderer, read=read), renderer, folder=folder)
        for item in log.sound(reading.on_bad_row):
            yield from item.views
        # The digests in the key are of the files as they were before; so must be what was read.
        for source, stamp in zip(sources, stamps, strict=True):
            stamp.demand_same(source.path)
        log.write(folder)

    home = cache if cache is not None else cache_folder() / "tokens"
    store = TokenStore.open_or_build(make, renderer, key=key, folder=home)
    report = RowReport.open(store.folder, sources)
    if report is None:
        raise CorruptError(
            "the log of the rows does not fit the files it was written for",
            do=f"rm -r {store.folder}; it is made again",
            where=str(store.folder),
        )
    return store, report


def _split(report: RowReport, store: TokenStore, train_files: int, how: Holding) -> Split:
    """Which rows are held out."""
    rows = report.records["row"]
    if len(report.files) > train_files:
        first = report.files[train_files].start
        return Split.of(rows, store.rows, rows[rows >= first])
    if len(rows) == 1 and store.labels is None and (store.roles == TOKEN_ROLES.index("text")).any():
        return Split.of_pieces(len(store), how.fraction, reserve=how.reserve)
    groups = None
    if how.fraction > 0 or how.reserve > 0:
        prompts = findings.prompts(store, report.records) if how.together == "prompts" else None
        groups = findings.groups(report.records, prompts)
    return split(
        rows,
        store.rows,
        groups,
        fraction=how.fraction,
        seed=how.seed,
        reserve=how.reserve,
        alike="copies" if how.together == "copies" else "copies or answers to the prompts",
        classes=None if store.labels is None else classes_of_rows(store),
    )
