"""Parity: whether an artefact computes what it was made from, measured before anybody is given it.

Idea: source and artefact are two sides that answer the same questions. Held-out prompts go through both, and the
logits are held against each other at every token; training rows are rendered by both, and compared id by id; where
answers end, and settings that steer a computation (rope's base, a window, a cap), must be the same. What the source
says is written down first (`hear`), so that it can be let go before the artefact is loaded. Where numbers are too far
apart, sketches of the weights tell which tensors differ, and by how much.

Equation: with logits z of the source and y of the artefact, at each of N tokens: max |z - y| in units of the standard
deviation of all z; (1/N) sum of KL(softmax z || softmax y); the share of tokens with argmax z = argmax y, each given
the same text before it, among all and among those that are no near ties: where the first of z is more than `tie`
standard deviations before the second.

Use when: a model was merged, exported or converted. What is let pass is in tolerances.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.core.errors import GateError
from luthier.core.units import percent_text
from luthier.data.conversation import Row
from luthier.data.forest import Ints
from luthier.model.comparing.sketches import Sketch, sketched
from luthier.model.comparing.tolerances import Tolerance

Gives = Literal["logits", "states"]
"""What a side gives at each token: scores of what comes next or of classes, or the states of an encoder."""
MOST_FINDINGS: Final = 4
MOST_TENSORS: Final = 3
_SHOWN: Final = 48
_FORM: Final = "choose a form that rounds less"


class Side(ABC):
    """One of the two that are compared: a model in memory, a folder, a session of another program."""

    name: str
    gives: Gives = "logits"

    @abstractmethod
    def logits(self, tokens: Ints) -> Float[np.ndarray, "n v"]:
        """What comes out at each token of a prompt, in float32; one row for a model that classifies whole texts."""

    def rendered(self, row: Row) -> tuple[Ints, ...] | None:
        """A training row as tokens, by the artefact's own tokenizer and template; None where it has neither."""
        return None

    def stop_ids(self) -> frozenset[int] | None:
        """Where its answers end; None where it does not say."""
        return None

    def settings(self) -> Mapping[str, Any]:
        """Plain values that steer what is computed, by the names of `settings_of`; only what both name is compared."""
        return {}

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """The weights, by transformers' names; none where they go by others."""
        return ()

    def sketches(self) -> Mapping[str, Sketch]:
        """The weights as sketches, asked for when all logits have been."""
        return sketched(self.tensors())


@final
@dataclass(frozen=True)
class Questions:
    """What both sides are asked: `prompts` to read, and training `rows` to render."""

    prompts: tuple[Ints, ...]
    rows: tuple[Row, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a side has answered, kept when it is gone."""

    name: str
    questions: Questions
    logits: tuple[Float[np.ndarray, "_ v"], ...]
    rendered: tuple[tuple[Ints, ...] | None, ...]
    stop_ids: frozenset[int] | None
    settings: Mapping[str, Any]
    sketches: Mapping[str, Sketch]


@final
@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The share of tokens whose likeliest is the same in both: of all, and of the `decided` that are no near ties."""

    agreement: float
    decided: int
    decided_agreement: float

    def __str__(self) -> str:
        sure = f" ({percent_text(self.decided_agreement)} of the {self.decided} that are no near ties)"
        return percent_text(self.agreement) + (sure if self.agreement < 1 else "")


@final
@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What was found, as plain values. `findings` are sentences, one for each thing that is not as it should be.

    `max_difference` is in logits, `spread` their standard deviation. `mean_kl` and `greedy` are None for states.
    """

    source: str
    artefact: str
    prompts: int
    tokens: int
    max_difference: float
    spread: float
    mean_kl: float | None
    greedy: Greedy | None
    rows: int
    rows_equal: int
    tolerance: Tolerance
    findings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the artefact is the model that it was made from."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        held = asdict(self)
        greedy = held.pop("greedy") or {"agreement": None, "decided": None, "decided_agreement": None}
        told = {"findings": list(self.findings), "passed": self.passed, "let_pass": self.tolerance.bounds()}
        return {**held, **greedy, **told}

    def numbers(self) -> str:
        """What was measured, in one line."""
        parts = [f"max |logit difference| {self.max_difference:.2g} (logits have a spread of {self.spread:.2g})"]
        if self.mean_kl is not None and self.greedy is not None:
            parts += [f"mean KL {self.mean_kl:.2g}", f"greedy agreement {self.greedy}"]
        rows = f", {self.rows_equal} of {self.rows} training rows render alike" if self.rows else ""
        return f"{', '.join(parts)} over {self.tokens} tokens{rows}"

    def require(self, *, instead: str = _FORM) -> None:
        """Raise GateError, with what differs and all numbers, unless it has passed; `instead` is a way out."""
        if self.passed:
            return
        more = len(self.findings) - MOST_FINDINGS
        told = [*self.findings[:MOST_FINDINGS], *([f"and {more} more findings"] if more > 0 else [])]
        raise GateError(
            f"{self.artefact} is not the model it was made from: {'; '.join(told)} ({self.numbers()})",
            allowed=self.tolerance.bounds(),
            do=f"nothing was kept; {instead}, or report this",
        )


def hear(side: Side, questions: Questions) -> Heard:
    """Write down what a side answers, so that it can be let go."""
    return Heard(
        name=side.name,
        questions=questions,
        logits=tuple(side.logits(prompt) for prompt in questions.prompts),
        rendered=tuple(side.rendered(row) for row in questions.rows),
        stop_ids=side.stop_ids(),
        settings=dict(side.settings()),
        sketches=side.sketches(),
    )


def compare(source: Heard, artefact: Side, tolerance: Tolerance) -> ParityReport:
    """Ask the artefact what the source was asked, and hold its answers against what was heard. Nothing is raised."""
    found: list[str] = []
    rows_equal, rows = _compare_rows(source, artefact, found)
    _compare_stops(source, artefact, found)
    _compare_settings(source, artefact, found)
    numbers = _Numbers(_spread(source.logits), tie=tolerance.tie)
    # A single number is likeliest whatever it is.
    states = artefact.gives == "states" or all(each.shape[-1] == 1 for each in source.logits)
    for prompt, wanted in zip(source.questions.prompts, source.logits, strict=True):
        numbers.add(wanted, artefact.logits(prompt), states=states)
    report = ParityReport(
        source=source.name,
        artefact=artefact.name,
        prompts=len(source.logits),
        tokens=numbers.tokens,
        max_difference=numbers.difference,
        spread=numbers.spread,
        mean_kl=None if states else numbers.kl / max(1, numbers.tokens),
        greedy=None if states else numbers.greedy(),
        rows=rows,
        rows_equal=rows_equal,
        tolerance=tolerance,
    )
    found += (apart := numbers.odd or list(_beyond(report)))
    if apart or tolerance.weights is not None:
        found += _tensors_that_differ(source.sketches, artefact, tolerance.weights)
    return ParityReport(**{**vars(report), "findings": tuple(found)})


class _Numbers:
    """Sums over all tokens of all prompts; `odd` are shapes and numbers that cannot be compared."""

    def __init__(self, spread: float, *, tie: float) -> None:
        self.spread, self.tie = spread, tie
        self.tokens = self.equal = self.decided = self.decided_equal = 0
        self.difference = self.kl = 0.0
        self.odd: list[str] = []

    def add(self, wanted: Float[np.ndarray, "n v"], found: Float[np.ndarray, "m w"], *, states: bool) -> None:
        if self.odd:
            return
        if wanted.shape != found.shape:
            self.odd = [f"it gives {found.shape[0]} x {found.shape[1]} numbers for a prompt, not {wanted.shape[0]} x "
                        f"{wanted.shape[1]}"]  # fmt: skip
        elif not np.isfinite(found).all():
            self.odd = ["what it computes is not finite"]
        if self.odd:
            self.difference = self.kl = float("inf")
            return
        self.tokens += len(wanted)
        self.difference = max(self.difference, float(np.abs(wanted - found).max(initial=0.0)))
        if not states:
            before, after = _log_softmax(wanted), _log_softmax(found)
            self.kl += max(0.0, float((np.exp(before) * (before - after)).sum()))
            same = wanted.argmax(-1) == found.argmax(-1)
            second, first = np.partition(wanted, -2)[:, -2:].T
            decided = first - second > self.tie * self.spread
            self.equal += int(same.sum())
            self.decided += int(decided.sum())
            self.decided_equal += int((same & decided).sum())

    def greedy(self) -> Greedy:
        return Greedy(agreement=_share(self.equal, self.tokens), decided=self.decided,
                      decided_agreement=_share(self.decided_equal, self.decided))  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _log_softmax(logits: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def _spread(logits: Iterable[Float[np.ndarray, "_ v"]]) -> float:
    """The standard deviation over the words, on average over all tokens; over all texts where there is one number."""
    parts = [each.astype(np.float64) for each in logits if each.size]
    if not parts:
        return 1.0
    single = parts[0].shape[-1] == 1
    found = np.concatenate(parts).std() if single else np.mean([each.std(-1).mean() for each in parts])
    return float(found) or 1.0


def _beyond(report: ParityReport) -> Iterator[str]:
    """The numbers that are out of bounds."""
    bounds = report.tolerance
    most = bounds.difference * report.spread
    if not report.max_difference <= most:
        yield f"logits differ by up to {report.max_difference:.3g}, and {most:.3g} is let pass"
    if report.mean_kl is not None and not report.mean_kl <= bounds.kl:
        yield f"the mean KL is {report.mean_kl:.3g}, and {bounds.kl:g} is let pass"
    greedy = report.greedy
    # One token of few may be an exception.
    if greedy is not None and (1 - greedy.decided_agreement) * greedy.decided > max(
        1.0, (1 - bounds.agreement) * greedy.decided
    ):
        yield (f"of {greedy.decided} tokens that are no near ties {percent_text(greedy.decided_agreement)} are the "
               f"likeliest in both, and {percent_text(bounds.agreement)} are needed")  # fmt: skip


def _compare_rows(source: Heard, artefact: Side, found: list[str]) -> tuple[int, int]:
    """How many training rows become the same ids, of how many that both sides can render."""
    equal = total = 0
    told = False
    for row, wanted in zip(source.questions.rows, source.rendered, strict=True):
        # A row that the source refuses is no row of its.
        made = artefact.rendered(row) if wanted else None
        if not wanted or made is None:
            continue
        total += 1
        if len(wanted) == len(made) and all(map(np.array_equal, wanted, made)):
            equal += 1
        elif not told:
            told = True
            found.append(f"its tokenizer or chat template differs: {_first_difference(row, wanted, made)}")
    return equal, total


def _first_difference(row: Row, wanted: tuple[Ints, ...], made: tuple[Ints, ...]) -> str:
    if len(wanted) != len(made):
        return f"{row.where} becomes {len(made)} views, not {len(wanted)}"
    for before, after in zip(wanted, made, strict=True):
        if not np.array_equal(before, after):
            short = min(len(before), len(after))
            apart = np.flatnonzero(before[:short] != after[:short])
            place = int(apart[0]) if len(apart) else short
            was, now = _token(before, place), _token(after, place)
            return f"{row.where} becomes {len(after)} tokens, not {len(before)}; token {place} is {now}, not {was}"
    return f"{row.where} becomes the same tokens"


def _token(tokens: Ints, place: int) -> str:
    return str(int(tokens[place])) if place < len(tokens) else "not there"


def _compare_stops(source: Heard, artefact: Side, found: list[str]) -> None:
    named = artefact.stop_ids()
    if source.stop_ids is not None and named is not None and source.stop_ids != named:
        found.append(f"its answers end at {_listed(named)}, and the source's at {_listed(source.stop_ids)} "
                     "(eos_token_id)")  # fmt: skip


def _listed(tokens: frozenset[int]) -> str:
    return "/".join(map(str, sorted(tokens))) or "no token"


def _compare_settings(source: Heard, artefact: Side, found: list[str]) -> None:
    named = artefact.settings()
    for key in sorted(source.settings.keys() & named.keys()):
        if source.settings[key] != named[key]:
            found.append(f"its {key} is {named[key]!r:.{_SHOWN}}, and the source's {source.settings[key]!r:.{_SHOWN}}")


def _tensors_that_differ(source: Mapping[str, Sketch], artefact: Side, most: float | None) -> Iterator[str]:
    """What sketches say of weights, the worst first; nothing where either side has none by these names."""
    if not source or not (held := artefact.sketches()):
        return
    if missing := sorted(source.keys() - held.keys()):
        yield f"{len(missing)} tensors are missing ({', '.join(missing[:MOST_TENSORS])})"
    apart = {name: source[name].apart(held[name]) for name in source.keys() & held.keys()}
    # Rounding is spread over all tensors; what was damaged stands out.
    usual = float(np.median([*apart.values(), 0.0]))
    bound = 2 * usual + 1e-4 if most is None else most
    worst = sorted((name for name in apart if not apart[name] <= bound), key=lambda name: (-apart[name], name))
    for name in worst[:MOST_TENSORS]:
        yield f"{name} {source[name].difference(held[name])}"
    if len(worst) > MOST_TENSORS:
        yield f"{len(worst) - MOST_TENSORS} more tensors differ"
