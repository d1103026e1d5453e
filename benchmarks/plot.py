"""Speed over peak memory as a picture: one dot a system, up is faster and left is smaller. SVG, text and no library.

It is read in pages whose background may be light or dark, so it brings its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from results import Spread

from luthier.store.curves import Axis, tick_text, value_axis

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 34, 46
DOT = 6
LINE = 14
LABEL = 6.6
"""Pixels of half a dot, from one line of text to the next, and of a letter on average."""
COLOURS: Final = {"ours": "#b3472f", "stock": "#8a8f98", "tuned": "#2f6db3"}
WORDS: Final = {"ours": "luthier", "stock": "as documented", "tuned": "tuned"}


@dataclass(frozen=True)
class Dot:
    """A system: GB at the peak, and real tokens a second with their range."""

    system: str
    kind: str
    memory: float
    rate: Spread


@dataclass(frozen=True)
class Label:
    """Where the name of the dot at `dot` is written; `anchor` is SVG's word for which end of the text lies there."""

    x: float
    y: float
    anchor: str
    text: str
    dot: tuple[float, float]


def draw(dots: Sequence[Dot], title: str) -> str:
    """The picture as the text of an SVG file."""
    across = value_axis([dot.memory for dot in dots], bottom=LEFT, top=WIDTH - RIGHT, from_zero=True)
    up = value_axis([dot.rate.high for dot in dots], bottom=HEIGHT - BOTTOM, top=TOP, from_zero=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_frame(across, up),
        *_legend([kind for kind in WORDS if any(dot.kind == kind for dot in dots)]),
    ]
    for dot in dots:
        x, colour = across.place(dot.memory), COLOURS[dot.kind]
        low, high = up.place(dot.rate.low), up.place(dot.rate.high)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{up.place(dot.rate.median):.1f}" r="{DOT - 1}" fill="{colour}"/>')
    for label in labels([(across.place(dot.memory), up.place(dot.rate.median), dot.system) for dot in dots]):
        (x, y), height = label.dot, label.y - 4
        if abs(height - y) > LINE / 2:
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{label.x:.1f}" y2="{height:.1f}" stroke="#999999"/>')
        parts.append(
            f'<text x="{label.x:.1f}" y="{label.y:.1f}" text-anchor="{label.anchor}" fill="#222222">'
            f"{escape(label.text)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def labels(places: Sequence[tuple[float, float, str]]) -> list[Label]:
    """A name for each dot (x, y, name): beside it if there is room, else as near as no other name or dot lies."""
    taken = [(x - DOT, x + DOT, y + 4) for x, y, _ in places]
    placed: list[Label] = []
    for x, y, text in sorted(places, key=lambda place: place[1]):
        found = _candidates(x, y, text)
        label = next((each for each in found if not _touches(each, taken)), found[0])
        taken.append(_extent(label))
        placed.append(label)
    return placed


def _candidates(x: float, y: float, text: str) -> list[Label]:
    """Places for a name that lie in the picture, the best first."""
    found = []
    for step in range(12):
        for below in (step, -step) if step else (0,):
            height = y + 4 + below * LINE
            both = [Label(x + DOT + 4, height, "start", text, (x, y)), Label(x - DOT - 4, height, "end", text, (x, y))]
            found += [each for each in both if _extent(each)[0] >= 2 and _extent(each)[1] <= WIDTH - 2]
    inside = [each for each in found if TOP < each.y < HEIGHT - BOTTOM]
    return inside or found


def _touches(label: Label, taken: Sequence[tuple[float, float, float]]) -> bool:
    left, right, height = _extent(label)
    return any(left < end and start < right and abs(height - other) < LINE - 1 for start, end, other in taken)


def _extent(label: Label) -> tuple[float, float, float]:
    """From where to where a name reaches, and its base line."""
    width = LABEL * len(label.text)
    start = label.x if label.anchor == "start" else label.x - width
    return start, start + width, label.y


def _frame(across: Axis, up: Axis) -> list[str]:
    """Grid, ticks and what the axes mean."""
    parts = []
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e6ea"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555555">{tick_text(tick)}</text>')
    for tick in across.ticks:
        x = across.place(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e6ea"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle" fill="#555555">{tick_text(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 8}" text-anchor="middle" fill="#222222">peak memory, GB</text>')
    parts.append(f'<text x="8" y="{TOP - 15}" fill="#222222">real tokens/s</text>')
    return parts


def _legend(kinds: Sequence[str]) -> list[str]:
    parts, x = [], WIDTH - RIGHT - 125 * len(kinds) + 60
    for kind in kinds:
        parts.append(f'<circle cx="{x}" cy="{TOP - 19}" r="{DOT - 1}" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 10}" y="{TOP - 15}" fill="#222222">{WORDS[kind]}</text>')
        x += 125
    return parts
