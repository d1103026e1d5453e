"""What is generated: workloads and systems as tables, prompts, adapters, and the line of a process.

Nothing of luthier or a peer is imported here. Prompts are cut from the prepared rows; adapters are LoRA of rank 16 at
every linear layer with random factors, written once in PEFT's format.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from workloads import MODELS

OURS = "luthier"
RANK, ALPHA = 16, 32
ADAPTERS = 64
"""Adapters that are written for a model."""
WARM_TOKENS = 4
"""Tokens of each answer before the timed work: what is made once is made then."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are there at once.

    Prompts have the tokens of `prompts`, answers those of `answers`, in turn; an answer is as long as that whatever it
    says. Where they are `shared`, all requests have one prompt and are drawn instead of greedy. Request i speaks under
    adapter i modulo `adapters`; with none all speak under the base.
    """

    title: str
    model: str
    requests: int
    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    systems: tuple[str, ...]
    shared: bool = False
    adapters: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of the prompt and of the answer of each request."""
        turns = range(self.requests)
        return [(self.prompts[i % len(self.prompts)], self.answers[i % len(self.answers)]) for i in turns]


@dataclass(frozen=True)
class System:
    """A script, the peer's environment (None: our interpreter), and what the script is told."""

    script: str
    environment: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS = {
    OURS: System("generate_luthier.py"),
    "luthier-int8": System("generate_luthier.py", settings={"quantizer": "int8"}),
    "luthier-nf4": System("generate_luthier.py", settings={"quantizer": "nf4"}),
    "transformers": System("generate_transformers.py", "trl", {"way": "generate"}),
    "transformers-continuous": System("generate_transformers.py", "trl", {"way": "continuous"}),
    "peft": System("generate_transformers.py", "trl", {"way": "adapter_names"}),
}
_PLAIN, _BATCHED = (OURS, "transformers"), (OURS, "transformers", "transformers-continuous")
_MIXED = (OURS, "peft")
# Uneven on purpose: no two prompts of a static batch are padded alike.
_PROMPTS = (37, 211, 64, 150, 18, 96, 243, 75, 121, 52, 180, 29, 133, 88, 200, 46)
_UNEVEN = (16, 96, 40, 64, 24, 80, 48, 32)

WORKLOADS = {
    "m2-1": Workload(
        title="one request, the shape of Qwen2.5-0.5B", model="m2", requests=1, prompts=(128,), answers=(64,),
        systems=(*_PLAIN, "luthier-int8", "luthier-nf4"),
    ),
    "m2-16": Workload(
        title="16 requests with prompts of different lengths, the same model", model="m2", requests=16,
        prompts=_PROMPTS, answers=(64,), systems=(*_BATCHED, "luthier-int8"),
    ),
    "m2-16-uneven": Workload(
        title="16 requests whose answers differ in length too, the same model", model="m2", requests=16,
        prompts=_PROMPTS, answers=_UNEVEN, systems=_BATCHED,
    ),
    "m2-shared": Workload(
        title="one prompt of 512 tokens, 16 answers, the same model", model="m2", requests=16, prompts=(512,),
        answers=(16,), systems=_PLAIN, shared=True,
    ),
    "m1-1": Workload(
        title="one request, a llama of 56 million parameters", model="m1", requests=1, prompts=(128,), answers=(128,),
        systems=_PLAIN,
    ),
    "m1-16": Workload(
        title="16 requests with prompts of different lengths, the same model", model="m1", requests=16,
        prompts=_PROMPTS, answers=(128,), systems=_BATCHED,
    ),
    "m1-16-uneven": Workload(
        title="16 requests whose answers differ in length too, the same model", model="m1", requests=16,
        prompts=_PROMPTS, answers=_UNEVEN, systems=_BATCHED,
    ),
    "m1-shared": Workload(
        title="one prompt of 512 tokens, 16 answers, the same model", model="m1", requests=16, prompts=(512,),
        answers=(16,), systems=_PLAIN, shared=True,
    ),
    "m1-1-adapter": Workload(
        title="16 requests under one adapter, the same model", model="m1", requests=16, prompts=_PROMPTS,
        answers=(128,), systems=_MIXED, adapters=1,
    ),
    "m1-4-adapters": Workload(
        title="16 requests under four adapters, the same model", model="m1", requests=16, prompts=_PROMPTS,
        answers=(128,), systems=_MIXED, adapters=4,
    ),
    "m1-64-of-one": Workload(
        title="64 requests under one adapter, the same model", model="m1", requests=64, prompts=_PROMPTS,
        answers=(64,), systems=_MIXED, adapters=1,
    ),
    "m1-64-adapters": Workload(
        title="64 requests under 64 adapters, the same model", model="m1", requests=64, prompts=_PROMPTS,
        answers=(64,), systems=_MIXED, adapters=64,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of one system."""

    home: Path
    system: str
    workload: str
    precision: str
    settings: Mapping[str, Any]

    @property
    def work(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def folder(self) -> Path:
        """Where the model of the workload is."""
        return self.home / self.work.model

    @property
    def widest(self) -> tuple[int, int]:
        return MODELS[self.work.model].widest

    def adapter(self, number: int) -> Path:
        """Where an adapter is."""
        return self.folder / "adapters" / f"a{number:02d}"


@dataclass(frozen=True)
class Answered:
    """What a system did: the tokens of each answer, when the first of all answers were there, and when it was done."""

    tokens: Sequence[Sequence[int]]
    first_s: float


def job_from_arguments() -> Job:
    """The job, from the command line that `generate.py` writes."""
    parser = argparse.ArgumentParser(description="A process of generate.py; run that instead.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--workload", choices=list(WORKLOADS), required=True)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], required=True)
    parser.add_argument("--settings", default="{}")
    args = vars(parser.parse_args())
    args["settings"] = json.loads(args["settings"])
    return Job(**args)


def prompts_of(job: Job) -> list[list[int]]:
    """The prompt of each request: a stretch of the prepared rows of its own, or the same one."""
    rows = (job.folder / "rows.jsonl").read_text("utf-8").splitlines()
    ids = list(chain.from_iterable(json.loads(row)["input_ids"] for row in rows[:400]))
    lengths = [prompt for prompt, _ in job.work.lengths()]
    starts = [0 if job.work.shared else 512 * index for index in range(len(lengths))]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def result_line(
    job: Job,
    answered: Answered,
    *,
    clocks: Mapping[str, Any],
    probes: Mapping[str, Any],
    peak: Mapping[str, Any],
    machine: Mapping[str, Any],
    packages: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of one run. Every answer has to have its length; only the tokens that were asked for count."""
    wanted = [answer for _, answer in job.work.lengths()]
    short = [index for index, (own, count) in enumerate(zip(answered.tokens, wanted, strict=True)) if len(own) < count]
    if short:
        raise SystemExit(f"{job.system} ended answers {short} before their time")
    wall, said = float(clocks["wall_s"]), sum(wanted)
    later = said - len(wanted)
    return {
        "workload": job.workload,
        "system": job.system,
        "precision": job.precision,
        "shape": {"model": job.work.model} | asdict(MODELS[job.work.model]),
        "settings": dict(settings),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": dict(machine),
        "probes": dict(probes),
        **clocks,
        "prompt_tokens": sum(prompt for prompt, _ in job.work.lengths()),
        "said_tokens": said,
        "tokens_per_second": round(said / wall, 2),
        "first_tokens_s": round(answered.first_s, 4),
        "later_tokens_per_second": round(later / (wall - answered.first_s), 2) if later else None,
        **peak,
        "beginnings": [list(own[:8]) for own in answered.tokens],
    }


def print_line(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)
