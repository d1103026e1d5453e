"""TRL's GRPO with PEFT's LoRA as one process of `preference.py`. Runs in the peer's own virtual environment.

What is set beside the system's own settings makes the work equal (LoRA, learning rate, sizes, lengths) and keeps the
trainer from writing; all else is at GRPOConfig's defaults. Prompts are given as text, which it makes tokens again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from devices import Device
from dpo_trl import Ended
from hf_peer import set_start
from preference_work import ALPHA, GROUP, LEARNING_RATE, NEW, RANK, Clock, Job, job_from_arguments, prompts, vowels
from transformers import AutoModelForCausalLM, AutoTokenizer


class Timed(trl.GRPOTrainer):
    """Tells how long it samples, and how many tokens."""

    def __init__(self, clock: Clock, **given: Any) -> None:
        self.clock = clock
        self.tokens: list[int] = []
        super().__init__(**given)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super()._generate_single_turn(*args, **kwargs)
        self.clock.sampled.append(time.perf_counter() - began)
        return found

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_and_score_completions(*args, **kwargs)
        self.tokens.append(int(found["completion_mask"].sum()))
        return found


def rewarded(completions: list[str], **columns: Any) -> list[float]:
    return [vowels(text) for text in completions]


def trainer_of(job: Job, clock: Clock, scratch: str) -> Timed:
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "model")
    config = trl.GRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=job.rows * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        max_steps=job.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **job.settings,
    )
    made = Timed(
        clock,
        model=AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.bfloat16),
        reward_funcs=rewarded,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(ids)} for ids in prompts(job)]),
        processing_class=tokenizer,
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
    line = clock.line(trainer.tokens, losses=losses, peak=device.peak(), packages=packages, settings=shown)
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
