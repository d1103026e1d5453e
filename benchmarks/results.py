"""Lines of results.jsonl: whether one counts, and what many say together. Plain Python, nothing is measured here."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import Tier

LOSS_TOLERANCE = 5e-3
NORM_TOLERANCE = 0.02
RATES = ("gemm_gflops", "block_gflops")

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Summary:
    """What the lines of one system say. Only lines that are valid and not contended are in the spreads, unless there
    are none: then all valid ones are, and `contended_only` says so."""

    system: str
    used: int
    invalid: int
    contended: int
    contended_only: bool
    rate: Spread | None
    memory: Spread | None
    padding: float | None
    gemm: Spread | None
    percent: Spread | None


def checks(line: Line, reference: Line) -> dict[str, bool]:
    """The gates: the same first loss and gradient as the float32 reference, and every trained tensor moved."""
    norm = reference["grad_norm"]
    return {
        "first_loss": abs(line["loss"]["first"] - reference["loss"]) <= LOSS_TOLERANCE,
        "first_grad_norm": norm > 0 and abs(line["grad_norm_first"] - norm) <= NORM_TOLERANCE * norm,
        "all_parameters_changed": 0 < line["parameters"]["tensors"] == line["parameters"]["changed"],
    }


def matrix_rate(probes: Mapping[str, Mapping[str, float]]) -> float:
    """GFLOP/s: the highest that a process has seen, at either shape, before or after. It makes the limit highest."""
    return max(side[name] for side in probes.values() for name in RATES)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. One that is not whole, as a process leaves it that is killed while it writes, is told on
    standard error and left out: the others took hours, and say what they said before."""
    found: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as failure:
                line = failure
            if isinstance(line, dict):
                found.append(line)
            else:
                print(f"{path}:{number} is left out: it is no whole JSON object ({str(line)[:200]})", file=sys.stderr)
    return found


def append_line(path: Path, line: Line) -> None:
    """Add a line to a file; what stands at its end without being ended is left as a line of its own."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begun = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * begun + json.dumps(line).encode() + b"\n")


def section(line: Line) -> str:
    """The name under which lines compare: the same work in the same precision on the same kind of device."""
    parts = [line["workload"], line["precision"]]
    return "-".join(parts if line["device"] == "cpu" else [*parts, line["device"]])


def sections(lines: Sequence[Line]) -> list[str]:
    """The sections there are lines of, in the order in which they first appear."""
    return list(dict.fromkeys(section(line) for line in lines))


def latest_run(lines: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The lines of the run of a section that was written last; runs are never mixed."""
    own = [line for line in lines if section(line) == name]
    return [line for line in own if line["run"] == own[-1]["run"]]


def begun(lines: Sequence[dict[str, Any]], same: Line, tier: Tier) -> list[dict[str, Any]]:
    """The lines of the last run that may be continued: of the same work, code, data and settings.

    What has uncommitted changes, or no history, cannot be known to be the same, so such a run is never continued.
    """
    if same["commit"] == "unknown" or str(same["commit"]).endswith("+"):
        return []
    equal = [
        line
        for line in lines
        if all(line.get(key) == value for key, value in same.items())
        and (line["steps"]["all"], line["steps"]["warm"]) == (tier.steps, tier.warm)
    ]
    return [line for line in equal if line["run"] == equal[-1]["run"]]


def summarise(lines: Sequence[Line]) -> list[Summary]:
    """One summary a system, in the order in which the systems first appear."""
    return [_summary(system, [line for line in lines if line["system"] == system]) for system in systems_of(lines)]


def table(lines: Sequence[Line], *, baseline: str) -> list[list[str]]:
    """Header and rows, as text."""
    summaries = summarise(lines)
    base = next((item for item in summaries if item.system == baseline), None)
    header = ["system", "real tokens/s", "peak GB", f"x {baseline}", "% of limit", "padding", "GFLOP/s probed", "runs"]
    return [header, *(_row(item, base) for item in summaries)]


def systems_of(lines: Sequence[Line]) -> list[str]:
    """The systems there are lines of, in the order in which they first appear."""
    return list(dict.fromkeys(line["system"] for line in lines))


def _summary(system: str, lines: Sequence[Line]) -> Summary:
    valid = [line for line in lines if line["valid"]]
    # Unknown (no /proc) is not quiet.
    quiet = [line for line in valid if line["contended"] is False]
    used = quiet or valid
    return Summary(
        system=system,
        used=len(used),
        invalid=len(lines) - len(valid),
        contended=len(valid) - len(quiet),
        contended_only=bool(valid) and not quiet,
        rate=_spread(used, lambda line: line["tokens_per_second"]),
        memory=_spread(used, lambda line: line["peak_memory_bytes"]),
        padding=used[0]["tokens"]["padding_share"] if used else None,
        gemm=_spread(used, lambda line: matrix_rate(line["probes"])),
        percent=_spread(used, lambda line: line["percent_of_limit"]),
    )


def _spread(lines: Sequence[Line], value: Callable[[Line], float | None]) -> Spread | None:
    values = [value(line) for line in lines]
    known = [item for item in values if item is not None]
    return Spread.of(known) if known else None


def _row(item: Summary, base: Summary | None) -> list[str]:
    processes = item.used + item.invalid + (0 if item.contended_only else item.contended)
    return [
        item.system + (" (contended)" if item.contended_only else ""),
        span(item.rate, 1, 0),
        span(item.memory, 1e9, 2),
        ratio(item.rate, base.rate if base else None),
        "-" if item.percent is None else f"{item.percent.median:.0f}",
        "-" if item.padding is None else f"{item.padding:.0%}",
        span(item.gemm, 1, 0),
        str(item.used) if item.used == processes else f"{item.used} of {processes}",
    ]


def span(spread: Spread | None, unit: float, digits: int) -> str:
    """The median, with the range behind it when there is one."""
    if spread is None:
        return "-"
    low, middle, high = (f"{value / unit:,.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return middle if low == high else f"{middle} ({low}-{high})"


def ratio(spread: Spread | None, base: Spread | None) -> str:
    return "-" if spread is None or base is None else f"{spread.median / base.median:.2f}"
