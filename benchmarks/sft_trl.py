"""TRL with PEFT as one process of `sft.py`. Runs in the peer's own virtual environment.

What is set beside the system's own settings: what makes the work equal (rows, order, learning rate, LoRA) and what
keeps the trainer from writing. All else stays at the documented defaults of SFTConfig, bfloat16 autocast included.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import peft
import torch
import trl
import worker
from datasets import Dataset
from probes import probe
from procfs import forget_peak, peak_memory_bytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class WatchedTrainer(trl.SFTTrainer):
    """Keeps the inputs of every step, to be counted and compared with the prepared ids afterwards."""

    def __init__(self, **settings: Any) -> None:
        self.batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        super().__init__(**settings)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.batches.append((inputs["input_ids"], inputs["attention_mask"], inputs["labels"]))
        return super().training_step(model, inputs, *args, **kwargs)


class Clock(TrainerCallback):
    """Tells the step clock when a step has ended."""

    def __init__(self, clock: worker.StepClock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_ended()


def make_trainer(job: worker.Job, rows: list[worker.Row], clock: worker.StepClock, scratch: str) -> WatchedTrainer:
    """The trainer over the planned rows, with the prepared LoRA start."""
    order = [row for batch in worker.plan([len(row.ids) for row in rows], job) for row in batch]
    dataset = Dataset.from_list([{"prompt": rows[row].prompt, "completion": rows[row].completion} for row in order])
    lora = peft.LoraConfig(
        r=worker.RANK, lora_alpha=worker.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # A CPU without bfloat16 products would imitate them under autocast, which takes minutes a step.
    native = {} if job.precision == "bfloat16" else {"bf16": False}
    config = trl.SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        max_length=worker.MAX_TOKENS,
        train_sampling_strategy="sequential",
        learning_rate=worker.LEARNING_RATE,
        lr_scheduler_type="constant",
        seed=job.seed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(native | dict(job.settings)),
    )
    trainer = WatchedTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=getattr(torch, job.precision)),
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
        callbacks=[Clock(clock)],
        peft_config=lora if job.method == "lora" else None,
    )
    start = load_file(job.folder / "lora.safetensors") if job.method == "lora" else {}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            site, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
            if found:
                parameter.copy_(start.pop(site))
    if start:
        raise SystemExit(f"the peer has no LoRA at {sorted(start)[:3]}")
    return trainer


def count(job: worker.Job, rows: list[worker.Row], trainer: WatchedTrainer) -> list[worker.Counted]:
    """The positions of each step, after checking that it saw exactly the planned rows and labels."""
    planned = worker.plan([len(row.ids) for row in rows], job)
    counted = []
    for expected, (ids, mask, labels) in zip(planned, trainer.batches, strict=True):
        seen = [tuple(line[keep.bool()].tolist()) for line, keep in zip(ids, mask, strict=True)]
        supervised = int((labels != -100).sum())
        if seen != [rows[row].ids for row in expected] or supervised != sum(rows[row].supervised for row in expected):
            raise SystemExit("the peer trained on other tokens or labels than the prepared ones")
        attended = worker.pairs([rows[row] for row in expected])
        counted.append(worker.Counted(int(mask.sum()), supervised, ids.numel(), attended))
    return counted


def main() -> int:
    job = worker.job_from_arguments()
    clock = worker.StepClock(job)
    before = probe(job.precision)
    peak_is_fresh = forget_peak()
    rows = worker.read_rows(job.folder)
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        trainer = make_trainer(job, rows, clock, scratch)
        trained = {name: item for name, item in trainer.model.named_parameters() if item.requires_grad}
        at_start = {name: parameter.detach().clone() for name, parameter in trained.items()}
        trainer.train()
    peak = peak_memory_bytes()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    changed = sum(not torch.equal(at_start[name], parameter) for name, parameter in trained.items())
    worker.print_line(
        worker.result_line(
            job,
            clock=clock,
            counted=count(job, rows, trainer),
            losses=[entry["loss"] for entry in log],
            grad_norms=[float(entry["grad_norm"]) for entry in log],
            parameters={
                "tensors": len(trained),
                "changed": changed,
                "count": sum(item.numel() for item in trained.values()),
                "dtype": str(next(iter(trained.values())).dtype),
            },
            probes={"before": before, "after": probe(job.precision)},
            peak={"peak_memory_bytes": peak, "peak_excludes_probes": peak_is_fresh},
            packages=("torch", "transformers", "trl", "peft", "accelerate", "datasets"),
            settings={
                "gradient_checkpointing": trainer.args.gradient_checkpointing,
                "bf16_autocast": trainer.args.bf16,
                "grouped": job.grouped,
                "optimizer": str(trainer.args.optim.value),
                "attention": trainer.model.config._attn_implementation,
                "threads": torch.get_num_threads(),
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
