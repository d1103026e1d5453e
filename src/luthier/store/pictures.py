"""Pictures of plain values as inline SVG: lines over any axis, and grids of coloured cells.

Idea: like `curves.py`, whose axes these are, a picture is text without colours of its own: lines have classes, cells
have an opacity, and the page's style sheet says what that looks like. A grid with few columns shows its numbers.

Use when: a page shows what is no curve over optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from luthier.store.curves import Axis, tick_text, ticks, value_axis

COLOURS: Final = 6
"""Lines that have a colour of their own; further ones begin again."""
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 42
_CELL, _LABEL, _HEAD = 46, 74, 22
_MOST_NUMBERS: Final = 14


def curves(picture: Mapping[str, Any]) -> str:
    """Lines with a key above them; empty when no line has a point."""
    given = {str(name): points for name, points in picture["lines"].items() if points}
    lines = {name: [(float(x), float(y)) for x, y in points] for name, points in given.items()}
    if not lines:
        return ""
    across = _across([x for points in lines.values() for x, _ in points], logarithmic=bool(picture.get("logarithmic")))
    heights = [y for points in lines.values() for _, y in points]
    # Around zero alone there is nothing below: counts have no negative ones.
    up = value_axis(heights, bottom=_HEIGHT - _BOTTOM, top=_TOP, from_zero=not any(heights))
    title = str(picture["title"])
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">', *_frame(across, up)]
    parts.append(_text(across.last, _HEIGHT - 6, str(picture["across"]), "end"))
    for number, points in enumerate(lines.values()):
        parts += _line(points, across, up, number % COLOURS)
    key = "".join(f'<span class="c{number % COLOURS}">{escape(name)}</span>' for number, name in enumerate(lines))
    shown = f'<p class="key">{key}</p>' if len(lines) > 1 else ""
    hint = f'<p class="hint">{escape(str(picture["up"]))}</p>'
    return f"<figure><h3>{escape(title)}</h3>{shown}{hint}{''.join(parts)}</svg></figure>"


def grid(picture: Mapping[str, Any]) -> str:
    """Cells whose opacity is their value; of signed ones the two directions have two colours."""
    rows, columns = [str(each) for each in picture["rows"]], [str(each) for each in picture["columns"]]
    values = picture["values"]
    known = [abs(float(each)) for line in values for each in line if each is not None]
    if not known:
        return ""
    most, title = max(known) or 1.0, str(picture["title"])
    few = len(columns) <= _MOST_NUMBERS and max((len(name) for name in columns), default=0) <= 14
    longest = max(len(each) for each in [*columns, *(_short(value) for line in values for value in line if value)])
    wide, tall = (max(_CELL, 7 * longest + 8), 24) if few else (16, 16)
    label = min(_LABEL, 12 + 7 * max(len(name) for name in rows))
    width, height = label + wide * len(columns), _HEAD + tall * len(rows)
    parts = [f'<svg class="cells" viewBox="0 0 {width} {height}" style="max-width:{max(width, 120)}px" role="img" '
             f'aria-label="{escape(title)}">']  # fmt: skip
    every = 1 if few else max(1, math.ceil(len(columns) / 12))
    for place, name in enumerate(columns):
        if place % every == 0:
            parts.append(_text(label + wide * (place + 0.5), _HEAD - 8, name, "middle"))
    for place, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = _HEAD + tall * place
        if few or place % every == 0:
            parts.append(_text(label - 6, y + tall / 2 + 3.5, name, "end"))
        for column, value in enumerate(line):
            parts.append(_cell(label + wide * column, y, (wide, tall), value, most, picture, few=few))
    key = f'<p class="hint">darkest is {_short(most)}</p>'
    return f"<figure><h3>{escape(title)}</h3>{key}{''.join(parts)}</svg></figure>"


def _cell(
    x: float, y: float, size: tuple[int, int], value: Any, most: float, picture: Mapping[str, Any], *, few: bool
) -> str:
    """One cell, with its number where there is room for it."""
    wide, tall = size
    if value is None:
        return f'<rect class="none" x="{x:g}" y="{y:g}" width="{wide - 1}" height="{tall - 1}"/>'
    share = abs(float(value)) / most
    kind = "less" if picture.get("signed") and value < 0 else "more"
    cell = (
        f'<rect class="none" x="{x:g}" y="{y:g}" width="{wide - 1}" height="{tall - 1}"/>'
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{wide - 1}" height="{tall - 1}" fill-opacity="{share:.3f}">'
        f"<title>{_short(value)}</title></rect>"
    )
    if not few:
        return cell
    strong = ' class="strong"' if share > 0.6 else ""
    middle = f'x="{x + (wide - 1) / 2:g}" y="{y + tall / 2 + 3:g}"'
    return f'{cell}<text{strong} {middle} text-anchor="middle">{_short(value)}</text>'


def _across(values: Sequence[float], *, logarithmic: bool) -> Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    if logarithmic and low > 0:
        powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
        marks = tuple(2.0**power for power in powers[:: max(1, len(powers) // 8)])
        return Axis(low=low, high=high, ticks=marks, first=_LEFT, last=_WIDTH - _RIGHT, logarithmic=True)
    marks = tuple(tick for tick in ticks(low, high, count=6) if low - 1e-9 <= tick <= high + 1e-9)
    return Axis(low=low, high=high, ticks=marks, first=_LEFT, last=_WIDTH - _RIGHT)


def _frame(across: Axis, up: Axis) -> list[str]:
    parts = []
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{across.first:g}" x2="{across.last:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(across.first - 7, y + 3.5, tick_text(tick), "end"))
    parts.append(f'<line class="axis" x1="{across.first:g}" x2="{across.last:g}" y1="{up.first:g}" y2="{up.first:g}"/>')
    for tick in across.ticks:
        anchor = "end" if across.place(tick) > across.last - 10 else "middle"
        parts.append(_text(across.place(tick), up.first + 14, tick_text(tick), anchor))
    return parts


def _line(points: Sequence[tuple[float, float]], across: Axis, up: Axis, number: int) -> list[str]:
    places = [(across.place(x), up.place(y)) for x, y in points]
    parts = []
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line c{number}" points="{path}"/>')
    if len(places) <= 16:
        parts += [f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: Any) -> str:
    """A number of three digits."""
    return f"{float(value):.3g}"
