"""Lines of results.jsonl: whether one counts, and what many say together. Plain Python, nothing is measured here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOSS_TOLERANCE = 5e-3
NORM_TOLERANCE = 0.02

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


def read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def latest_run(lines: Sequence[dict[str, Any]], workload: str = "") -> list[dict[str, Any]]:
    """The lines of the run that was written last, of a workload if one is named; runs are never mixed."""
    own = [line for line in lines if workload in ("", line["workload"])]
    return [line for line in own if line["run"] == own[-1]["run"]]


def workloads(lines: Sequence[Line]) -> list[str]:
    """The workloads there are lines of, by name."""
    return sorted({line["workload"] for line in lines})


def summarise(lines: Sequence[Line]) -> list[Summary]:
    """One summary a system, in the order in which the systems first appear."""
    return [_summary(system, [line for line in lines if line["system"] == system]) for system in _systems(lines)]


def markdown(lines: Sequence[Line], *, baseline: str) -> str:
    """A table of medians and ranges with what is needed to repeat it."""
    if not lines:
        return "No measurement has been made yet."
    rows = table(lines, baseline=baseline)
    parts = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    parts += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    return "\n".join([*parts, "", *notes(lines)])


def table(lines: Sequence[Line], *, baseline: str) -> list[list[str]]:
    """Header and rows, as text."""
    summaries = summarise(lines)
    base = next((item for item in summaries if item.system == baseline), None)
    header = ["system", "real tokens/s (range)", "peak memory GB (range)", f"x {baseline}", "memory", "% of limit",
              "padding", "runs"]
    return [header, *(_row(item, base) for item in summaries)]


def notes(lines: Sequence[Line]) -> list[str]:
    """What the table does not say: machine, shapes, settings, versions, speed of the machine meanwhile, exclusions."""
    first = lines[0]
    box, steps = first["machine"], first["steps"]
    timed = steps["all"] - steps["warm"]
    memory = f", {box['memory_bytes'] / 2**30:.0f} GiB" if box["memory_bytes"] else ""
    text = [
        f"- Run {first['run']}, commit {first['commit']}, data {first['data_digest'][:12]}, seed {first['seed']}.",
        f"- {box['cpu']}, {box['cores']} cores{memory}, Python {box['python']}.",
        f"- {first['workload']}: {timed} timed steps of {steps['rows']} rows after {steps['warm']}; the same "
        f"{_same(lines, 'real')} real and {_same(lines, 'supervised')} supervised tokens for every system.",
    ]
    for system in _systems(lines):
        line = next(line for line in lines if line["system"] == system)
        settings = ", ".join(f"{key} {value}" for key, value in line["settings"].items())
        versions = ", ".join(f"{key} {value}" for key, value in line["versions"].items() if key != "python")
        text.append(f"- {system}: {settings}; {versions}.")
    for item in summarise(lines):
        speed = f"products at {_span(item.gemm, 1, 0)} GFLOP/s around the runs" if item.gemm else "nothing usable"
        left_out = f"{item.invalid} invalid, {item.contended} contended"
        used = "CONTENDED RUNS ONLY, not evidence" if item.contended_only else f"{item.used} runs used"
        text.append(f"- {item.system}: {used}; {left_out}; {speed}.")
    return text


def _systems(lines: Sequence[Line]) -> list[str]:
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
        gemm=_spread(used, lambda line: min(side["gemm_gflops"] for side in line["probes"].values())),
        percent=_spread(used, lambda line: line["percent_of_limit"]),
    )


def _spread(lines: Sequence[Line], value: Callable[[Line], float | None]) -> Spread | None:
    values = [value(line) for line in lines]
    known = [item for item in values if item is not None]
    return Spread.of(known) if known else None


def _row(item: Summary, base: Summary | None) -> list[str]:
    mark = " (contended)" if item.contended_only else ""
    return [
        item.system + mark,
        _span(item.rate, 1, 0),
        _span(item.memory, 1e9, 2),
        _ratio(item.rate, base.rate if base else None),
        _ratio(item.memory, base.memory if base else None),
        "-" if item.percent is None else f"{item.percent.median:.0f}",
        "-" if item.padding is None else f"{item.padding:.0%}",
        str(item.used),
    ]


def _span(spread: Spread | None, unit: float, digits: int) -> str:
    if spread is None:
        return "-"
    low, middle, high = (f"{value / unit:,.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return f"{middle} ({low}-{high})"


def _ratio(spread: Spread | None, base: Spread | None) -> str:
    return "-" if spread is None or base is None else f"{spread.median / base.median:.2f}"


def _same(lines: Sequence[Line], name: str) -> str:
    return " / ".join(sorted({f"{line['tokens'][name]:,}" for line in lines}))
