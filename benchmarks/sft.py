"""LoRA or full fine-tuning in luthier and in its peers: real tokens per second and peak memory, interleaved in one run.

    python benchmarks/setup_peers.py --home bench-home
    python benchmarks/sft.py --home bench-home --systems luthier,trl-stock,trl-tuned --repetitions 3 --steps 9 --warm 1

Each repetition of each system is a process of its own (A B C A B C), so that a machine whose speed drifts treats all
alike. One JSON line a process goes to HOME/results.jsonl; the table on standard output holds medians and ranges.
Run it with luthier's interpreter; what it needs and how far to trust it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procfs
import results
import worker

HERE = Path(__file__).resolve().parent
BASELINE = "trl-stock"
QUIET_LOAD = 0.2


@dataclass(frozen=True)
class System:
    """How one system is started.

    `environment` names the peer's virtual environment, None is our own interpreter; `variables` are set for it.
    """

    script: str
    environment: str | None = None
    grouped: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


NO_CHECKPOINTING = {"gradient_checkpointing": False}
SYSTEMS = {
    "luthier": System("sft_luthier.py"),
    "luthier-unfused": System("sft_luthier.py", variables={"LUTHIER_KERNELS": "torch"}),
    "trl-stock": System("sft_trl.py", "trl"),
    "trl-tuned": System("sft_trl.py", "trl", True, NO_CHECKPOINTING),
    "trl-stock-no-autocast": System("sft_trl.py", "trl", False, {"bf16": False}),
    "trl-tuned-no-autocast": System("sft_trl.py", "trl", True, NO_CHECKPOINTING | {"bf16": False}),
}
REFERENCE = System("sft_reference.py")


class WorkerError(Exception):
    """A process that gave no result line."""


def interpreter(system: System, home: Path) -> str:
    """The Python that runs a system."""
    return sys.executable if system.environment is None else str(home / f"venv-{system.environment}" / "bin" / "python")


def order(systems: list[str], repetitions: int) -> list[tuple[int, str]]:
    """Repetition and system of each process: A B C A B C."""
    return [(repetition, system) for repetition in range(repetitions) for system in systems]


def command(name: str, system: System, args: argparse.Namespace) -> list[str]:
    """The command line of one process."""
    parts = [interpreter(system, args.home), str(HERE / system.script), "--system", name]
    for key in ("steps", "warm", "batch", "seed", "method", "precision"):
        parts += [f"--{key}", str(getattr(args, key))]
    parts += ["--folder", str(args.home / "sft"), "--settings", json.dumps(dict(system.settings))]
    return [*parts, "--grouped"] if system.grouped else parts


def start(name: str, system: System, args: argparse.Namespace) -> dict[str, Any]:
    """Run one process to its end and return its result line, with the wall time of the whole process."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command(name, system, args),
            capture_output=True,
            text=True,
            timeout=args.limit,
            env=_environment(args) | system.variables,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"{name} took longer than {args.limit} s; see --limit") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise WorkerError(f"{name} ended with {done.returncode} and said:\n{done.stderr[-2000:]}")
    return {**json.loads(lines[-1]), "process_wall_s": round(time.perf_counter() - started, 1)}


def reference(args: argparse.Namespace, digest: str) -> dict[str, Any]:
    """Loss and gradient norm of the first step in float32; kept in HOME, since they follow from data and batch.

    They are kept by data and commit, and computed anew when there are uncommitted changes.
    """
    path = args.home / "sft" / "reference.json"
    key = f"{digest} {args.method} batch {args.batch} commit {commit()}"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if key not in known or key.endswith("+"):
        known[key] = start("reference", REFERENCE, args)
        path.write_text(json.dumps(known), "utf-8")
    return dict(known[key])


def commit() -> str:
    """The commit of this checkout, with a plus sign when files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + "+" if head and _git("status", "--porcelain") else head or "unknown"


def measure(args: argparse.Namespace, digest: str) -> tuple[list[dict[str, Any]], bool]:
    """All processes, one after another; each line is written when its process ends. True when one failed."""
    expected = reference(args, digest)
    run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines: list[dict[str, Any]] = []
    failed = False
    for repetition, name in order(args.systems, args.repetitions):
        load = procfs.load_average()
        try:
            line = start(name, SYSTEMS[name], args)
        except WorkerError as failure:
            print(failure, file=sys.stderr)
            failed = True
            continue
        passed = results.checks(line, expected)
        line |= {"run": run, "repetition": repetition, "commit": commit(), "data_digest": digest}
        line |= {"load_before": round(load, 2), "checks": passed, "valid": all(passed.values())}
        line["percent_of_limit"] = percent_of_limit(line, args)
        line["reference"] = {"loss": expected["loss"], "grad_norm": expected["grad_norm"]}
        with (args.home / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(_progress(line), file=sys.stderr)
    return lines, failed


def percent_of_limit(line: Mapping[str, Any], args: argparse.Namespace) -> float:
    """The speed as a share of what the products must take at the rate that was probed in the same process.

    The work is that of a token of these rows, whoever does it: no padding, nothing computed twice, logits where there
    is a label.
    """
    from prepare import linear_sizes

    from luthier.arithmetic.compute import Attention, Linear, flops_per_token

    rank, full = (worker.RANK, False) if args.method == "lora" else (0, True)
    blocks, head, width, layers = linear_sizes()
    tokens = line["tokens"]
    linears = [Linear(inputs=a, outputs=b, rank=rank, trained=full) for a, b in blocks * layers]
    linears.append(Linear(inputs=head[0], outputs=head[1], trained=full, share=tokens["supervised"] / tokens["real"]))
    context = tokens["pairs"] / tokens["real"]
    flops = flops_per_token(linears, [Attention(width=width, context=context)] * layers)
    rate = statistics.median(side["gemm_gflops"] for side in line["probes"].values()) * 1e9
    return round(100 * line["tokens_per_second"] * flops / rate, 1)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """Offline, on the processor, with a fixed number of threads, writing nowhere but in HOME."""
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(args.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(args.home / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _progress(line: Mapping[str, Any]) -> str:
    marks = [name for name, passed in line["checks"].items() if not passed]
    marks += ["contended"] if line["contended"] else []
    return (
        f"{line['repetition']} {line['system']}: {line['tokens_per_second']} real tokens/s, "
        f"{(line['peak_memory_bytes'] or 0) / 1e9:.2f} GB, first loss {line['loss']['first']:.4f}"
        + (f"  [{', '.join(marks)}]" if marks else "")
    )


def _prepared(home: Path) -> str:
    # Imported late: preparing needs torch and transformers, and --help does not.
    from prepare import prepare

    return prepare(home / "sft")


def _native() -> str:
    from probes import native

    return native()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--systems", default="luthier,trl-stock,trl-tuned", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repetitions", type=int, default=3, help="processes of each system")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps of a process")
    parser.add_argument("--warm", type=int, default=1, help="first steps that are not timed")
    parser.add_argument("--method", choices=["lora", "full"], default="lora", help="what is trained")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="of weights and products; auto is what this CPU multiplies natively")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the systems; the data has its own")
    parser.add_argument("--threads", type=int, default=procfs.available_cores(), help="OMP_NUM_THREADS")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a process is ended")
    args = parser.parse_args(arguments)
    args.home = args.home.resolve()
    args.systems = args.systems.split(",")
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    if not 1 <= args.warm < args.steps or args.repetitions < 1 or args.batch < 1:
        parser.error("--warm must be at least 1 and less than --steps; --repetitions and --batch at least 1")
    missing = [name for name in args.systems if not Path(interpreter(SYSTEMS[name], args.home)).exists()]
    if missing:
        parser.error(f"{missing[0]} has no environment in {args.home}; run setup_peers.py with the same --home")
    return args


def main() -> int:
    args = parse()
    load = procfs.load_average()
    if load > QUIET_LOAD:
        print(f"load average {load:.2f}: other work is going on, expect contended runs", file=sys.stderr)
    try:
        args.precision = _native() if args.precision == "auto" else args.precision
        lines, failed = measure(args, _prepared(args.home))
    except WorkerError as failure:
        print(failure, file=sys.stderr)
        return 1
    if lines:
        rows = results.table(lines, baseline=BASELINE)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print("\n".join(["", *results.notes(lines)]))
    return 1 if failed or not all(line["valid"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
