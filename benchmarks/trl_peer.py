"""What TRL's trainers share as processes of `preference.py`: one LoRA, the same silence, and the line at the end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Final

import peft
import torch
from devices import Device
from preference_work import ALPHA, LEARNING_RATE, RANK, Clock, Job, job_from_arguments
from transformers import AutoModelForCausalLM

SAME: Final[dict[str, Any]] = {
    "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "use_cpu": True, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
"""Settings that make the work equal and keep a trainer from writing."""
_PACKAGES: Final = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def model_of(job: Job) -> Any:
    """The model in the precision of the job's others."""
    return AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.bfloat16)


def lora() -> peft.LoraConfig:
    """The adapter that all systems train."""
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def run(
    trainer_of: Callable[[Job, Clock, str], Any], tokens_of: Callable[[Job, Any], Sequence[int]]
) -> int:
    """Train, and print the line of the process; `tokens_of` are the tokens of each step."""
    job = job_from_arguments()
    device, clock = Device("cpu"), Clock(job)
    device.forget_peak()
    with tempfile.TemporaryDirectory(dir=job.home) as scratch:
        trainer = trainer_of(job, clock, scratch)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, norms = [entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps]
    shown = {"gradient_checkpointing": trainer.args.gradient_checkpointing, "bf16": trainer.args.bf16}
    line = clock.line(
        list(tokens_of(job, trainer)), losses=losses, norms=norms, peak=device.peak(), packages=_PACKAGES,
        settings=shown,
    )  # fmt: skip
    print(json.dumps(line), flush=True)
    return 0
