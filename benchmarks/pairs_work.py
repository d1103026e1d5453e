"""Preference pairs to be learned from by DPO: the rows, the systems, and the line of a process.

Nothing of luthier or a peer is imported here. A prompt has 256 tokens, each of its two answers 64 to 128; they are cut
from the prepared rows, so that no text is tokenised again and every system sees the same ids.
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
RANK, ALPHA, LEARNING_RATE, BETA = 16, 32, 2e-4, 0.1


@dataclass(frozen=True)
class System:
    """Who is measured: the script, the virtual environment (ours when None), and what is set beside its defaults."""

    script: str
    environment: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS = {
    OURS: System("pairs_luthier.py"),
    "trl": System("pairs_trl.py", "trl"),
    # The fastest of the settings tried here: nothing recomputed, no autocast.
    "trl-tuned": System("pairs_trl.py", "trl", {"gradient_checkpointing": False, "bf16": False}),
}


@dataclass(frozen=True)
class Job:
    """One run of one system."""

    home: Path
    system: str
    model: str
    pairs: int
    steps: int
    warm: int

    @property
    def folder(self) -> Path:
        return self.home / self.model


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
    """The pairs of all steps, by a fixed seed from the prepared rows laid end to end."""
    with (job.folder / "rows.jsonl").open(encoding="utf-8") as lines:
        ids = [token for line in lines for token in json.loads(line)["input_ids"]]
    generator = random.Random(seed)
    found = []
    for _ in range(job.pairs * job.steps):
        lengths = (PROMPT, generator.randint(SHORTEST, LONGEST), generator.randint(SHORTEST, LONGEST))
        parts = []
        for length in lengths:
            start = generator.randrange(len(ids) - length)
            parts.append(tuple(ids[start : start + length]))
        found.append(Pair(*parts))
    return found


def job_from_arguments() -> tuple[Job, dict[str, Any]]:
    """The job and the system's own settings, from the command line that `pairs.py` writes."""
    parser = argparse.ArgumentParser(description="A training process of pairs.py; run that instead.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--system", choices=list(SYSTEMS), required=True)
    parser.add_argument("--model", required=True)
    for name in ("pairs", "steps", "warm"):
        parser.add_argument(f"--{name}", type=int, required=True)
    job = Job(**vars(parser.parse_args()))
    if not 1 <= job.warm < job.steps:
        parser.error(f"--warm {job.warm} is not 1 to {job.steps - 1}")
    return job, dict(SYSTEMS[job.system].settings)


class Clock:
    """Reads the clocks when the last warm-up step has ended, and when the last step has."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.moments: list[procfs.Moment] = []

    def step_ended(self) -> None:
        self.moments.append(procfs.now())

    def line(
        self,
        used: Sequence[Pair],
        *,
        losses: Sequence[float],
        peak: Mapping[str, Any],
        packages: Sequence[str],
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The figures of the run: timed steps only, all losses."""
        job = self.job
        if len(self.moments) != job.steps:
            raise SystemExit(f"{len(self.moments)} steps were made, {job.steps} were asked for")
        taken = procfs.between(self.moments[job.warm - 1], self.moments[-1])
        timed = used[job.warm * job.pairs :]
        return {
            "system": job.system,
            "model": job.model,
            "pairs_a_step": job.pairs,
            "steps": {"all": job.steps, "warm": job.warm},
            "settings": dict(settings),
            "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
            **taken,
            "pairs_per_second": round(len(timed) / taken["wall_s"], 3),
            "tokens_per_second": round(sum(pair.tokens for pair in timed) / taken["wall_s"], 1),
            "loss": {"first": losses[0], "last": losses[-1]},
            **peak,
        }
