"""What the training processes of `sft.py` share: their arguments, the order of rows, the clocks, the result line.

No system is imported here. A worker probes the machine, loads, trains, counts, probes again, and prints one JSON line
as the last line of its standard output.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import procfs
from workloads import MODELS, WORKLOADS, Workload

RANK = 16
ALPHA = 32
LEARNING_RATE = 2e-4
NO_LABEL = -100
"""What the peers' trainers take for a position without a loss."""


@dataclass(frozen=True)
class Job:
    """One run of one system. `precision` is that of frozen weights and of products."""

    home: Path
    system: str
    workload: str
    steps: int
    warm: int
    seed: int
    grouped: bool
    settings: Mapping[str, Any]
    precision: str = "bfloat16"
    device: str = "cpu"

    @property
    def work(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def folder(self) -> Path:
        """Where the model of the workload and its rows are."""
        return self.home / self.work.model

    @property
    def widest(self) -> tuple[int, int]:
        return MODELS[self.work.model].widest


@dataclass(frozen=True)
class Row:
    """One prepared row."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def labels(self) -> tuple[int, ...]:
        """The row as the peers' trainers want to be told of it: the ids, and NO_LABEL in place of the prompt."""
        return (NO_LABEL,) * self.prompt_tokens + self.ids[self.prompt_tokens :]


@dataclass(frozen=True)
class Batch:
    """What a trainer was seen to compute in one step: ids, mask and labels, a list for each padded row."""

    ids: list[list[int]]
    mask: list[list[int]]
    labels: list[list[int]]


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

    def __init__(self, job: Job, settle: Callable[[], None]) -> None:
        self.job = job
        self.settle = settle
        self.created = procfs.now()
        self.step_walls: list[float] = []
        self.first: procfs.Moment | None = None
        self.last: procfs.Moment | None = None

    def step_ended(self) -> None:
        self.settle()
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
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--workload", choices=list(WORKLOADS), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--settings", default="{}")
    args = vars(parser.parse_args())
    args["settings"] = json.loads(args["settings"])
    return Job(**args)


def read_rows(job: Job) -> list[Row]:
    rows = []
    with (job.folder / job.work.rows).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.append(Row(tuple(row["input_ids"]), row["prompt_tokens"]))
    return rows


def plan(lengths: Sequence[int], job: Job) -> list[list[int]]:
    """Which rows each step trains on.

    All systems get the same rows before and within the timed steps, and the same first steps, so that first losses
    compare. `grouped` sorts the rows of the timed steps by length, all of them, and shuffles the batches: no sampler
    can pad less with these rows.
    """
    needed = job.steps * job.work.batch
    if needed > len(lengths):
        raise SystemExit(f"{job.steps} steps of {job.work.batch} rows need {needed} rows, {len(lengths)} are prepared")
    warm_rows = job.warm * job.work.batch
    timed = list(range(warm_rows, needed))
    if job.grouped:
        timed.sort(key=lambda row: (lengths[row], row))
    batches = [timed[start : start + job.work.batch] for start in range(0, len(timed), job.work.batch)]
    if job.grouped:
        random.Random(job.seed).shuffle(batches)
    return [list(range(start, start + job.work.batch)) for start in range(0, warm_rows, job.work.batch)] + batches


def count(job: Job, rows: Sequence[Row], batches: Sequence[Batch]) -> list[Counted]:
    """The positions of each step, after checking that it saw exactly the planned rows and labels, and no others."""
    planned = plan([len(row.ids) for row in rows], job)
    counted = []
    for expected, batch in zip(planned, batches, strict=True):
        chosen = [rows[index] for index in expected]
        if _without_padding(batch) != [(row.ids, row.labels) for row in chosen]:
            raise SystemExit("the peer trained on other tokens or labels than the prepared ones")
        real, supervised = sum(len(row.ids) for row in chosen), sum(row.supervised for row in chosen)
        counted.append(Counted(real, supervised, sum(map(len, batch.ids)), pairs(chosen)))
    return counted


def _without_padding(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and labels of each row where the mask keeps them. A label on padding would be a loss on nothing."""
    kept = []
    for ids, mask, labels in zip(batch.ids, batch.mask, batch.labels, strict=True):
        places = [place for place, keep in enumerate(mask) if keep]
        if sum(label != NO_LABEL for label in labels) != sum(labels[place] != NO_LABEL for place in places):
            raise SystemExit("the peer has labels on padding")
        kept.append((tuple(ids[place] for place in places), tuple(labels[place] for place in places)))
    return kept


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
    machine: Mapping[str, Any],
    packages: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of one run. Only the timed steps are counted; losses are of all steps."""
    timed = counted[job.warm :]
    figures = clock.figures()
    tokens = {name: sum(getattr(step, name) for step in timed) for name in ("real", "supervised", "padded", "pairs")}
    return {
        "workload": job.workload,
        "precision": job.precision,
        "device": job.device,
        "system": job.system,
        "method": job.work.method,
        "shape": {"model": job.work.model} | asdict(MODELS[job.work.model]),
        "steps": {"all": job.steps, "warm": job.warm, "rows": job.work.batch, "max_tokens": job.work.longest},
        "seed": job.seed,
        "settings": dict(settings),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": dict(machine),
        "probes": dict(probes),
        **figures,
        "tokens": tokens | {"padding_share": round(1 - tokens["real"] / tokens["padded"], 4)},
        "tokens_per_second": round(tokens["real"] / figures["wall_s"], 1),
        **peak,
        "loss": {"first": losses[0], "last": losses[-1]},
        "grad_norm_first": grad_norms[0],
        "parameters": dict(parameters),
    }


def print_line(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)
