"""DPO and GRPO as they are measured: rows, systems, and the line of a process.

Nothing of luthier or a peer is imported here. Ids are cut from the prepared rows, so that no text is tokenised again
and every system sees the same: for DPO prompts of 256 tokens with two answers of 64 to 128; for GRPO prompts of 64, to
each of which 8 answers of 128 tokens are sampled, none of which may end before.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import procfs

OURS = "luthier"
PROMPT, SHORTEST, LONGEST = 256, 64, 128
ASKED, GROUP, NEW = 64, 8, 128
RANK, ALPHA, LEARNING_RATE, BETA = 16, 32, 2e-4, 0.1
WORKLOADS = {"dpo": "pairs", "grpo": "prompts"}
"""What is measured, and what a step has several of."""


@dataclass(frozen=True)
class System:
    """Who is measured: the virtual environment (ours when None), and what is set beside its defaults."""

    environment: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def script(self, workload: str) -> str:
        return f"{workload}_{OURS if self.environment is None else self.environment}.py"


SYSTEMS = {
    OURS: System(),
    "trl": System("trl"),
    # The fastest of the settings tried here: nothing recomputed, no autocast.
    "trl-tuned": System("trl", {"gradient_checkpointing": False, "bf16": False}),
}


@dataclass(frozen=True)
class Job:
    """One run of one system; `rows` are the pairs, or the prompts, of a step."""

    home: Path
    workload: str
    system: str
    model: str
    rows: int
    steps: int
    warm: int

    @property
    def folder(self) -> Path:
        return self.home / self.model

    @property
    def settings(self) -> dict[str, Any]:
        """What the system sets beside its defaults."""
        return dict(SYSTEMS[self.system].settings)


@dataclass(frozen=True)
class Pair:
    """One prompt, the better answer and the worse one, as token ids."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a model has to see, the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def pairs(job: Job, *, seed: int = 0) -> list[Pair]:
    """The pairs of all steps, by a fixed seed."""
    generator, ids = random.Random(seed), _ids(job)
    found = []
    for _ in range(job.rows * job.steps):
        lengths = (PROMPT, generator.randint(SHORTEST, LONGEST), generator.randint(SHORTEST, LONGEST))
        found.append(Pair(*(_cut(ids, length, generator) for length in lengths)))
    return found


def prompts(job: Job, *, seed: int = 0) -> list[tuple[int, ...]]:
    """The prompts of all steps, by a fixed seed."""
    generator, ids = random.Random(seed), _ids(job)
    return [_cut(ids, ASKED, generator) for _ in range(job.rows * job.steps)]


def vowels(text: str) -> float:
    """The reward of an answer: the share of vowels in it. Cheap, and never the same for a whole group."""
    return sum(letter in "aeiou" for letter in text) / (len(text) + 1)


def _ids(job: Job) -> list[int]:
    with (job.folder / "rows.jsonl").open(encoding="utf-8") as lines:
        return [token for line in lines for token in json.loads(line)["input_ids"]]


def _cut(ids: Sequence[int], length: int, generator: random.Random) -> tuple[int, ...]:
    start = generator.randrange(len(ids) - length)
    return tuple(ids[start : start + length])


def job_from_arguments() -> Job:
    """The job, from the command line that `preference.py` writes."""
    parser = argparse.ArgumentParser(description="A training process of preference.py; run that instead.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--workload", choices=list(WORKLOADS), required=True)
    parser.add_argument("--system", choices=list(SYSTEMS), required=True)
    parser.add_argument("--model", required=True)
    for name in ("rows", "steps", "warm"):
        parser.add_argument(f"--{name}", type=int, required=True)
    job = Job(**vars(parser.parse_args()))
    if not 1 <= job.warm < job.steps:
        parser.error(f"--warm {job.warm} is not 1 to {job.steps - 1}")
    return job


class Clock:
    """Reads the clocks at the end of each step; `sampled` seconds of each step are told by who samples in it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.moments: list[procfs.Moment] = []
        self.sampled: list[float] = []

    def step_ended(self) -> None:
        self.moments.append(procfs.now())

    def line(
        self,
        tokens: Sequence[int],
        *,
        losses: Sequence[float],
        norms: Sequence[float],
        peak: Mapping[str, Any],
        packages: Sequence[str],
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The figures of the run: timed steps only, but the norm of each. Each step trains on `tokens`."""
        job = self.job
        if len(self.moments) != job.steps or len(tokens) != job.steps:
            raise SystemExit(f"{len(self.moments)} steps were made, {job.steps} were asked for")
        taken = procfs.between(self.moments[job.warm - 1], self.moments[-1])
        timed = job.steps - job.warm
        return {
            "workload": job.workload,
            "system": job.system,
            "model": job.model,
            "rows_a_step": job.rows,
            "steps": {"all": job.steps, "warm": job.warm},
            "settings": dict(settings),
            "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
            **taken,
            "rows_per_second": round(timed * job.rows / taken["wall_s"], 3),
            "step_s": round(taken["wall_s"] / timed, 3),
            "sampling_s": round(sum(self.sampled[job.warm :]) / timed, 3),
            "tokens_per_second": round(sum(tokens[job.warm :]) / taken["wall_s"], 1),
            "loss": {"first": losses[0], "last": losses[-1]},
            "grad_norms": list(norms),
            **peak,
        }
