"""Look at data as a model would: the exact tokens, the promises about them, their lengths."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np

from luthier.core.errors import DataError, RecipeError
from luthier.data import findings
from luthier.data.class_counts import ClassCounts
from luthier.data.formats import mapped, named
from luthier.data.hub import ModelFiles
from luthier.data.intake import FileReport, Intake, Refused
from luthier.data.prepare import Reading, make_renderer, rendering_notices, sources_of
from luthier.data.reading.rows import OpenSource, open_source
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import Kind, OverLength, Renderer, TrainOn
from luthier.data.row_log import Problems, RowLog
from luthier.data.statistics import LengthHistogram
from luthier.data.tokenizer import Tokenizer
from luthier.data.tokenizer_files import stop_ids
from luthier.model.files.context import context_tokens
from luthier.model.files.sources import resolve_source

MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Checked:
    """What a check of whole files found."""

    files: list[dict[str, str]]
    read: int
    kept: int
    rejected: int
    views: int
    counts: dict[str, Any]
    problems: list[str]
    problem_count: int
    warnings: list[str]
    classes: dict[str, int]
    """How many rows, or words, there are of each class."""

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {**asdict(self), "clean": self.problem_count == 0}

    def demand(self) -> None:
        """Raise DataError when anything was found."""
        if self.problem_count:
            raise DataError(
                f"{self.problem_count:,} {'problem' if self.problem_count == 1 else 'problems'} in {self.read:,} "
                f"{'row' if self.read == 1 else 'rows'} "
                f"({self.kept:,} kept, {self.rejected:,} rejected)",
                do="mend the rows named above, or set data.on_bad_row, data.over_length or data.template in the recipe",
            )


@dataclass(frozen=True)
class Measured:
    """The lengths of whole files."""

    files: list[dict[str, str]]
    histogram: LengthHistogram
    counts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {"files": self.files, **self.histogram.as_dict(), "rendered": self.counts}


def reading(
    format: str | None,
    template: str,
    train_on: str,
    max_tokens: int | None,
    over_length: str,
    columns: Sequence[str] | None,
    kind: str = "causal",
) -> Reading:
    """The reading that command-line flags describe. What a format or columns that are named mean is wanted."""
    pairs = [item.partition("=") for item in columns or ()]
    if wrong := [key for key, mark, value in pairs if not mark or not value]:
        raise RecipeError(f"--column {wrong[0]!r} is no pair", allowed="ROLE=COLUMN, such as prompt=question")
    named_columns = {key: value for key, _, value in pairs} or None
    given = named(format) if format is not None else mapped(named_columns) if named_columns else None
    return Reading(
        format=format,
        columns=named_columns,
        kind=_one_of("--for", kind, get_args(Kind)),
        wanted=None if given is None else (given.meaning,),
        template=template,
        train_on=_one_of("--train-on", train_on, get_args(TrainOn)),
        max_tokens=max_tokens,
        over_length=_one_of("--over-length", over_length, get_args(OverLength)),
    )


def show_rows(file: str, model: str, how: Reading, *, rows: int) -> dict[str, Any]:
    """The first rows as tokens with role and weight, what was detected, and how the template was chosen."""
    how = _as_read(file, how)
    renderer, notices = _renderer(model, how)
    shown: list[dict[str, Any]] = []
    detected = []
    for source in sources_of(file, how):
        opened = open_source(source)
        detected.append(_detected(opened))
        for item in opened.items:
            if isinstance(item, DataError):
                raise item
            shown += [{"where": item.where, **_tokens(view, renderer)} for view in renderer.render(item)]
            if item.number + 1 >= rows:
                break
    return {"files": detected, "notices": [*notices, *renderer.counts.notices], "rows": shown}


def check_file(file: str, model: str, how: Reading, *, evaluation: str | None = None) -> Checked:
    """Read, render and check every row; problems are collected, not raised, and so is what is odd about sound rows.

    With an `evaluation` file, its rows are checked too and compared with the others.
    """
    how = _as_read(file, how)
    renderer, notices = _renderer(model, how)
    sources = sources_of(file, how)
    held_files = sources_of(evaluation, how) if evaluation is not None else []
    intake = Intake([*sources, *held_files], renderer)
    log = RowLog(intake, renderer)
    problems = Problems(most=MOST_PROBLEMS)
    classes = ClassCounts(renderer.classes)
    for item in log:
        if isinstance(item, Refused):
            problems.add(item)
        else:
            classes.see(item.views, item.row.where, held=item.file >= len(sources))
    report = log.report()
    held = report.records["file"] >= len(sources)
    chat, labelled = bool(report.answers.trained), bool(classes.by_name())
    flat = [str(report.answers.flat())] if report.answers.all_empty else []
    flat += map(str, classes.problems())
    warnings = [
        *notices,
        *rendering_notices(report, renderer),
        *report.answers.warnings(),
        *findings.warnings(report.records, held, ~held, report.address, chat=chat, classes=labelled),
    ]
    return Checked(
        files=[_detected(opened) for opened in intake.files],
        read=report.read,
        kept=report.kept,
        rejected=report.rejected,
        views=renderer.counts.views,
        counts=renderer.counts.as_dict(),
        problems=[*problems.lines(), *flat],
        problem_count=problems.count + len(flat),
        warnings=warnings,
        classes=classes.by_name(),
    )


def measure(file: str, model: str, how: Reading) -> Measured:
    """The lengths of all rows that can be rendered, and the counts. Raises DataError for one that cannot."""
    how = _as_read(file, how)
    renderer, _ = _renderer(model, how)
    intake = Intake(sources_of(file, how), renderer)
    lengths = array("q")
    for item in intake:
        if isinstance(item, Refused):
            raise item.errors[0]
        lengths.extend(len(view.tokens) for view in item.views)
    histogram = LengthHistogram.of(np.frombuffer(lengths, np.int64), trained_count=renderer.counts.trained_tokens)
    return Measured([_detected(opened) for opened in intake.files], histogram, renderer.counts.as_dict())


def _as_read(file: str, how: Reading) -> Reading:
    """How a file is read where nobody has said it: as words to learn or, where its rows are none, as preferences."""
    if how.wanted is not None or how.kind != "causal" or _opens(file, how):
        return how
    wider = replace(how, wanted=("preference", "judged"))
    return wider if _opens(file, wider) else how


def _opens(file: str, how: Reading) -> bool:
    """Whether the rows of a file are recognised."""
    try:
        for source in sources_of(file, how):
            open_source(source)
    except DataError:
        return False
    return True


def _detected(opened: OpenSource | FileReport) -> dict[str, str]:
    return {"path": str(opened.source.path), "format": opened.format, "why": opened.why}


def _renderer(model: str, how: Reading) -> tuple[Renderer, tuple[str, ...]]:
    source = resolve_source(model)
    if how.kind == "seq2seq":
        how = replace(how, start_id=_start_id(source))
    return make_renderer(Tokenizer.load(source), how, context_tokens=context_tokens(model))


def _start_id(source: str) -> int | None:
    """The token that the decoder of an encoder-decoder starts with, as the model's files name it."""
    files = ModelFiles.of(source)
    for name in ("generation_config.json", "config.json"):
        found = stop_ids(files.json(name), "decoder_start_token_id")
        if found:
            return found[0]
    return None


def _tokens(view: Rendered, renderer: Renderer) -> dict[str, Any]:
    tokens: list[dict[str, Any]] = [
        {
            "id": int(token),
            "text": renderer.tokenizer.token_text(int(token)),
            "role": TOKEN_ROLES[int(role)],
            "weight": float(weight),
        }
        for token, role, weight in zip(view.tokens, view.roles, view.weights, strict=True)
    ]
    if view.labels is not None:
        for place in np.flatnonzero(view.labels >= 0).tolist():
            tokens[place]["class"] = renderer.classes.names[int(view.labels[place])]
    if view.answers is not None:
        for token, number in zip(tokens, view.answers.tolist(), strict=True):
            token["answer"] = number
    return {"row": view.row, "tokens": tokens}


def _one_of(flag: str, value: str, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise RecipeError(f"{flag} is {value!r}", allowed=" | ".join(allowed))
    return value
