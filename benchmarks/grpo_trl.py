"""TRL's GRPO with PEFT's LoRA as one process of `preference.py`. Runs in the peer's own virtual environment.

What is set beside the system's own settings makes the work equal (LoRA, learning rate, sizes, lengths) and keeps the
trainer from writing; all else is at GRPOConfig's defaults. Prompts are given as text, which it makes tokens again.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import trl
from datasets import Dataset
from hf_peer import Clock as Ended
from hf_peer import set_start
from preference_work import GROUP, NEW, Clock, Job, prompts, vowels
from transformers import AutoTokenizer
from trl_peer import SAME, lora, model_of, run


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
        **SAME,
        **job.settings,
    )
    made = Timed(
        clock,
        model=model_of(job),
        reward_funcs=rewarded,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(ids)} for ids in prompts(job)]),
        processing_class=tokenizer,
        callbacks=[Ended(clock)],
        peft_config=lora(),
    )
    set_start(made.model, job.folder / "lora.safetensors")
    return made


if __name__ == "__main__":
    sys.exit(run(trainer_of, lambda job, trainer: trainer.tokens))
