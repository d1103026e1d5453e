"""What the runs of `generate.py` found: as rows for a terminal, and as a part of a page.

    python benchmarks/generate_report.py --home bench-home --report docs/generation.md

Each workload is told by its latest run of at least `--repetitions` processes a system. Medians, with the range over all
processes in brackets;
a process beside which others took more than a tenth of the time is left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
import tables
from counts import count
from generate_work import OURS, SYSTEMS, WORKLOADS

Line = Mapping[str, Any]
MARK = "benchmarks/generate_report.py: table"


def counted(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of one workload that stand for their system: quiet ones, or all of them where none was quiet."""
    good = [line for line in lines if "failure" not in line]
    own = {name: [line for line in good if line["system"] == name] for name in SYSTEMS}
    quiet = {name: [line for line in some if not line["contended"]] for name, some in own.items()}
    return {name: quiet[name] or some for name, some in own.items() if some}


def first_peer(used: Mapping[str, Sequence[Line]]) -> str:
    """The system that ratios are to: the first that is not ours, or the only one."""
    return next((name for name in used if not name.startswith(OURS)), next(iter(used), ""))


def median(lines: Sequence[Line], key: str) -> float:
    """The median of a figure; 0 where no line has it."""
    return statistics.median(line.get(key) or 0 for line in lines)


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Medians of each system of each workload; ratios are to the first peer."""
    rows = [["workload", "system", "runs", "tokens/s", "ratio", "after the first", "ratio", "first tokens s", "GB",
             "% of limit"]]
    for workload in dict.fromkeys(line["workload"] for line in lines):
        used = counted([line for line in lines if line["workload"] == workload])
        peer = first_peer(used)
        for name, some in used.items():
            cells = [workload, name, f"{len(some)}{' contended' if some[0]['contended'] else ''}"]
            for key in ("tokens_per_second", "later_tokens_per_second"):
                cells += [f"{median(some, key):.1f}", f"{median(some, key) / (median(used[peer], key) or 1):.2f}"]
            cells += [f"{median(some, 'first_tokens_s'):.3f}", f"{median(some, 'peak_memory_bytes') / 1e9:.2f}"]
            limit = median(some, "percent_of_limit")
            rows.append([*cells, f"{limit:.0f}" if limit else ""])
    return rows


def latest(lines: Sequence[Line], repetitions: int) -> list[Line]:
    """Of each workload the lines of its latest run that is long enough and has a peer in it, in the order of the table
    of workloads."""
    found: list[Line] = []
    for workload in WORKLOADS:
        own = [line for line in lines if line["workload"] == workload]
        for run in sorted({line["run"] for line in own}, reverse=True):
            some = [line for line in own if line["run"] == run]
            peers = any(not line["system"].startswith(OURS) for line in some)
            if peers and 1 + max(line["repetition"] for line in some) >= repetitions:
                found += some
                break
    return found


def page(lines: Sequence[Line]) -> str:
    """The part of a page: a table, and where its lines come from."""
    if not lines:
        return "No measurement has been made yet."
    rows = [["requests", "system", "tokens/s", "x peer", "first tokens s", "GB", "% of limit", "runs"]]
    for workload in dict.fromkeys(line["workload"] for line in lines):
        used = counted([line for line in lines if line["workload"] == workload])
        peer = first_peer(used)
        for place, (name, some) in enumerate(used.items()):
            rates, limit = [line["tokens_per_second"] for line in some], median(some, "percent_of_limit")
            spread = f" ({_short(min(rates))}-{_short(max(rates))})" if len(rates) > 1 else ""
            ratio = median(some, "tokens_per_second") / median(used[peer], "tokens_per_second")
            rows.append([
                f"{WORKLOADS[workload].title} (`{workload}`)" if not place else "", name,
                _short(statistics.median(rates)) + spread, f"{ratio:.2f}", f"{median(some, 'first_tokens_s'):.3f}",
                f"{median(some, 'peak_memory_bytes') / 1e9:.2f}", f"{limit:.0f}" if limit else "",
                f"{len(some)}{' contended' if some[0]['contended'] else ''}",
            ])  # fmt: skip
    return tables.markdown(rows) + "\n\n" + _origin(lines)


def _origin(lines: Sequence[Line]) -> str:
    """Machine, commits, days and versions of what the table shows."""
    good = [line for line in lines if "failure" not in line]
    box = good[0]["machine"]
    versions: dict[str, set[str]] = {}
    for line in good:
        known = ", ".join(f"{key} {value}" for key, value in line["versions"].items() if key != "python")
        versions.setdefault(known, set()).add(line["system"])
    told = "; ".join(f"{', '.join(sorted(systems))}: {known}" for known, systems in versions.items())
    days = sorted({line["run"][:10] for line in good})
    return (
        f"{box['cpu']}, {box['cores']} cores, {good[0]['precision']}; {' and '.join(days)}, commit "
        f"{', '.join(sorted({line['commit'] for line in good}))}. {told}."
    )


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder of generate.jsonl")
    parser.add_argument("--repetitions", type=count, default=1, help="processes of each system that a run must have")
    parser.add_argument("--report", type=Path, help="Markdown document to write into; without it the text is printed")
    args = parser.parse_args()
    path = args.home / "generate.jsonl"
    if not path.exists():
        parser.error(f"{path} does not exist; run generate.py first")
    text = page(latest(results.read_lines(path), args.repetitions))
    if args.report is None:
        print(text)
        return 0
    args.report.write_text(tables.place(args.report.read_text("utf-8"), text, MARK), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
