"""Curves as inline SVG: lines over optimizer steps, with axes whose ticks are round numbers.

Idea: what is drawn is text, coloured by the page's own style sheet (classes, never colours), so a report needs no
plotting library, no network and no script. Above about a thousand points only the lowest and highest point of each
bucket are drawn: the picture is the same to the pixel and spikes stay in it, which an average would hide.

Use when: a page shows numbers of a run. Only finite numbers go in; what is not finite is marked as an event instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

MOST_POINTS: Final = 1000
_LOG_FROM: Final = 10.0
"""A positive curve that spans more than this ratio is drawn on a logarithmic axis: its end would lie on the floor."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve. `style` is its CSS class, `dots` draws its points as well, `ring` circles the point at that step."""

    style: str
    points: Sequence[Point]
    dots: bool = False
    ring: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A tick on the step axis; `title` is shown by the browser when pointed at."""

    style: str
    step: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values from `low` to `high` onto pixels; `ticks` are the values that get a label."""

    low: float
    high: float
    ticks: tuple[float, ...]
    first: float
    last: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.first + (self.last - self.first) * (value - low) / (high - low)


def draw(
    lines: Sequence[Line],
    label: str,
    *,
    steps: tuple[float, float],
    width: int = 720,
    height: int = 250,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
) -> str:
    """The lines as one `<svg>`; `label` is what a screen reader says. `steps` is the range of the step axis."""
    values = [value for line in lines for _, value in line.points]
    across = _step_axis(steps, width)
    up = value_axis(values, bottom=height - 24, top=8, from_zero=from_zero)
    frame = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" data-first="{across.first:g}" '
        f'data-last="{across.last:g}" data-low="{across.low:g}" data-high="{across.high:g}">'
    )
    parts = [frame, *_grid(across, up, height)]
    if up.logarithmic:
        parts.append(f'<text x="{across.last:g}" y="{up.last + 8:g}" text-anchor="end">logarithmic</text>')
    for mark in marks:
        x = across.place(mark.step)
        parts.append(
            f'<line class="{escape(mark.style)}" x1="{x:.1f}" x2="{x:.1f}" y1="{up.first:g}" y2="{up.first - 7:g}">'
            f"<title>{escape(mark.title)}</title></line>"
        )
    for line in lines:
        parts += _line(line, across, up)
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{up.last:g}" y2="{up.first:g}" visibility="hidden"/></svg>')
    return "".join(parts)


def value_axis(values: Sequence[float], *, bottom: float, top: float, from_zero: bool = False) -> Axis:
    """The axis that holds all `values`, with round ends; logarithmic when they are positive and span decades."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > _LOG_FROM and not from_zero:
        marks = [t for t in _log_ticks(low, high) if low <= t <= high]
        return Axis(low=low / 1.08, high=high * 1.08, ticks=tuple(marks), first=bottom, last=top, logarithmic=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        pad = abs(high) / 2 or 0.5
        low, high = (low if from_zero and low == 0 else low - pad), high + pad
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low=low, high=high, ticks=tuple(ticks(low, high, step=step)), first=bottom, last=top)


def ticks(low: float, high: float, *, count: int = 5, step: float = 0.0) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) from `low` to `high`; at least two."""
    if not step:
        rough = (high - low) / count
        power: float = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last <= first:
        return [first * step, (first + 1) * step]
    return [index * step for index in range(first, last + 1)]


def smooth(values: Sequence[float], *, span: float) -> list[float]:
    """An exponential average over about `span` values, divided by its weight so that the start is not pulled to 0."""
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def decimate(values: Sequence[float], *, most: int = MOST_POINTS) -> list[int]:
    """Indices of at most `most` values to draw: the lowest and highest of each bucket, and both ends."""
    count = len(values)
    if count <= most:
        return list(range(count))
    buckets = max((most - 2) // 2, 1)
    kept = {0, count - 1}
    for bucket in range(buckets):
        span = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        kept.add(min(span, key=values.__getitem__))
        kept.add(max(span, key=values.__getitem__))
    return sorted(kept)


def tick_text(value: float) -> str:
    """`0.05`, `20,000`, `2e-5`: as short as it can be said."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 12):.6g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def _step_axis(steps: tuple[float, float], width: int) -> Axis:
    low, high = steps
    high = max(high, low + 1)
    marks = [tick for tick in ticks(low, high, count=8 if width > 500 else 4) if tick == round(tick) and tick <= high]
    return Axis(low=low, high=high, ticks=tuple(marks), first=46, last=width - 10)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sizes = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [size * 10.0**power for power in powers[:: max(1, len(powers) // 6)] for size in sizes]


def _grid(across: Axis, up: Axis, height: int) -> list[str]:
    parts = []
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{across.first:g}" x2="{across.last:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{across.first - 7:g}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    y = up.first
    parts.append(f'<line class="axis" x1="{across.first:g}" x2="{across.last:g}" y1="{y:g}" y2="{y:g}"/>')
    for tick in across.ticks:
        x = across.place(tick)
        # A label at the very end would be cut by the frame: it ends there instead of being centred.
        anchor = "end" if x > across.last - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{tick_text(tick)}</text>')
    return parts


def _line(line: Line, across: Axis, up: Axis) -> list[str]:
    kept = [line.points[index] for index in decimate([value for _, value in line.points])]
    places = [(across.place(step), up.place(value)) for step, value in kept]
    style = escape(line.style)
    parts = []
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
    if line.dots or len(places) == 1:
        parts += [f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    for (step, _), (x, y) in zip(kept, places, strict=True):
        if step == line.ring:
            parts.append(f'<circle class="ring {style}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    return parts
