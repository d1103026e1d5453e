"""luthier as one process of `preference.py`: GRPO with LoRA, sampled by the model that is trained."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from devices import Device
from dpo_luthier import stepper_of
from preference_work import GROUP, NEW, Clock, Job, job_from_arguments, prompts, vowels
from transformers import AutoTokenizer

from luthier.data.rollouts import Prompt
from luthier.data.sample import Sample
from luthier.infer.engine import Engine
from luthier.infer.groups import GroupSpeaker
from luthier.kernels.pool import bound_caches
from luthier.model.speaker import Sampling, Spoken
from luthier.objectives.grpo import GRPO
from luthier.rewards import Score
from luthier.train.recall import recall
from luthier.train.rollouts import Plan, RolloutSource
from luthier.train.scoring import Scored
from luthier.train.stepper import Stepper


class TimedSpeaker:
    """A speaker that tells how long it spoke."""

    def __init__(self, speaker: GroupSpeaker) -> None:
        self.speaker = speaker
        self.seconds: list[float] = []

    def speak(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> list[Spoken]:
        began = time.perf_counter()
        spoken = self.speaker.speak(prompts, sampling)
        self.seconds.append(time.perf_counter() - began)
        return spoken


def scored(samples: Sequence[Sample]) -> Scored:
    return Scored(tuple(Score(vowels(sample.answer)) for sample in samples))


def source_of(job: Job, stepper: Stepper, speaker: TimedSpeaker) -> RolloutSource:
    """Rollouts over the prepared prompts; no token ends an answer, so each has its full length."""
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "model")
    asked = [Prompt(np.array(ids, np.int32), row=row) for row, ids in enumerate(prompts(job))]
    return RolloutSource(
        asked, stepper.objective, speaker, scored,
        recall=lambda trees, wanted: recall(stepper, trees, wanted), decode=lambda ids: tokenizer.decode(ids.tolist()),
        plan=Plan(prompts=job.rows, answers=GROUP, max_new_tokens=NEW, stop_ids=()), seed=0,
    )  # fmt: skip


def main() -> int:
    job = job_from_arguments()
    bound_caches()
    device, clock = Device("cpu"), Clock(job)
    device.forget_peak()
    stepper = stepper_of(job, GRPO(longest=NEW))
    engine = Engine(stepper.model)
    speaker = TimedSpeaker(GroupSpeaker(engine))
    source, losses, norms, tokens = source_of(job, stepper, speaker), [], [], []
    for _ in range(job.steps):
        report = stepper.forward_backward(source.next_step())
        norms.append(stepper.optim_step().grad_norm)
        engine.forget()
        clock.step_ended()
        losses.append(report.loss)
        tokens.append(report.trained_tokens)
    if set(tokens) != {job.rows * GROUP * NEW}:
        raise SystemExit(f"steps trained {tokens} tokens, {job.rows * GROUP * NEW} each were asked for")
    clock.sampled = speaker.seconds
    settings = {"micro_tokens": stepper.micro_tokens, "threads": torch.get_num_threads()}
    packages = ("torch", "transformers", "safetensors")
    line = clock.line(tokens, losses=losses, norms=norms, peak=device.peak(), packages=packages, settings=settings)
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
