"""What a GPU has to show, in one go of ten minutes: kernels, whole runs, and speed beside TRL. Writes what it found.

    python benchmarks/gpu_check.py --home bench-home
    python benchmarks/gpu_check.py --list                # what would be done, with the limit of each step; needs no GPU

The steps come in the order of what depends on them: operations against their twins, what only a GPU has (streams,
graphs), kernels as models write them, behind the walls (`gpu_kernels.py`), a LoRA run, a run of all weights with its
optimizer on the host, generation, and speed. A step that fails or takes too long is told, and the others go on; those
for which no time is left are told as not begun. HOME/gpu-check.json has the date, the device, the versions, the commit,
and of each step its command, seconds, exit code and last words.
Run it with luthier's interpreter; TRL is measured where `setup_peers.py` has installed it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from counts import above_zero
from results import read_lines
from sft import commit
from surroundings import interpreter
from systems import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600
LAST_WORDS = 2000
"""Letters of what a step said that are kept."""
LEAST = 10.0
"""Seconds for which it is worth to begin a step."""


@dataclass(frozen=True)
class Step:
    """One thing to be shown: a command, and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended: `code` is None where it took too long, or was not begun."""

    name: str
    command: tuple[str, ...]
    code: int | None
    seconds: float
    said: str

    @property
    def good(self) -> bool:
        return self.code == 0


def steps(home: Path) -> list[Step]:
    """All of them, in their order."""
    runs, rows = home / "gpu-runs", home / "gpu-rows.jsonl"
    base = ("--model", "seedling", "--data", str(rows), "--set", "objective.method=language_model")
    lora, full = runs / "lora.yaml", runs / "full.yaml"
    systems = [name for name in ("luthier", "trl-tuned") if interpreter(SYSTEMS[name].environment, home).exists()]
    measured = ("--home", str(home), "--device", "cuda", "--tier", "quick", "--systems", ",".join(systems))
    return [
        Step("operations against their twins", _pytest("tests/kernels/test_backends.py"), 90),
        Step("streams, graphs and masks", _pytest("tests/model/test_on_gpu.py"), 40),
        Step("kernels behind the walls", (sys.executable, str(_KERNELS), "--home", str(home)), 180),
        Step("a recipe for LoRA", _luthier("init", str(lora), *base), 30),
        Step("LoRA", _luthier("train", str(lora), "--run", str(runs / "lora"), *_SHORT), 50),
        Step("a recipe for all weights", _luthier("init", str(full), *base, "--set", "adapter.method=full"), 30),
        Step("all weights, the host steps", _luthier("train", str(full), "--run", str(runs / "full"), *_SHORT,
             "--set", "batch.offload=both", "--set", "batch.recompute=all"), 50),
        Step("generation", _luthier("generate", str(runs / "lora"), "--prompt", "one two three"), 40),
        Step("speed, 0.5 billion parameters", _benchmark("m2-lora-64", *measured), 90),
        Step("speed, 8 billion parameters", _benchmark("m8-lora-4096", *measured), 400),
    ]  # fmt: skip


_KERNELS = ROOT / "benchmarks" / "gpu_kernels.py"
_SHORT = ("--set", "device=cuda", "--set", "budget.steps=8")


def _pytest(path: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(ROOT / path))


def _luthier(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "from luthier.cli.main import main; main()", *words)


def _benchmark(workload: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "benchmarks" / "sft.py"), "--workloads", workload, *words)


def check(todo: Sequence[Step], seconds: float, *, tell: Callable[[str], None] = print) -> list[Outcome]:
    """Do the steps one after the other; none is given more than what is left of all the seconds."""
    ends = time.monotonic() + seconds
    found = []
    for step in todo:
        left = ends - time.monotonic()
        if left < LEAST:
            found.append(Outcome(step.name, step.command, None, 0.0, "not begun: no time was left"))
        else:
            found.append(_done(step, min(step.limit, left)))
        last = found[-1]
        tell(f"{'fine' if last.good else 'FAILED'}  {last.seconds:6.1f} s  {last.name}")
    return found


def _done(step: Step, limit: float) -> Outcome:
    began = time.monotonic()
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            step.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(step.name, step.command, None, _since(began), f"took longer than {limit:.0f} s")
    said = (done.stdout + done.stderr)[-LAST_WORDS:]
    return Outcome(step.name, step.command, done.returncode, _since(began), said)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def evidence(outcomes: Sequence[Outcome], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept: where and when it was, and how each step ended; `lines` are those of the benchmark."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"cuda": torch.version.cuda},
        "good": all(each.good for each in outcomes),
        "steps": [asdict(each) for each in outcomes],
        "lines": list(lines),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []


def write_rows(home: Path) -> None:
    """A few rows of words to train on, and no runs of an earlier check."""
    shutil.rmtree(home / "gpu-runs", ignore_errors=True)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    texts = [" ".join(words[place:] + words[:place]) for place in range(len(words))] * 4
    (home / "gpu-runs").mkdir(parents=True)
    rows = "".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number, text in enumerate(texts))
    (home / "gpu-rows.jsonl").write_text(rows, "utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--seconds", type=above_zero, default=SECONDS, help="for all steps together")
    parser.add_argument("--list", action="store_true", help="print the steps and do none of them")
    args = parser.parse_args(arguments)
    todo = steps(args.home.resolve())
    if args.list:
        for step in todo:
            print(f"{step.limit:4.0f} s  {step.name}: {' '.join(step.command[1:])}")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; --list tells what would be done")
    home = args.home.resolve()
    write_rows(home)
    results = home / "results.jsonl"
    before = len(_lines(results))
    found = evidence(check(todo, args.seconds), _lines(results)[before:])
    path = home / "gpu-check.json"
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"{sum(each['code'] == 0 for each in found['steps'])} of {len(todo)} steps are fine; {path}")
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
