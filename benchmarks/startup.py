"""How long until something happens: help, import, the first optimizer step, and how fast rows become tokens.

    python benchmarks/startup.py --home bench-home --repetitions 5

Each measure of each repetition is a process of its own, one after another (A B C A B C). One JSON line a process goes
to HOME/startup.jsonl; the table on standard output holds medians and ranges. The peer's measures are made where its
environment is (`setup_peers.py`). Run it with luthier's interpreter. Where HOME/venv-luthier is, what luthier starts is
measured there: transformers imports whatever is installed of triton, accelerate and others, which luthier's tests need
and luthier does not, and a peer's environment holds no more than what it needs either.

- `luthier --help`, `import luthier`, `trl sft --help`: wall seconds of the process.
- `luthier first step`, `trl first step`: seconds from the start of the process to the end of the first step, of
  one row, LoRA on the prepared model of 56 million parameters; data is cached by a run before, which is not counted,
  and luthier has then seen what the zoo does with the model.
- `torch alone`: seconds of a process that imports torch and nothing else; `the libraries alone` imports the zoo's llama
  too and makes one of torch's optimizers: what the first step of anything that uses these stays above.
- `tokens text`, `tokens chat`: megabytes of text a second and core that become checked and stored tokens, with the
  tokenizers library alone beside it (`startup_tokens.py`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procfs
import results
from counts import count
from surroundings import interpreter, variables

HERE = Path(__file__).resolve().parent
MODEL = "m1"
"""The prepared model whose first step is timed, a folder of HOME."""
LUTHIER = "from luthier.cli.main import main; main()"
TORCH = """
import gc; gc.disable()
import torch, os; os._exit(0)
"""
LIBRARIES = """
import gc; gc.disable()
import torch, transformers.models.llama.modeling_llama
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
import os; os._exit(0)
"""
"""As luthier imports them, without the cycle collector; and without the time that ending takes."""


@dataclass(frozen=True)
class Measure:
    """One process: its command, the figure it gives, the figure's unit, and whether a first run of it only warms up."""

    command: Sequence[str]
    figure: str = "wall_s"
    unit: str = "s"
    warm: bool = False


def measures(home: Path, scratch: Path, precision: str) -> dict[str, Measure]:
    """All measures by name; those of a peer only where it is installed."""
    python, bench = sys.executable, home / MODEL
    alone = str(interpreter("luthier" if (home / "venv-luthier").exists() else None, home))
    recipe = scratch / "recipe.yaml"
    first = [alone, "-c", LUTHIER, "train", str(recipe), "--quiet", "--run", str(scratch / "run"), "--overwrite"]
    tokens = [python, str(HERE / "startup_tokens.py"), "--folder", str(bench), "--kind"]
    found = {
        "luthier --help": Measure([alone, "-c", LUTHIER, "--help"]),
        "import luthier": Measure([alone, "-c", "import luthier"]),
        "luthier first step": Measure(first, "first_step_s", warm=True),
        "torch alone": Measure([alone, "-c", TORCH]),
        "the libraries alone": Measure([alone, "-c", LIBRARIES]),
        "tokens text": Measure([*tokens, "text"], "mb_per_s", "MB/s a core"),
        "tokens chat": Measure([*tokens, "chat"], "mb_per_s", "MB/s a core"),
    }
    peer = home / "venv-trl" / "bin"
    if (peer / "trl").exists():
        worker = [str(peer / "python"), str(HERE / "startup_trl.py"), "--folder", str(bench), "--precision", precision]
        found["trl sft --help"] = Measure([str(peer / "trl"), "sft", "--help"])
        found["trl first step"] = Measure(worker, "first_step_s", warm=True)
    return found


def recipe_text(folder: Path, precision: str) -> str:
    """The recipe whose first step is timed: one row, and nothing before it that the peer does not do either."""
    return "\n".join(
        [
            f"model: {folder / 'model'}",
            f"data: {{train: {folder / 'rows.jsonl'}, template: instruction}}",
            "adapter: {method: lora, rank: 16}",
            "schedule: {method: constant}",
            "budget: {steps: 1}",
            "batch: {rows: 1}",
            "evaluation: {fraction: 0.0, every: 0, prompts: 0}",
            f"precision: {precision}",
            "device: cpu",
            "",
        ]
    )


def measured(name: str, measure: Measure, environment: Mapping[str, str], scratch: Path) -> dict[str, Any]:
    """Run one process and return its line. Raises SystemExit when it fails."""
    before, used, began = procfs.now(), resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(measure.command, capture_output=True, text=True, env=dict(environment), check=False)
    now, after = resource.getrusage(resource.RUSAGE_CHILDREN), procfs.now()
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode} and said:\n{done.stderr[-2000:]}")
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    line: dict[str, Any] = {"measure": name, "wall_s": round(after.wall - before.wall, 3), "cpu_s": round(cpu, 3)}
    if before.all_cpu is not None and after.all_cpu is not None:
        line["foreign_cpu_s"] = round(max(0.0, after.all_cpu - before.all_cpu - cpu), 3)
        line["contended"] = line["foreign_cpu_s"] > procfs.CONTENDED_SHARE * line["wall_s"]
    if measure.figure == "wall_s":
        return line
    if name == "luthier first step":
        return line | {"first_step_s": round(first_step(scratch / "run" / "events.jsonl") - began, 3)}
    said: dict[str, Any] = json.loads([text for text in done.stdout.splitlines() if text.startswith("{")][-1])
    if "first_step_at" in said:
        said["first_step_s"] = round(said.pop("first_step_at") - began, 3)
    return line | said


def first_step(events: Path) -> float:
    """When the first step of a run was recorded, as a Unix time."""
    with events.open(encoding="utf-8") as lines:
        for text in lines:
            event = json.loads(text)
            if event["kind"] == "step":
                return float(event["time"])
    raise SystemExit(f"{events} has no step")


def table(lines: Sequence[Mapping[str, Any]], units: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    """Header and rows: for each measure its median and range, CPU seconds, and how many processes were contended."""
    rows = [["measure", "median (range)", "unit", "CPU s", "runs", "contended"]]
    for name, (figure, unit) in units.items():
        own = [line for line in lines if line["measure"] == name]
        if not own:
            continue
        values = [line[figure] for line in own]
        middle = f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
        cpu = f"{statistics.median(line['cpu_s'] for line in own):.2f}"
        # Unknown (no /proc) is not quiet.
        contended = sum(line.get("contended") is not False for line in own)
        rows.append([name, middle, unit, cpu, str(len(own)), str(contended)])
        alone = [line["tokenizer_mb_per_s"] for line in own if "tokenizer_mb_per_s" in line]
        if alone:
            middle = f"{statistics.median(alone):.2f} ({min(alone):.2f}-{max(alone):.2f})"
            rows.append([f"{name}: the tokenizers library alone", middle, unit, "-", str(len(alone)), str(contended)])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--repetitions", type=count, default=5, help="processes of each measure")
    parser.add_argument("--only", default="", help="measures whose name contains this")
    args = parser.parse_args()
    home = args.home.resolve()
    names = list(measures(home, home, "float32"))
    if not any(args.only in name for name in names):
        parser.error(f"--only {args.only!r} is in no name of a measure; there are {', '.join(names)}")
    # Imported late: preparing needs torch and transformers, and --help does not.
    from prepare import prepare
    from probes import native

    digest, precision = prepare(home, MODEL), native("cpu")
    run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=home) as folder:
        scratch = Path(folder)
        (scratch / "recipe.yaml").write_text(recipe_text(home / MODEL, precision), "utf-8")
        chosen = {
            name: each for name, each in measures(home, scratch, precision).items() if args.only in name
        }
        environment = variables(home)
        for name, measure in chosen.items():
            if measure.warm:
                measured(name, measure, environment, scratch)
        for repetition in range(args.repetitions):
            for name, measure in chosen.items():
                line = measured(name, measure, environment, scratch)
                line |= {"run": run, "repetition": repetition, "data_digest": digest, "machine": procfs.machine()}
                results.append_line(home / "startup.jsonl", line)
                lines.append(line)
    rows = table(lines, {name: (each.figure, each.unit) for name, each in chosen.items()})
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
