"""The page of a comparison: a table, a picture, and the same as Markdown.

Idea: like the report of a run it is a view of plain values, loads nothing from anywhere, and fills nothing in: a method
that failed is a row that says why. The picture has a point for each method: how good it is over how much it trains.
Where answers were generated, the first of them stand below, as they were written beside the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from luthier.core.units import bytes_text, count_text, duration_text
from luthier.store.files import write_text

PAGE: Final = "comparison.html"
MARKDOWN: Final = "comparison.md"
ANSWERS: Final = ".answers.jsonl"
"""What a method's name ends with in the file of its answers."""
SHOWN: Final = 3
"""Questions whose answers the page shows."""
_BEST: Final = ' class="best"'
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 360, 64, 48, 24, 130

_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2430;background:#fff}
h1{font-size:1.5rem}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .5rem;text-align:right;border-bottom:1px solid #e3e7ee;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.wide{text-align:left;white-space:normal;color:#a12}
.best{font-weight:600}svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#4a5568}
.dot{fill:#2563a8}.axis{stroke:#aab3c2}.grid{stroke:#eef1f5}p{color:#4a5568}code{font-size:.9em}h2{font-size:1.1rem}
.said,td.said{text-align:left;white-space:pre-wrap}
@media(prefers-color-scheme:dark){body{background:#14181f;color:#dfe5ee}th,td{border-color:#2b3340}
svg text,p{fill:#a9b4c4;color:#a9b4c4}.dot{fill:#7db4ee}.grid{stroke:#222a35}td.wide{color:#f0a0a0}}
"""


def write_comparison(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write the page and the Markdown into `folder`; the path of the page."""
    write_text(folder / MARKDOWN, markdown(found))
    target = folder / PAGE
    answers = {one["method"]: _first_answers(folder / f"{one['method']}{ANSWERS}") for one in found["methods"]}
    write_text(target, page(found, answers))
    return target


def heads(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the table's columns; the second is the metric, where there is one."""
    metric = _metric(found)
    return ("method", metric or "quality", "held-out loss", "trained parameters", "file", "peak memory", "training",
            "forgetting", "pays after", "rate")  # fmt: skip


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of texts for each method, best first; those that failed come last, with their error."""
    worked = sorted((one for one in found["methods"] if "error" not in one), key=lambda one: -one["quality"])
    failed = [one for one in found["methods"] if "error" in one]
    # A metric that counts to 100 needs fewer digits than a probability.
    digits = 2 if any(one["quality"] > 1.0 for one in worked) else 4
    return [_row(one, worked, digits) for one in worked] + [[one["method"], str(one["error"])] for one in failed]


def markdown(found: Mapping[str, Any]) -> str:
    """The table as Markdown, under a line that says what was compared."""
    names = heads(found)
    lines = [f"# {found['model']} on {found['data']}", "", _said(found), "", "| " + " | ".join(names) + " |"]
    lines.append("| --- |" + " ---: |" * (len(names) - 1))
    for row in table(found):
        cells = row if len(row) == len(names) else [row[0], *([""] * (len(names) - 2)), f"failed: {row[1]}"]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def page(found: Mapping[str, Any], answers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> str:
    """The page as text; `answers` are those of each method to the same questions."""
    names = heads(found)
    top = "".join(f"<th>{escape(head)}</th>" for head in names)
    body = []
    for index, row in enumerate(table(found)):
        if len(row) < len(names):
            cells = f'<td>{escape(row[0])}</td><td class="wide" colspan="{len(names) - 1}">{escape(row[1])}</td>'
        else:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body.append(f"<tr{_BEST if index == 0 else ''}>{cells}</tr>")
    title = f"{escape(str(found['model']))} on {escape(Path(str(found['data'])).name)}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{title}</h1>'
        f"<p>{escape(_said(found))}</p><table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"{scatter(found['methods'], _metric(found) or 'quality')}{_told(found, answers or {})}</html>\n"
    )


def scatter(methods: Sequence[Mapping[str, Any]], name: str = "quality") -> str:
    """Quality, called `name`, over trained parameters on a logarithmic axis; what trains none is at its left end."""
    points = [(one["method"], one["trained_parameters"], one["quality"]) for one in methods if "error" not in one]
    if not points:
        return ""
    counts = [max(1, count) for _, count, _ in points if count] or [1]
    low = max(-1, math.floor(math.log10(min(counts))) - 1)
    high = math.ceil(math.log10(max(counts)) + 0.2)
    floor, roof = _range([quality for _, _, quality in points])

    def across(count: int) -> float:
        share = (math.log10(count) - low) / (high - low) if count else 0.0
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(quality: float) -> float:
        # A little above the axis, so that the names of the last ones have room.
        return _HEIGHT - _BOTTOM - 14 - (quality - floor) / (roof - floor) * (_HEIGHT - _BOTTOM - 14 - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(name)} over trained parameters</title>']
    for step in range(5):
        level = floor + (roof - floor) * step / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(level):.1f}" y2="{up(level):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{up(level) + 4:.1f}" text-anchor="end">{level:.3g}</text>'
        )
    for power in range(low, high + 1):
        shown = "0" if power == low else count_text(10**power)
        tick = _LEFT if power == low else across(10**power)
        parts.append(f'<text x="{tick:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{shown}</text>')
    edge = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{edge}" y2="{edge}"/>')
    parts.append(f'<text x="{_LEFT}" y="14">{escape(name)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">trained parameters</text>')
    taken: list[tuple[float, float]] = []
    for method, count, quality in sorted(points, key=lambda point: point[2]):
        x, y = across(count), up(quality)
        label = y
        # A label moves up until it lies on no other one.
        while any(abs(label - other) < 13 and abs(x - place) < 110 for place, other in taken):
            label -= 13
        taken.append((x, label))
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text x="{x + 9:.1f}" y="{label + 4:.1f}">{escape(method)}</text>'
        )
    return "".join(parts) + "</svg>"


def _row(one: Mapping[str, Any], worked: Sequence[Mapping[str, Any]], digits: int) -> list[str]:
    forgetting = one.get("forgetting")
    return [
        one["method"],
        f"{one['quality']:.{digits}f}",
        f"{one['loss']:.4f}",
        count_text(one["trained_parameters"]),
        bytes_text(one["file_bytes"]),
        bytes_text(one["peak_memory_bytes"]),
        duration_text(one["seconds"]),
        "not measured" if forgetting is None else f"{forgetting:+.4f}",
        _pays(one, worked),
        _rate(one),
    ]


def _pays(one: Mapping[str, Any], worked: Sequence[Mapping[str, Any]]) -> str:
    """Queries after which training, with its search for a rate, has cost less than examples before each question."""
    shown = next((other for other in worked if other["training_flops"] == 0.0), None)
    if shown is None or one is shown:
        return "-"
    saved = shown["query_flops"] - one["query_flops"]
    spent = one["training_flops"] + one.get("search", {}).get("flops", 0.0)
    return f"{count_text(math.ceil(spent / saved))} queries" if saved > 0 else "never"


def _rate(one: Mapping[str, Any]) -> str:
    """The learning rate, and what it took to find it."""
    search, rate = one.get("search"), one.get("learning_rate")
    if rate is None:
        return "-"
    if search is None:
        return f"{rate:.3g}"
    edge = ", at the grid's end" if search["at_edge"] else ""
    return f"{rate:.3g} of {len(search['rates'])} in {duration_text(search['seconds'])}{edge}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(0.02, 0.12 * (high - low))
    return max(0.0, low - room), high + room


def _metric(found: Mapping[str, Any]) -> str:
    """The name of the metric; empty for the likelihood."""
    metric = found.get("measures", {}).get("metric")
    if isinstance(metric, Mapping):
        return str(metric["method"])
    return next((str(one["judged_by"]) for one in found["methods"] if "judged_by" in one), "")


def _said(found: Mapping[str, Any]) -> str:
    one: Mapping[str, Any] = next((one for one in found["methods"] if "error" not in one), {})
    rows = f"{one.get('held_out_rows', 0):,} held-out rows"
    sets = f", with {', '.join(found['set'])}" if found["set"] else ""
    quality = f"Quality is the geometric mean of the probabilities of the trained tokens in {rows}{sets}."
    metric = _metric(found)
    if "judged_by" in one:
        quality = f"Quality is {metric}: the share of right choices in {rows}{sets}."
    elif metric:
        knobs = {key: value for key, value in found["measures"]["metric"].items() if key != "method"}
        how = f" ({', '.join(f'{key} {value}' for key, value in knobs.items())})" if knobs else ""
        quality = (
            f"Quality is {metric}{how} of the greedy answers to {one.get('questions', 0):,} prompts against "
            f"{one.get('references', 0):,} references, of {rows}{sets}."
        )
        if trained := one.get("trained_prompts"):
            quality += f" {trained:,} of these prompts are in the training rows too, with other answers."
    searched = any("search" in one for one in found["methods"])
    rates = " Each learning rate was looked for on other rows than these." if searched else ""
    return (
        f"{quality}{rates} Forgetting is how much the loss on other text has risen. A method pays after so many "
        "queries as make its training cheaper than examples before each question."
    )


def _first_answers(path: Path) -> list[dict[str, Any]]:
    """The first lines of a file of answers; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(SHOWN), strict=False)]


def _told(found: Mapping[str, Any], answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The answers of all methods to the first questions, best method first."""
    order = [row[0] for row in table(found) if answers.get(row[0])]
    parts = []
    for index in range(max((len(answers[name]) for name in order), default=0)):
        asked = answers[order[0]][index]
        rows = [("reference", str(asked["references"][0]))]
        rows += [(name, str(answers[name][index]["answer"])) for name in order]
        cells = "".join(f'<tr><td>{escape(name)}</td><td class="said">{escape(text)}</td></tr>' for name, text in rows)
        prompt = escape(str(asked["prompt"]))
        parts.append(f'<h2>Question {index + 1}</h2><p class="said">{prompt}</p><table>{cells}</table>')
    return "".join(parts)
