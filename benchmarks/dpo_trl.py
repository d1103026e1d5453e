"""TRL's DPO with PEFT's LoRA as one process of `preference.py`. Runs in the peer's own virtual environment.

The rows are given as ids, as its collator takes them. What is set beside the system's own settings makes the work equal
(LoRA, beta, learning rate, order) and keeps the trainer from writing; all else is at DPOConfig's defaults.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from devices import Device
from hf_peer import set_start
from preference_work import ALPHA, BETA, LEARNING_RATE, RANK, Clock, Job, job_from_arguments, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class OfIds(trl.DPOTrainer):
    """Takes rows that are ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class Ended(TrainerCallback):
    """Tells the clock when a step has ended."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_ended()


def trainer_of(job: Job, clock: Clock, scratch: str) -> OfIds:
    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs(job)
    ]
    config = trl.DPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=job.rows,
        max_steps=job.steps,
        max_length=512,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **job.settings,
    )
    made = OfIds(
        model=AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.bfloat16),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
        callbacks=[Ended(clock)],
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    set_start(made.model, job.folder / "lora.safetensors")
    return made


def main() -> int:
    job = job_from_arguments()
    device, clock = Device("cpu"), Clock(job)
    device.forget_peak()
    with tempfile.TemporaryDirectory(dir=job.home) as scratch:
        trainer = trainer_of(job, clock, scratch)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    shown = {"gradient_checkpointing": trainer.args.gradient_checkpointing, "bf16": trainer.args.bf16}
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    used = pairs(job)
    tokens = [sum(pair.tokens for pair in used[step * job.rows : (step + 1) * job.rows]) for step in range(job.steps)]
    line = clock.line(tokens, losses=losses, peak=device.peak(), packages=packages, settings=shown)
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
