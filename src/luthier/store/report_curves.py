"""The curves of a report: by what a run is measured, large, and beside it small ones of what explains it.

Idea: a fine-tune is measured by its loss. Reinforcement learning is not, for its loss says nothing: there it is the
reward that is drawn, in training and of held-out prompts, then each part of it by itself, then what tells why nothing
is learned (groups whose answers were all worth the same), of collapse (surprise) and of drift (length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from luthier.core.units import percent_text
from luthier.store.curves import Line, Mark, Point, decimate, draw, smooth
from luthier.store.report_files import RunFiles, listing, mapping, number, step_of, text_of

Events = Sequence[dict[str, Any]]
_Small = tuple[str, list[Line], bool]
"""A small picture: its title, its lines, and whether its axis begins at 0."""


@final
@dataclass(frozen=True)
class Measure:
    """What a run is measured by: where training tells it, and whether less of it is better."""

    noun: str
    kind: str
    sign: int

    def trained(self, files: RunFiles) -> list[Point]:
        """As training told it."""
        return points(files.of_kind(self.kind), self.noun)

    def held_out(self, files: RunFiles) -> list[Point]:
        """As evaluations told it."""
        return points(files.of_kind("evaluation"), self.noun)

    def of_loss(self, loss: object) -> float | None:
        """What a held-out loss says of it; that of a reward is minus the reward."""
        found = number(loss)
        return None if found is None else self.sign * found

    def best(self, held_out: Sequence[Point]) -> Point | None:
        """The best held-out point after the first step."""
        return min((point for point in held_out if point[0] > 0), key=lambda point: self.sign * point[1], default=None)


LOSS: Final = Measure("loss", "step", 1)
REWARD: Final = Measure("reward", "rollout", -1)


def measure_of(files: RunFiles) -> Measure:
    """What a run is measured by."""
    return REWARD if files.of_kind("rollout") else LOSS


def curves_of(files: RunFiles, measure: Measure) -> dict[str, Any] | None:
    """All curves, and what is said beside them; None where there is none."""
    trained, held_out = measure.trained(files), measure.held_out(files)
    if not trained and not held_out:
        return None
    steps, evaluations = files.of_kind("step"), files.of_kind("evaluation")
    best = measure.best(held_out)
    last = max((step_of(event) for event in [*steps, *evaluations]), default=0)
    last = max(last, *(round(step) for step, _ in [*trained, *held_out]))
    span, ring = (0.0, float(last)), best[0] if best else None
    smoothed = _smoothed(trained)
    lines = [*_noisy(trained), Line(style="held", points=held_out, dots=True, ring=ring)]
    bad, checkpoints = files.of_kind("bad_step"), files.of_kind("checkpoint")
    rates, norms = points(steps, "learning_rate"), points(steps, "grad_norm")
    small: list[_Small] = [
        ("Learning rate", [Line(style="smooth", points=rates)], True),
        ("Gradient norm before clipping", _noisy(norms), False),
    ]
    parts, more = _rewards(files) if measure == REWARD else ([], [])
    title, from_zero = f"{measure.noun.capitalize()} over {last:,} steps", _from_zero(measure, lines)
    return {
        "svg": draw([line for line in lines if line.points], title, steps=span, marks=_marks(checkpoints, bad),
                    from_zero=from_zero),
        "small": [_drawn(each, span) for each in [*parts, *small] if any(line.points for line in each[1])],
        "more": [_drawn(each, span) for each in more if any(line.points for line in each[1])],
        "smoothed": bool(smoothed),
        "held_out": bool(held_out),
        "saved": bool(checkpoints),
        "best": f"{best[0]:,.0f}" if best else "",
        "rise": _rise(best, held_out) if measure == LOSS else "",
        "bad": [_bad(event) for event in bad],
        "evaluations": [
            {"step": f"{step:,.0f}", "loss": loss_text(value), "best": step == ring} for step, value in held_out
        ],
        "names": [f"training {measure.noun}", "smoothed", "held-out", "learning rate", "gradient norm"],
        "readings": _readings(steps, dict(trained), dict(smoothed), dict(held_out)),
    }  # fmt: skip


def loss_text(value: float) -> str:
    """Three digits after the point; small losses keep three that matter, large ones one."""
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def points(events: Events, key: str) -> list[Point]:
    """The finite numbers that events have under a key, by step."""
    return [(step_of(event), value) for event in events if (value := number(event.get(key))) is not None]


def _rewards(files: RunFiles) -> tuple[list[_Small], list[_Small]]:
    """Small curves of reinforcement learning: parts of the reward one by one with what explains them, and parts of
    parts."""
    rollouts, evaluations = files.of_kind("rollout"), files.of_kind("evaluation")
    names = dict.fromkeys(text_of(name) for event in rollouts for name in mapping(event.get("parts")))
    apart = [{**mapping(event.get("parts")), "step": event.get("step")} for event in rollouts]
    plots: dict[str, _Small] = {}
    for name in names:
        lines = [*_noisy(points(apart, name)), Line(style="held", points=points(evaluations, name), dots=True)]
        plots[name] = (f"Reward: {name}", lines, _from_zero(REWARD, lines))
    told: list[_Small] = [
        ("Groups whose answers were all worth the same, %", _noisy(_alike(rollouts)), True),
        ("Tokens of an answer", _noisy(points(rollouts, "length")), True),
        ("Surprise of a sampled token, nats", _noisy(points(rollouts, "entropy")), True),
    ]
    leash = points(rollouts, "leash")
    if any(value for _, value in leash):
        told.append(("Leash to the reference (beta)", _noisy(leash), False))
    told.append(("Loss, which says nothing here", _noisy(points(files.of_kind("step"), "loss")), False))
    inner = [plot for name, plot in plots.items() if "/" in name]
    return [*(plot for name, plot in plots.items() if "/" not in name), *told], inner


def _alike(rollouts: Events) -> list[Point]:
    found = []
    for event in rollouts:
        groups, alike = number(event.get("groups")), number(event.get("alike"))
        if groups and alike is not None:
            found.append((float(step_of(event)), 100 * alike / groups))
    return found


def _from_zero(measure: Measure, lines: Sequence[Line]) -> bool:
    """Whether an axis begins at 0: shares of what can be reached are compared by their height."""
    values = [value for line in lines for _, value in line.points]
    return measure == REWARD and bool(values) and min(values) >= 0


def _drawn(small: _Small, span: Point) -> dict[str, str]:
    title, lines, from_zero = small
    shown = [line for line in lines if line.points]
    return {"title": title, "svg": draw(shown, title, steps=span, width=352, height=130, from_zero=from_zero)}


def _marks(checkpoints: Events, bad: Events) -> list[Mark]:
    return [
        Mark(style=style, step=step_of(event), title=f"{said} {step_of(event):,}")
        for style, said, events in (("saved", "checkpoint at step", checkpoints), ("bad", "bad step", bad))
        for event in events
    ]


def _bad(event: dict[str, Any]) -> dict[str, str]:
    return {
        "step": f"{step_of(event):,}",
        "what": text_of(event.get("what")),
        "value": text_of(event.get("value")),
        "rows": ", ".join(map(text_of, listing(event.get("rows")))),
    }


def _noisy(found: Sequence[Point]) -> list[Line]:
    """A curve that jumps from step to step: thin, with its average over it."""
    average = _smoothed(found)
    if not average:
        return [Line(style="smooth", points=found)]
    return [Line(style="raw", points=found), Line(style="smooth", points=average)]


def _smoothed(found: Sequence[Point]) -> list[Point]:
    """The running average, about a fiftieth of the run wide; nothing below twenty points, which need none."""
    if len(found) < 20:
        return []
    even = smooth([value for _, value in found], span=max(len(found) / 50, 4))
    return [(step, value) for (step, _), value in zip(found, even, strict=True)]


def _rise(best: Point | None, held_out: Sequence[Point]) -> str:
    """How far the held-out loss rose after its best, when that is more than noise."""
    if best is None or best[1] <= 0 or held_out[-1][1] <= 1.02 * best[1]:
        return ""
    return percent_text(held_out[-1][1] / best[1] - 1)


def _readings(
    steps: Events, trained: dict[float, float], even: dict[float, float], tested: dict[float, float]
) -> list[list[str | int]]:
    """What is said when a step is pointed at: its number, then training, smoothed and held-out value, rate and norm."""
    known = {step_of(event): event for event in steps}
    every = sorted(known.keys() | {round(step) for step in (*trained, *tested)})
    heights = [trained.get(step, 0.0) for step in every]
    wanted = sorted({every[index] for index in decimate(heights)} | {round(step) for step in tested})
    rows: list[list[str | int]] = []
    for step in wanted:
        event = known.get(step, {})
        values = (trained.get(step), even.get(step), tested.get(step))
        others = (number(event.get("learning_rate")), number(event.get("grad_norm")))
        rows.append([step, *("" if value is None else loss_text(value) for value in values),
                     *("" if value is None else f"{value:.3g}" for value in others)])  # fmt: skip
    return rows
