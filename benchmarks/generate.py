"""Making text in luthier and in its peers: tokens per second and time to the first tokens, interleaved in one run.

    python benchmarks/setup_peers.py --home bench-home
    python benchmarks/generate.py --home bench-home --repetitions 3
    python benchmarks/generate.py --home bench-home --workloads m2-1,m2-16 --systems luthier,transformers

Each repetition of each system is a process of its own (A B C A B C) that loads, answers all requests once for a few
tokens, then once in earnest, with the machine's speed probed before and after. One JSON line a process goes to
HOME/generate.jsonl; one that fails is told and the others go on. The table at the end holds medians of this run;
`generate_report.py` writes those of the latest runs into a page.
The workloads and the systems are tables in `generate_work.py`. Run it with luthier's interpreter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procfs
import results
from counts import above_zero, count
from generate_report import table
from generate_work import ADAPTERS, ALPHA, RANK, SYSTEMS, WORKLOADS, Job
from sft import commit
from surroundings import interpreter, variables
from workloads import MODELS

HERE = Path(__file__).resolve().parent
Line = Mapping[str, Any]


def run(job: Job, *, threads: int, limit: float) -> dict[str, Any]:
    """One process to its end: its line, or why there is none under "failure"."""
    system = SYSTEMS[job.system]
    parts = [str(interpreter(system.environment, job.home)), str(HERE / system.script), "--system", job.system]
    parts += ["--home", str(job.home), "--workload", job.workload, "--precision", job.precision]
    parts += ["--settings", json.dumps(dict(job.settings))]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            parts, capture_output=True, text=True, timeout=limit, env=variables(job.home, threads=threads), check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"it took longer than {limit} s; see --limit"}
    except OSError as failure:
        return {"failure": f"it cannot be started: {failure}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failure": f"it ended with {done.returncode} and said: {done.stderr[-2000:]}"}
    return {**json.loads(lines[-1]), "process_wall_s": round(time.perf_counter() - started, 1)}


def write_adapters(home: Path, model: str) -> None:
    """LoRA of rank 16 at every linear layer of a model, in PEFT's format, with random factors; written once."""
    folder = home / model / "adapters"
    if (folder / "done").exists():
        return
    import torch
    from safetensors.torch import save_file

    shape = MODELS[model]
    homes = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    names = {name: f"{homes.get(name, 'mlp')}.{name}_proj" for name in shape.blocks}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(f"{name}_proj" for name in shape.blocks), "inference_mode": True,
        "base_model_name_or_path": str(home / model / "model"),
    }  # fmt: skip
    for number in range(ADAPTERS):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(shape.layers):
            for name, (inputs, outputs) in shape.blocks.items():
                prefix = f"base_model.model.model.layers.{layer}.{names[name]}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs, generator=draw) / inputs**0.5
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=draw) * 0.01
        own = folder / f"a{number:02d}"
        own.mkdir(parents=True, exist_ok=True)
        save_file(tensors, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "done").write_text("", "utf-8")


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """All processes of all workloads; their lines, and whether each process gave one."""
    # Imported late: preparing needs torch and transformers, and --help does not.
    from prepare import prepare

    began, lines, good = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), [], True
    for workload in args.workloads:
        work = WORKLOADS[workload]
        digest = prepare(args.home, work.model)
        if work.adapters:
            write_adapters(args.home, work.model)
        pythons = {name: interpreter(SYSTEMS[name].environment, args.home) for name in args.systems or work.systems}
        systems = [name for name, python in pythons.items() if python.exists()]
        for repetition in range(args.repetitions):
            for name in systems:
                job = Job(args.home, name, workload, args.precision, SYSTEMS[name].settings)
                load = round(procfs.load_average(), 2)
                line = run(job, threads=args.threads, limit=args.limit)
                about = {"run": began, "commit": commit(), "data_digest": digest, "repetition": repetition}
                line = {"workload": workload, "system": name, **line, **about, "load_before": load}
                line |= percent_of_limit(line, args.home / work.model / "model")
                results.append_line(args.home / "generate.jsonl", line)
                good = good and "failure" not in line
                print(told(line), file=sys.stderr, flush=True)
                lines.append(line)
    return lines, good


def percent_of_limit(line: Line, model: Path) -> dict[str, float]:
    """The speed of a line as a share of what products and reading must take; nothing where weights are packed.

    Rates are the highest that its process has probed, before and after.
    """
    from limits import generation_seconds
    from results import matrix_rate

    from luthier.arithmetic.inference import weight_bytes
    from luthier.arithmetic.shapes import shape_of

    if not line.get("probes") or line["precision"] != "bfloat16" or "quantizer" in SYSTEMS[line["system"]].settings:
        return {}
    work, shape = WORKLOADS[line["workload"]], shape_of(json.loads((model / "config.json").read_text("utf-8")))
    seconds = generation_seconds(
        shape, work.lengths(), shared=work.shared, weights=weight_bytes(shape, 2),
        flops_per_second=matrix_rate(line["probes"]) * 1e9,
        bytes_per_second=max(side["copy_gb_per_s"] for side in line["probes"].values()) * 1e9,
    )  # fmt: skip
    return {"percent_of_limit": round(100 * seconds * line["tokens_per_second"] / line["said_tokens"], 1)}


def told(line: Line) -> str:
    """A line of progress."""
    head = f"{line['workload']} {line['repetition']} {line['system']}: "
    if "failure" in line:
        return head + line["failure"]
    contended = "  [contended]" if line["contended"] else ""
    return f"{head}{line['tokens_per_second']} tokens/s, first tokens after {line['first_tokens_s']} s{contended}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--systems", help=f"instead of the workload's: of {', '.join(SYSTEMS)}")
    parser.add_argument("--repetitions", type=count, default=1, help="processes of each system")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="of weights and products; auto is what the processor multiplies natively")
    parser.add_argument("--threads", type=count, default=procfs.available_cores(), help="OMP_NUM_THREADS")
    parser.add_argument("--limit", type=above_zero, default=1800, help="seconds after which a process is ended")
    args = parser.parse_args(arguments)
    args.home = args.home.resolve()
    args.workloads = args.workloads.split(",")
    args.systems = args.systems.split(",") if args.systems else None
    for word, names, known in (("workload", args.workloads, WORKLOADS), ("system", args.systems or [], SYSTEMS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"unknown {word} {unknown[0]!r}; there are {', '.join(known)}")
    return args


def main() -> int:
    args = parse()
    if args.precision == "auto":
        from probes import native

        args.precision = native("cpu")
    lines, good = measure(args)
    rows = table(lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
