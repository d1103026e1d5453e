"""DPO and GRPO in luthier and TRL: seconds a step, rows a second and peak memory, interleaved in one run.

    python benchmarks/setup_peers.py --home bench-home
    python benchmarks/preference.py --home bench-home --repetitions 5
    python benchmarks/preference.py --home bench-home --workloads grpo --systems luthier,trl-tuned

Each repetition of each system is a process of its own (A B C A B C). One JSON line a process goes to
HOME/preference.jsonl. A figure is void where a step had no gradient, and one of DPO where the loss has not changed, or
the first one is not log 2, as it is for any model while policy and reference are equal. The loss of GRPO tells nothing:
while the policy is the one that has sampled, it is the sum of a group's advantages, which is zero. The systems are a
table in `preference_work.py`. Run it with luthier's interpreter.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procfs
import results
from counts import above_zero, count
from preference_work import SYSTEMS, WORKLOADS
from sft import commit
from surroundings import interpreter, variables

HERE = Path(__file__).resolve().parent
Line = Mapping[str, Any]
NEAR = 5e-3
"""How far a first loss may be from log 2: bfloat16 rounds log-probabilities."""


def run(args: argparse.Namespace, workload: str, name: str) -> dict[str, Any]:
    """One process to its end: its line, or why there is none under "failure"."""
    system, about = SYSTEMS[name], {"workload": workload, "system": name}
    words = [str(interpreter(system.environment, args.home)), str(HERE / system.script(workload))]
    words += ["--home", str(args.home), "--workload", workload, "--system", name, "--model", args.model]
    for knob in ("rows", "steps", "warm"):
        words += [f"--{knob}", str(getattr(args, knob))]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=args.limit, check=False,
            env=variables(args.home, threads=args.threads),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as failure:
        return {**about, "failure": f"{failure}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {**about, "failure": f"it ended with {done.returncode} and said: {done.stderr[-2000:]}"}
    line: dict[str, Any] = json.loads(lines[-1])
    why = void(line)
    return {**line, "failure": why} if why else line


def void(line: Line) -> str:
    """Why the work of a line was not done; empty when it was."""
    first, last = line["loss"]["first"], line["loss"]["last"]
    if not (math.isfinite(first) and math.isfinite(last)):
        return f"void: losses {first} and {last}, where they have to be finite"
    if not all(0 < norm < math.inf for norm in line["grad_norms"]):
        return f"void: gradient norms {line['grad_norms']}, where each step has to have a finite one above zero"
    if line["workload"] == "dpo" and first == last:
        return f"void: a loss of {first} at the end as at the beginning"
    if line["workload"] == "dpo" and abs(first - math.log(2)) > NEAR:
        return f"void: a first loss of {first}, where it has to be log 2"
    return ""


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """All processes; their lines, and whether each gave a valid one."""
    from prepare import prepare

    began, lines = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), []
    digest = prepare(args.home, args.model)
    for workload in args.workloads:
        for repetition in range(args.repetitions):
            for name in args.systems:
                about = {"run": began, "commit": commit(), "data_digest": digest, "repetition": repetition}
                line = {**run(args, workload, name), **about}
                results.append_line(args.home / "preference.jsonl", line)
                head = f"{workload} {repetition} {name}: {line.get('failure') or told(line)}"
                print(head + ("  [contended]" if line.get("contended") else ""), file=sys.stderr, flush=True)
                lines.append(line)
    return lines, not any("failure" in line for line in lines)


def told(line: Line) -> str:
    """A line of progress."""
    sampling = f", {line['sampling_s']} s of it sampling" if line["sampling_s"] else ""
    return f"{line['step_s']} s a step{sampling}, {line['peak_memory_bytes'] / 1e9:.2f} GB"


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Medians of each system; contended lines stand for themselves only where there are no others."""
    found = [["workload", "system", "runs", "s a step", "times stock", "sampling", "times stock", "rest", "times stock",
              "rows/s", "GB", "of stock"]]  # fmt: skip
    good = [line for line in lines if "failure" not in line]
    for workload in dict.fromkeys(line["workload"] for line in good):
        medians: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(line["system"] for line in good if line["workload"] == workload):
            own = [line for line in good if (line["workload"], line["system"]) == (workload, name)]
            some = [line for line in own if not line["contended"]] or own
            keys = ("step_s", "sampling_s", "rows_per_second", "peak_memory_bytes")
            medians[name] = {key: statistics.median(line[key] for line in some) for key in keys} | {"runs": len(some)}
            medians[name]["rest_s"] = medians[name]["step_s"] - medians[name]["sampling_s"]
        stock = medians.get("trl", next(iter(medians.values())))
        for name, own_medians in medians.items():
            cells = [workload, name, f"{own_medians['runs']:.0f}"]
            for key in ("step_s", "sampling_s", "rest_s"):
                taken = own_medians[key]
                cells += [f"{taken:.2f}", f"{stock[key] / taken:.2f}"] if taken else ["", ""]
            share = own_medians["peak_memory_bytes"] / stock["peak_memory_bytes"]
            cells += [f"{own_medians['rows_per_second']:.2f}", f"{own_medians['peak_memory_bytes'] / 1e9:.2f}"]
            found.append([*cells, f"{share:.2f}"])
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--model", choices=["m1", "m2"], default="m1", help="shape of the model")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repetitions", type=count, default=1, help="processes of each system")
    parser.add_argument("--rows", type=count, default=4, help="pairs, or prompts, of a step")
    parser.add_argument("--steps", type=count, default=6, help="steps of a process")
    parser.add_argument("--warm", type=count, default=2, help="first steps that are not timed")
    parser.add_argument("--threads", type=count, default=procfs.available_cores(), help="OMP_NUM_THREADS")
    parser.add_argument("--limit", type=above_zero, default=1800, help="seconds after which a process is ended")
    args = parser.parse_args(arguments)
    args.home, args.systems, args.workloads = args.home.resolve(), args.systems.split(","), args.workloads.split(",")
    for word, names, known in (("system", args.systems, SYSTEMS), ("workload", args.workloads, WORKLOADS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"unknown {word} {unknown[0]!r}; there are {', '.join(known)}")
    if args.warm >= args.steps:
        parser.error(f"--warm {args.warm} leaves none of --steps {args.steps} to be timed")
    return args


def main() -> int:
    lines, good = measure(parse())
    rows = table(lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
