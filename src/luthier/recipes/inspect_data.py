"""Look at data as a model would: the exact tokens, the promises about them, their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from luthier.core.errors import DataError, RecipeError
from luthier.data.checks import Problem, check_rendered
from luthier.data.conversation import Row
from luthier.data.prepare import Reading, make_renderer, sources_of
from luthier.data.rendered import TOKEN_ROLES, Rendered
from luthier.data.renderer import OverLength, Renderer, TrainOn
from luthier.data.rows import open_source
from luthier.data.statistics import LengthHistogram
from luthier.data.tokenizer import Tokenizer
from luthier.model.load import context_tokens, resolve_source

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

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {**asdict(self), "clean": self.problem_count == 0}

    def demand(self) -> None:
        """Raise DataError when anything was found."""
        if self.problem_count:
            raise DataError(
                f"{self.problem_count:,} {'problem' if self.problem_count == 1 else 'problems'} in {self.read:,} rows "
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
) -> Reading:
    """The reading that command-line flags describe."""
    pairs = [item.partition("=") for item in columns or ()]
    if wrong := [key for key, mark, value in pairs if not mark or not value]:
        raise RecipeError(f"--column {wrong[0]!r} is no pair", allowed="ROLE=COLUMN, such as prompt=question")
    return Reading(
        format=format,
        columns={key: value for key, _, value in pairs} or None,
        template=template,
        train_on=_one_of("--train-on", train_on, get_args(TrainOn)),
        max_tokens=max_tokens,
        over_length=_one_of("--over-length", over_length, get_args(OverLength)),
    )


def show_rows(file: str, model: str, how: Reading, *, rows: int) -> dict[str, Any]:
    """The first rows as tokens with role and weight, what was detected, and how the template was chosen."""
    renderer, notices = _renderer(model, how)
    shown: list[dict[str, Any]] = []
    detected = []
    for source in sources_of(file, how):
        opened = open_source(source)
        detected.append({"path": str(source.path), "format": opened.format, "why": opened.why})
        for item in opened.items:
            if isinstance(item, DataError):
                raise item
            shown += [{"where": item.where, **_tokens(view, renderer)} for view in renderer.render(item)]
            if item.number + 1 >= rows:
                break
    return {"files": detected, "notices": [*notices, *renderer.counts.notices], "rows": shown}


def check_file(file: str, model: str, how: Reading) -> Checked:
    """Read, render and check every row; problems are collected, not raised."""
    renderer, _ = _renderer(model, how)
    problems: list[str] = []
    count = read = rejected = views = 0
    files = []
    for source in sources_of(file, how):
        opened = open_source(source)
        files.append({"path": str(source.path), "format": opened.format, "why": opened.why})
        for item in opened.items:
            read += 1
            found = _check(item, renderer) if isinstance(item, Row) else [str(item)]
            rejected += bool(found)
            count += len(found)
            problems += found[: max(0, MOST_PROBLEMS - len(problems))]
    views = renderer.counts.views
    return Checked(files, read, read - rejected, rejected, views, renderer.counts.as_dict(), problems, count)


def measure(file: str, model: str, how: Reading) -> Measured:
    """The lengths of all rows that can be rendered, and the counts. Raises DataError for one that cannot."""
    renderer, _ = _renderer(model, how)
    lengths = []
    files = []
    for source in sources_of(file, how):
        opened = open_source(source)
        files.append({"path": str(source.path), "format": opened.format, "why": opened.why})
        for item in opened.items:
            if isinstance(item, DataError):
                raise item
            lengths += [len(view.tokens) for view in renderer.render(item)]
    histogram = LengthHistogram.of(lengths, trained_count=renderer.counts.trained_tokens)
    return Measured(files, histogram, renderer.counts.as_dict())


def _renderer(model: str, how: Reading) -> tuple[Renderer, tuple[str, ...]]:
    tokenizer = Tokenizer.load(resolve_source(model))
    return make_renderer(tokenizer, how, context_tokens=context_tokens(model))


def _check(row: Row, renderer: Renderer) -> list[str]:
    try:
        views = renderer.render(row)
    except DataError as error:
        return [str(error)]
    problems: list[Problem] = [problem for view in views for problem in check_rendered(view, renderer, row)]
    return [str(problem) for problem in problems]


def _tokens(view: Rendered, renderer: Renderer) -> dict[str, Any]:
    tokens = [
        {
            "id": int(token),
            "text": renderer.tokenizer.token_text(int(token)),
            "role": TOKEN_ROLES[int(role)],
            "weight": float(weight),
        }
        for token, role, weight in zip(view.tokens, view.roles, view.weights, strict=True)
    ]
    return {"row": view.row, "tokens": tokens}


def _one_of(flag: str, value: str, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise RecipeError(f"{flag} is {value!r}", allowed=" | ".join(allowed))
    return value
