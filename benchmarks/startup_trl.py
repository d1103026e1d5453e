"""TRL with PEFT to the end of its first step, for `startup.py`. Runs in the peer's own virtual environment.

One row a step, LoRA of rank 16 on all linear layers, the documented defaults of SFTConfig otherwise. Rows are read and
tokenised through the peer's own caches, which an earlier process has filled. Prints when the first step had ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Remembers when the first step ended, as a Unix time."""

    ended = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended = self.ended or time.time()


def main() -> int:
    parser = argparse.ArgumentParser(description="A process of startup.py; run that instead.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], required=True)
    args = parser.parse_args()
    clock = Clock()
    rows = load_dataset("json", data_files=str(args.folder / "rows.jsonl"), split="train")
    rows = rows.select_columns(["prompt", "completion"])
    with tempfile.TemporaryDirectory() as scratch:
        # A CPU without bfloat16 products would imitate them under autocast, which takes minutes a step.
        native = {} if args.precision == "bfloat16" else {"bf16": False}
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=getattr(torch, args.precision)),
            args=trl.SFTConfig(
                output_dir=scratch, per_device_train_batch_size=1, max_steps=1, use_cpu=True, save_strategy="no",
                report_to="none", disable_tqdm=True, **native,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(args.folder / "model"),
            callbacks=[clock],
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
    print(json.dumps({"first_step_at": clock.ended}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
