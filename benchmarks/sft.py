"""Fine-tuning in luthier and in its peers: real tokens per second and peak memory, interleaved in one run.

    python benchmarks/setup_peers.py --home bench-home
    python benchmarks/sft.py --home bench-home                     # all workloads, a first impression
    python benchmarks/sft.py --home bench-home --tier full --resume

Each repetition of each system is a process of its own (A B C A B C), so that a machine whose speed drifts treats all
alike. One JSON line a process goes to HOME/results.jsonl; a process that fails is told in HOME/failures.jsonl, and the
others go on. `--resume` continues the last run of the same work, code and settings: it makes what is missing, failed or
was contended.
Run it with luthier's interpreter; what it needs and how far to trust it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procfs
import results
from counts import above_zero, count, count_from_zero
from surroundings import interpreter, variables
from systems import BASELINE, REFERENCE, REFERENCE_SYSTEM, SYSTEMS, System
from workloads import WORKLOADS, Tier

HERE = Path(__file__).resolve().parent
QUIET_LOAD = 0.2
MEASURED = ("src", "benchmarks")
"""Folders whose files decide what is measured; a change elsewhere leaves figures as they are."""


class WorkerError(Exception):
    """A process that gave no result line."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What holds for all processes of one call of this script."""

    home: Path
    tier: str
    precision: str
    device: str
    seed: int
    threads: int
    limit: float
    resume: bool
    commit: str


def order(systems: list[str], repetitions: int) -> list[tuple[int, str]]:
    """Repetition and system of each process: A B C A B C."""
    return [(repetition, system) for repetition in range(repetitions) for system in systems]


def command(name: str, system: System, *, workload: str, tier: Tier, session: Session) -> list[str]:
    """The command line of one process."""
    parts = [str(interpreter(system.environment, session.home)), str(HERE / system.script), "--system", name]
    parts += ["--workload", workload, "--steps", str(tier.steps), "--warm", str(tier.warm)]
    for key in ("home", "seed", "precision", "device"):
        parts += [f"--{key}", str(getattr(session, key))]
    parts += ["--settings", json.dumps(dict(system.settings))]
    return [*parts, "--grouped"] if system.grouped else parts


def start(name: str, system: System, *, workload: str, tier: Tier, session: Session) -> dict[str, Any]:
    """Run one process to its end and return its result line, with the wall time of the whole process."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command(name, system, workload=workload, tier=tier, session=session),
            capture_output=True,
            text=True,
            timeout=session.limit,
            env=variables(session.home, threads=session.threads, device=session.device) | system.variables,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"{name} took longer than {session.limit} s; see --limit") from None
    except OSError as failure:
        raise WorkerError(f"{name} cannot be started: {failure}") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise WorkerError(f"{name} ended with {done.returncode} and said:\n{done.stderr[-2000:]}")
    return {**json.loads(lines[-1]), "process_wall_s": round(time.perf_counter() - started, 1)}


def reference(workload: str, tier: Tier, session: Session, *, digest: str) -> dict[str, Any]:
    """Loss and gradient norm of the first step in float32, which follow from data, work and code.

    They are kept in HOME by these, and computed anew when there are uncommitted changes.
    """
    path = session.home / "references.json"
    key = f"{workload} {session.device} data {digest} commit {session.commit}"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if key not in known or session.commit.endswith("+"):
        known[key] = start(REFERENCE, REFERENCE_SYSTEM, workload=workload, tier=tier, session=session)
        path.write_text(json.dumps(known), "utf-8")
    return dict(known[key])


def commit() -> str:
    """The last commit that changed what is measured, with a plus sign when files differ from it."""
    last = _git("log", "-1", "--format=%h", "--abbrev=12", "--", *MEASURED)
    return last + "+" if last and _git("status", "--porcelain", "--", *MEASURED) else last or "unknown"


def measure(workload: str, tier: Tier, session: Session) -> tuple[list[dict[str, Any]], bool]:
    """All processes of a workload, one after another; each line is written when its process ends.

    Gives the lines of the run, those of a resumed one included, and whether a process failed.
    """
    # Imported late: preparing needs torch and transformers, and --help does not.
    from prepare import prepare

    digest = prepare(session.home, WORKLOADS[workload].model)
    expected = reference(workload, tier, session, digest=digest)
    same = {
        "workload": workload, "tier": session.tier, "precision": session.precision, "device": session.device,
        "seed": session.seed, "threads": session.threads, "commit": session.commit, "data_digest": digest,
    }  # fmt: skip
    lines = results.begun(_known(session.home), same, tier) if session.resume else []
    run = lines[0]["run"] if lines else datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # What others have disturbed is measured again.
    done = {(line["repetition"], line["system"]) for line in lines if line["contended"] is not True}
    failed = False
    for repetition, name in order(list(tier.systems), tier.repetitions):
        if (repetition, name) in done:
            continue
        load = round(procfs.load_average(), 2)
        about = {"run": run, "repetition": repetition, **same}
        try:
            line = start(name, SYSTEMS[name], workload=workload, tier=tier, session=session)
        except WorkerError as failure:
            print(failure, file=sys.stderr)
            results.append_line(session.home / "failures.jsonl", {**about, "system": name, "failure": str(failure)})
            failed = True
            continue
        line = judged({**line, **about, "load_before": load}, expected)
        results.append_line(session.home / "results.jsonl", line)
        lines.append(line)
        print(_progress(line), file=sys.stderr)
    return lines, failed


def judged(line: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """The line with what follows from it: the gates it passes, and its share of the limit."""
    import limits
    from worker import RANK

    passed = results.checks(line, expected)
    return {
        **line,
        "checks": passed,
        "valid": all(passed.values()),
        "percent_of_limit": limits.percent_of_limit(line, rank=RANK),
        "reference": {"loss": expected["loss"], "grad_norm": expected["grad_norm"]},
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _known(home: Path) -> list[dict[str, Any]]:
    path = home / "results.jsonl"
    return results.read_lines(path) if path.exists() else []


def _progress(line: Mapping[str, Any]) -> str:
    marks = [name for name, passed in line["checks"].items() if not passed]
    marks += ["contended"] if line["contended"] else []
    return (
        f"{line['workload']} {line['repetition']} {line['system']}: {line['tokens_per_second']} real tokens/s, "
        f"{(line['peak_memory_bytes'] or 0) / 1e9:.2f} GB, {line['percent_of_limit']} % of the limit, "
        f"first loss {line['loss']['first']:.4f}" + (f"  [{', '.join(marks)}]" if marks else "")
    )


def _native(device: str) -> str:
    from probes import native

    return native(device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--workloads", help=f"instead of the device's: of {', '.join(WORKLOADS)}")
    parser.add_argument("--tier", choices=["quick", "full"], default="quick", help="how long to look (workloads.py)")
    parser.add_argument("--systems", help=f"instead of the tier's: of {', '.join(SYSTEMS)}")
    parser.add_argument("--repetitions", type=count, help="instead of the tier's: processes of each system")
    parser.add_argument("--steps", type=count, help="instead of the tier's: optimizer steps of a process")
    parser.add_argument("--warm", type=count, help="instead of the tier's: first steps that are not timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where all systems run")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="of weights and products; auto is what the device multiplies natively")
    parser.add_argument("--resume", action="store_true", help="continue the last run of the same work and code")
    parser.add_argument("--seed", type=count_from_zero, default=0, help="seed of the systems; the data has its own")
    parser.add_argument("--threads", type=count, default=procfs.available_cores(), help="OMP_NUM_THREADS")
    parser.add_argument("--limit", type=above_zero, default=1800, help="seconds after which a process is ended")
    args = parser.parse_args(arguments)
    args.home = args.home.resolve()
    own = [name for name, work in WORKLOADS.items() if work.device == args.device]
    args.workloads = args.workloads.split(",") if args.workloads else own
    args.systems = args.systems.split(",") if args.systems else None
    for word, names, known in (("workload", args.workloads, WORKLOADS), ("system", args.systems or [], SYSTEMS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"unknown {word} {unknown[0]!r}; there are {', '.join(known)}")
    missing = [name for name in args.systems or [] if not interpreter(SYSTEMS[name].environment, args.home).exists()]
    if missing:
        parser.error(f"{missing[0]} has no environment in {args.home}; run setup_peers.py with the same --home")
    for name in args.workloads:
        tier = tier_of(name, args)
        if tier.warm >= tier.steps:
            parser.error(f"{name}: --warm {tier.warm} leaves none of --steps {tier.steps} to be timed")
    return args


def tier_of(workload: str, args: argparse.Namespace) -> Tier:
    """The workload's tier with what the command line says instead.

    Of the tier's own systems those are left out that have no environment here, so that one peer that could not be
    installed does not stand in the way of the others, and those that only differ where products round.
    """
    own = WORKLOADS[workload].tier(args.tier)
    there = [name for name in own.systems if interpreter(SYSTEMS[name].environment, args.home).exists()]
    there = [name for name in there if args.precision != "float32" or not SYSTEMS[name].rounds]
    return Tier(
        steps=own.steps if args.steps is None else args.steps,
        warm=own.warm if args.warm is None else args.warm,
        repetitions=own.repetitions if args.repetitions is None else args.repetitions,
        systems=tuple(args.systems or there),
    )


def main() -> int:
    args = parse()
    load = procfs.load_average()
    if load > QUIET_LOAD:
        print(f"load average {load:.2f}: other work is going on, expect contended runs", file=sys.stderr)
    args.precision = _native(args.device) if args.precision == "auto" else args.precision
    shared = {name: getattr(args, name) for name in
              ("home", "tier", "precision", "device", "seed", "threads", "limit", "resume")}  # fmt: skip
    session = Session(**shared, commit=commit())
    good = True
    for workload in args.workloads:
        tier = tier_of(workload, args)
        left_out = set(WORKLOADS[workload].tier(args.tier).systems) - set(tier.systems)
        if left_out and not args.systems:
            print(f"{workload}: without {', '.join(sorted(left_out))}", file=sys.stderr)
        try:
            lines, failed = measure(workload, tier, session)
        except WorkerError as failure:
            print(f"{workload}: {failure}", file=sys.stderr)
            good = False
            continue
        good = good and not failed and all(line["valid"] for line in lines)
        if lines:
            _print_table(workload, lines)
    return 0 if good else 1


def _print_table(workload: str, lines: list[dict[str, Any]]) -> None:
    rows = results.table(lines, baseline=BASELINE)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{workload}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
