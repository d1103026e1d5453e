"""luthier as one process of `preference.py`: DPO with LoRA, each prompt computed once for its two answers."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from devices import Device
from preference_work import ALPHA, BETA, LEARNING_RATE, RANK, Clock, Job, Pair, job_from_arguments, pairs
from safetensors.torch import load_file

from luthier.adapters.lora import LoRA
from luthier.data.forest import Segment, Tree
from luthier.kernels.pool import bound_caches
from luthier.model.load import load_model
from luthier.objectives import Objective
from luthier.objectives.dpo import DPO
from luthier.optimizers.adamw import AdamW
from luthier.recipes.sizing.memory import use_pool
from luthier.train.stepper import Stepper


def tree_of(pair: Pair, row: int) -> Tree:
    """A prompt with two leaves, which share the weight of a pair."""
    prompt = Segment(np.array(pair.prompt, np.int32), np.zeros(len(pair.prompt), np.float32))
    leaves = [
        Segment(np.array(answer, np.int32), np.full(len(answer), 0.5 / len(answer), np.float32), 0)
        for answer in (pair.chosen, pair.rejected)
    ]
    return Tree((prompt, *leaves), row=row)


def stepper_of(job: Job, objective: Objective) -> Stepper:
    """The prepared model with LoRA on it, laid out as a run is."""
    model = load_model(str(job.folder / "model"), precision="bfloat16")
    use_pool(model)
    torch.manual_seed(0)
    attachment = model.attach(LoRA(rank=RANK, alpha=float(ALPHA)).attach(model.sites))
    tensors = attachment.named_tensors()
    with torch.no_grad():
        for site, start in load_file(job.folder / "lora.safetensors").items():
            tensors[f"base_model.model.{site}.lora_A.weight"].copy_(start)
    return Stepper(model, attachment, objective, AdamW(learning_rate=LEARNING_RATE), micro_tokens=4096)


def main() -> int:
    job = job_from_arguments()
    bound_caches()
    device, clock = Device("cpu"), Clock(job)
    device.forget_peak()
    stepper = stepper_of(job, DPO(beta=BETA))
    used, losses, norms = pairs(job), [], []
    for step in range(job.steps):
        chosen = used[step * job.rows : (step + 1) * job.rows]
        report = stepper.forward_backward([tree_of(pair, row) for row, pair in enumerate(chosen)])
        norms.append(stepper.optim_step().grad_norm)
        clock.step_ended()
        losses.append(report.loss)
    settings = {"micro_tokens": stepper.micro_tokens, "threads": torch.get_num_threads()}
    packages = ("torch", "transformers", "safetensors")
    tokens = [sum(pair.tokens for pair in used[step * job.rows : (step + 1) * job.rows]) for step in range(job.steps)]
    line = clock.line(tokens, losses=losses, norms=norms, peak=device.peak(), packages=packages, settings=settings)
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
