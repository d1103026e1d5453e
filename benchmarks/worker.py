"""What the training processes of `sft.py` share: their arguments, the order of rows, the clocks, the result line.

No system is imported here. A worker probes the machine, loads, trains, counts, probes again, and prints one JSON line
as the last line of its standard output.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import procfs

MAX_TOKENS = 512
RANK = 16
ALPHA = 32
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Job:
    """One run of one system."""

    folder: Path
    system: str
    steps: int
    warm: int
    batch: int
    seed: int
    grouped: bool
    settings: Mapping[str, Any]
    method: str = "lora"
    precision: str = "bfloat16"


@dataclass(frozen=True)
class Row:
    """One prepared row."""

    prompt: str
    completion: str
    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Counted:
    """The positions of one step: tokens of rows, those with a loss, and all that the model computed."""

    real: int
    supervised: int
    padded: int
    pairs: int
    """Positions attended to, summed over the tokens of rows."""


def pairs(rows: Sequence[Row]) -> int:
    """Positions attended to: every token of a row sees itself and all before it."""
    return sum(len(row.ids) * (len(row.ids) + 1) // 2 for row in rows)


class StepClock:
    """Reads the clocks at the end of the last warm-up step and at the end of the last step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.created = procfs.now()
        self.step_walls: list[float] = []
        self.first: procfs.Moment | None = None
        self.last: procfs.Moment | None = None

    def step_ended(self) -> None:
        moment = procfs.now()
        self.step_walls.append(moment.wall)
        if len(self.step_walls) == self.job.warm:
            self.first = moment
        if len(self.step_walls) == self.job.steps:
            self.last = moment

    def figures(self) -> dict[str, Any]:
        """Wall, CPU and foreign CPU seconds of the timed steps, and the seconds until the first step was done."""
        if self.first is None or self.last is None:
            raise SystemExit(f"{len(self.step_walls)} steps were made, {self.job.steps} were asked for")
        first_step = round(self.step_walls[0] - self.created.wall, 3)
        return {**procfs.between(self.first, self.last), "first_step_s": first_step}


def job_from_arguments() -> Job:
    """The job, from the command line that `sft.py` writes."""
    parser = argparse.ArgumentParser(description="A training process of sft.py; run that instead.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--method", choices=["lora", "full"], required=True)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], required=True)
    parser.add_argument("--settings", default="{}")
    args = vars(parser.parse_args())
    args["settings"] = json.loads(args["settings"])
    return Job(**args)


def read_rows(folder: Path) -> list[Row]:
    rows = []
    with (folder / "rows.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.append(Row(row["prompt"], row["completion"], tuple(row["input_ids"]), row["prompt_tokens"]))
    return rows


def plan(lengths: Sequence[int], job: Job) -> list[list[int]]:
    """Which rows each step trains on.

    All systems get the same rows before and within the timed steps, and the same first steps, so that first losses
    compare. `grouped` sorts the rows of the timed steps by length, all of them, and shuffles the batches: no sampler
    can pad less with these rows.
    """
    needed = job.steps * job.batch
    if needed > len(lengths):
        raise SystemExit(f"{job.steps} steps of {job.batch} rows need {needed} rows, {len(lengths)} are prepared")
    warm_rows = job.warm * job.batch
    timed = list(range(warm_rows, needed))
    if job.grouped:
        timed.sort(key=lambda row: (lengths[row], row))
    batches = [timed[start : start + job.batch] for start in range(0, len(timed), job.batch)]
    if job.grouped:
        random.Random(job.seed).shuffle(batches)
    return [list(range(start, start + job.batch)) for start in range(0, warm_rows, job.batch)] + batches


def result_line(
    job: Job,
    *,
    clock: StepClock,
    counted: Sequence[Counted],
    losses: Sequence[float],
    grad_norms: Sequence[float],
    parameters: Mapping[str, Any],
    probes: Mapping[str, Any],
    peak: Mapping[str, Any],
    packages: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of one run. Only the timed steps are counted; losses are of all steps."""
    timed = counted[job.warm :]
    figures = clock.figures()
    tokens = {name: sum(getattr(step, name) for step in timed) for name in ("real", "supervised", "padded", "pairs")}
    return {
        "workload": workload(job.method, job.precision, job.batch),
        "system": job.system,
        "steps": {"all": job.steps, "warm": job.warm, "rows": job.batch, "max_tokens": MAX_TOKENS},
        "seed": job.seed,
        "settings": dict(settings),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": procfs.machine(),
        "probes": dict(probes),
        **figures,
        "tokens": tokens | {"padding_share": round(1 - tokens["real"] / tokens["padded"], 4)},
        "tokens_per_second": round(tokens["real"] / figures["wall_s"], 1),
        **peak,
        "loss": {"first": losses[0], "last": losses[-1]},
        "grad_norm_first": grad_norms[0],
        "parameters": dict(parameters),
    }


def workload(method: str, precision: str, batch: int) -> str:
    """The name under which lines compare."""
    return f"sft-{f'lora-r{RANK}' if method == 'lora' else method}-{precision}-{batch}x{MAX_TOKENS}"


def print_line(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)
