"""TRL's DPO with PEFT's LoRA as one process of `preference.py`. Runs in the peer's own virtual environment.

The rows are given as ids, as its collator takes them. What is set beside the system's own settings makes the work equal
(LoRA, beta, learning rate, order) and keeps the trainer from writing; all else is at DPOConfig's defaults.
"""

from __future__ import annotations

import sys
from typing import Any

import trl
from datasets import Dataset
from hf_peer import Clock as Ended
from hf_peer import set_start
from preference_work import BETA, Clock, Job, pairs
from transformers import AutoTokenizer
from trl_peer import SAME, lora, model_of, run


class OfIds(trl.DPOTrainer):
    """Takes rows that are ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


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
        train_sampling_strategy="sequential",
        **SAME,
        **job.settings,
    )
    made = OfIds(
        model=model_of(job),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
        callbacks=[Ended(clock)],
        peft_config=lora(),
    )
    set_start(made.model, job.folder / "lora.safetensors")
    return made


def tokens_of(job: Job, trainer: OfIds) -> list[int]:
    used = pairs(job)
    return [sum(pair.tokens for pair in used[step * job.rows : (step + 1) * job.rows]) for step in range(job.steps)]


if __name__ == "__main__":
    sys.exit(run(trainer_of, tokens_of))
