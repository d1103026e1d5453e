"""Write what the latest runs of `sft.py` found as Markdown: to standard output, or into a document with its pictures.

    python benchmarks/report.py --home bench-home
    python benchmarks/report.py --home bench-home --report docs/performance.md

A summary and, for each workload, a table and a picture of speed over memory. In a document only the text between two
marker lines is replaced, all around it stays; a document without them gets them at its end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plot
import results
import tables
from results import Line, Summary
from systems import BASELINE, kind
from workloads import OURS, WORKLOADS

SUMMARY = "summary"


@dataclass(frozen=True)
class Standing:
    """Our line of the summary: what we are measured against in one section."""

    section: str
    ours: Summary
    stock: Summary | None
    rival: Summary | None
    """The fastest peer, whatever its settings."""


def standing(name: str, lines: Sequence[Line]) -> Standing | None:
    """Where we stand in a section; None when no run of ours counts."""
    measured = {item.system: item for item in results.summarise(lines) if item.rate is not None}
    peers = [item for item in measured.values() if kind(item.system) != "ours"]
    if OURS not in measured:
        return None
    rival = max(peers, key=lambda item: item.rate.median if item.rate else 0.0, default=None)
    return Standing(name, measured[OURS], measured.get(BASELINE), rival)


def summary(standings: Sequence[Standing]) -> str:
    """The table at the top: a line a section."""
    if not standings:
        return "No measurement has been made yet."
    header = ["workload", "real tokens/s", f"x {BASELINE}", "x fastest peer", "which", "memory", "% of limit"]
    rows = [_standing_row(item) for item in standings]
    text = tables.markdown([header, *rows])
    contended = any(row[0].endswith("(c)") for row in rows)
    return f"{text}\n\n(c): only contended runs exist, so this is no evidence." if contended else text


def _standing_row(item: Standing) -> list[str]:
    stock, rival = item.stock, item.rival
    shown = [each for each in (item.ours, stock, rival) if each is not None]
    return [
        f"`{item.section}`" + (" (c)" if any(each.contended_only for each in shown) else ""),
        results.span(item.ours.rate, 1, 0),
        results.ratio(item.ours.rate, stock.rate if stock else None),
        results.ratio(item.ours.rate, rival.rate if rival else None),
        rival.system if rival else "-",
        results.ratio(item.ours.memory, rival.memory if rival else None),
        "-" if item.ours.percent is None else f"{item.ours.percent.median:.0f}",
    ]


def section(lines: Sequence[Line], *, picture: str | None) -> str:
    """A workload's part: what it is, the picture, the table, and, folded, what is needed to repeat it."""
    first = lines[0]
    systems = results.systems_of(lines)
    # Where the baseline did not run, the last system did: a peer, as systems are named ours first.
    baseline = BASELINE if BASELINE in systems else systems[-1]
    text = [_work(lines), *([f"![Speed over peak memory of each system]({picture})"] if picture else [])]
    text.append(tables.markdown(results.table(lines, baseline=baseline)))
    if left_out := _left_out(lines):
        text.append("\n".join(left_out))
    details = "\n".join(_details(lines))
    text.append(f"<details><summary>Run {first['run']}: settings and versions</summary>\n\n{details}\n\n</details>")
    return "\n\n".join(text)


def _work(lines: Sequence[Line]) -> str:
    first = lines[0]
    steps = first["steps"]
    box = first["machine"]
    where = f"{box['gpu']}" if box.get("gpu") else f"{box['cpu']}, {box['cores']} cores"
    memory = f", {box['memory_bytes'] / 2**30:.0f} GiB" if box["memory_bytes"] and not box.get("gpu") else ""
    title = WORKLOADS[first["workload"]].title if first["workload"] in WORKLOADS else first["workload"]
    timed = steps["all"] - steps["warm"]
    count = f"{timed} timed step{'s' if timed > 1 else ''}"
    return (
        f"{title[0].upper()}{title[1:]}; {first['precision']}, on {where}{memory}. Tier {first['tier']}: "
        f"{count} of {steps['rows']} rows after {steps['warm']}, {_same(lines, 'real')} real tokens, "
        f"{_same(lines, 'supervised')} of them with a loss, the same for every system."
    )


def _left_out(lines: Sequence[Line]) -> list[str]:
    """What the table does not show."""
    text, found = [], results.summarise(lines)
    if unproved := [item.system for item in found if item.contended_only]:
        text.append(f"- Only contended runs, so no evidence: {', '.join(unproved)}.")
    for item in found:
        if item.contended and not item.contended_only:
            text.append(f"- {item.system}: {item.contended} contended left out.")
        if item.invalid:
            own = [line for line in lines if line["system"] == item.system]
            gates = sorted({name for line in own for name, passed in line["checks"].items() if not passed})
            text.append(f"- {item.system}: {item.invalid} void, failing {', '.join(gates)}.")
    return text


def _details(lines: Sequence[Line]) -> list[str]:
    """Code, data, settings of each system, and versions, once for systems that share them."""
    first = lines[0]
    text = [
        f"- Commit {first['commit']}, data {first['data_digest'][:12]}, seed {first['seed']}, "
        f"{first['threads']} threads, Python {first['machine']['python']}.",
        f"- First step: loss {first['reference']['loss']:.4f} and gradient norm "
        f"{first['reference']['grad_norm']:.4f} in float32.",
    ]
    versions: dict[str, list[str]] = {}
    for system in results.systems_of(lines):
        line = next(line for line in lines if line["system"] == system)
        text.append(f"- {system}: " + ", ".join(f"{key} {value}" for key, value in line["settings"].items()) + ".")
        known = ", ".join(f"{key} {value}" for key, value in line["versions"].items() if key != "python")
        versions.setdefault(known, []).append(system)
    return [*text, *(f"- {', '.join(systems)}: {known}." for known, systems in versions.items())]


def _same(lines: Sequence[Line], name: str) -> str:
    return " / ".join(sorted({f"{line['tokens'][name]:,}" for line in lines}))


def dots(lines: Sequence[Line]) -> list[plot.Dot]:
    """What the picture shows: the systems with a speed and a memory that count."""
    found = []
    for item in results.summarise(lines):
        if item.rate is not None and item.memory is not None:
            found.append(plot.Dot(item.system, kind(item.system), item.memory.median / 1e9, item.rate))
    return found


def mark(name: str) -> str:
    """The name of a generated part in a document."""
    return f"benchmarks/report.py: {name}"


def write(document: Path, lines: Sequence[dict[str, Any]]) -> None:
    """All generated parts of a document, and a picture a section beside it."""
    text = document.read_text("utf-8") if document.exists() else ""
    standings = []
    for name in results.sections(lines):
        latest = results.latest_run(lines, name)
        shown = dots(latest)
        picture = document.with_name(f"{document.stem}-{name}.svg") if shown else None
        if picture is not None:
            picture.write_text(plot.draw(shown, f"{name}: real tokens/s over peak memory"), "utf-8")
        text = tables.place(text, section(latest, picture=picture.name if picture else None), mark(name))
        standings.append(standing(name, latest))
    text = tables.place(text, summary([item for item in standings if item is not None]), mark(SUMMARY))
    document.write_text(text, "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder of results.jsonl")
    parser.add_argument("--tier", choices=["quick", "full"], help="only runs of this tier; the latest of any without")
    parser.add_argument("--report", type=Path, help="Markdown document to write into")
    args = parser.parse_args()
    path = args.home / "results.jsonl"
    if not path.exists():
        parser.error(f"{path} does not exist; run sft.py first")
    lines = [line for line in results.read_lines(path) if args.tier in (None, line["tier"])]
    if args.report is not None:
        write(args.report, lines)
        return 0
    runs = {name: results.latest_run(lines, name) for name in results.sections(lines)}
    standings = [standing(name, latest) for name, latest in runs.items()]
    print(summary([item for item in standings if item is not None]))
    for name, latest in runs.items():
        print(f"\n{name}\n\n{section(latest, picture=None)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
