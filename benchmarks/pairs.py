"""DPO on pairs with a prompt of 256 tokens, in luthier and TRL: pairs a second and peak memory, interleaved in one run.

    python benchmarks/setup_peers.py --home bench-home
    python benchmarks/pairs.py --home bench-home --repetitions 5
    python benchmarks/pairs.py --home bench-home --systems luthier,trl-tuned

Each repetition of each system is a process of its own (A B C A B C). One JSON line a process goes to HOME/pairs.jsonl.
A figure is void where the first loss is not log 2, as it is while policy and reference are equal, or where
the loss has not changed. The systems are a table in `pairs_work.py`. Run it with luthier's interpreter.
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
from generate import environment
from pairs_work import OURS, SYSTEMS
from sft import commit

HERE = Path(__file__).resolve().parent
Line = Mapping[str, Any]
NEAR = 5e-3
"""How far a first loss may be from log 2: bfloat16 rounds log-probabilities."""


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One process to its end: its line, or why there is none under "failure"."""
    system = SYSTEMS[name]
    own = args.home / f"venv-{system.environment}" / "bin" / "python"
    python = Path(sys.executable) if system.environment is None else own
    words = [str(python), str(HERE / system.script), "--home", str(args.home), "--system", name, "--model", args.model]
    words += ["--pairs", str(args.pairs), "--steps", str(args.steps), "--warm", str(args.warm)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=args.limit, check=False,
            env=environment(args.home, args.threads),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as failure:
        return {"system": name, "failure": f"{failure}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"system": name, "failure": f"it ended with {done.returncode} and said: {done.stderr[-2000:]}"}
    line: dict[str, Any] = json.loads(lines[-1])
    loss = line["loss"]
    if abs(loss["first"] - math.log(2)) > NEAR or loss["first"] == loss["last"]:
        return {**line, "failure": f"void: losses {loss['first']} and {loss['last']}, where the first has to be log 2"}
    return line


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """All processes; their lines, and whether each gave a valid one."""
    from prepare import prepare

    began, lines = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), []
    digest = prepare(args.home, args.model)
    for repetition in range(args.repetitions):
        for name in args.systems:
            about = {"run": began, "commit": commit(), "data_digest": digest, "repetition": repetition}
            line = {**run(args, name), **about}
            with (args.home / "pairs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            head = f"{repetition} {name}: "
            what = line.get("failure") or told(line)
            print(head + what + ("  [contended]" if line.get("contended") else ""), file=sys.stderr, flush=True)
            lines.append(line)
    return lines, not any("failure" in line for line in lines)


def told(line: Line) -> str:
    return f"{line['pairs_per_second']} pairs/s, {line['peak_memory_bytes'] / 1e9:.2f} GB"


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Medians of each system; contended lines stand for themselves only where there are no others."""
    rows = [["system", "runs", "pairs/s", "x stock", "tokens/s", "GB", "x stock"]]
    good = [line for line in lines if "failure" not in line]
    medians: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(line["system"] for line in good):
        own = [line for line in good if line["system"] == name]
        quiet = [line for line in own if not line["contended"]]
        some = quiet or own
        keys = ("pairs_per_second", "tokens_per_second", "peak_memory_bytes")
        medians[name] = {key: statistics.median(line[key] for line in some) for key in keys}
        medians[name]["runs"] = len(some)
    stock = medians.get("trl", medians.get(OURS, {}))
    for name, own in medians.items():
        rows.append([
            name, f"{own['runs']:.0f}", f"{own['pairs_per_second']:.2f}",
            f"{own['pairs_per_second'] / stock['pairs_per_second']:.2f}", f"{own['tokens_per_second']:.0f}",
            f"{own['peak_memory_bytes'] / 1e9:.2f}", f"{own['peak_memory_bytes'] / stock['peak_memory_bytes']:.2f}",
        ])  # fmt: skip
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--model", choices=["m1", "m2"], default="m1", help="shape of the model")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repetitions", type=int, default=1, help="processes of each system")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8, help="steps of a process")
    parser.add_argument("--warm", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--threads", type=int, default=procfs.available_cores(), help="OMP_NUM_THREADS")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a process is ended")
    args = parser.parse_args(arguments)
    args.home, args.systems = args.home.resolve(), args.systems.split(",")
    if unknown := [name for name in args.systems if name not in SYSTEMS]:
        parser.error(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
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
