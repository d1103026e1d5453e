"""TRL with PEFT as one process of `sft.py`. Runs in the peer's own virtual environment.

What is set beside the system's own settings: what makes the work equal (token ids, labels, order, learning rate, LoRA)
and what keeps the trainer from writing. All else stays at the documented defaults of SFTConfig, bfloat16 autocast
included. All weights are trained in float32 under that autocast: kept in bfloat16 alone, most of the steps of the norms
would be rounded away. QLoRA is bitsandbytes' NF4 with double quantization as TRL's documentation has it, with its paged
AdamW where there is a GPU: on a CPU bitsandbytes has no paged memory, and the default optimizer is used.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import peft
import torch
import transformers
import trl
import worker
from datasets import Dataset
from devices import Device
from hf_peer import Clock, batch_of, changed_since, copies, set_start
from probes import probe
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = ("bitsandbytes",)


class WatchedTrainer(trl.SFTTrainer):
    """Keeps the inputs of every step, to be counted and compared with the prepared ids afterwards."""

    def __init__(self, **settings: Any) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        super().__init__(**settings)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.batches.append({name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
        return super().training_step(model, inputs, *args, **kwargs)


def make_trainer(job: worker.Job, rows: list[worker.Row], clock: worker.StepClock, scratch: str) -> WatchedTrainer:
    """The trainer over the planned rows, with the prepared LoRA start."""
    order = [rows[row] for batch in worker.plan([len(row.ids) for row in rows], job) for row in batch]
    lora = peft.LoraConfig(
        r=worker.RANK, lora_alpha=worker.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # A CPU without bfloat16 products would imitate them under autocast, which takes minutes a step.
    native = {} if job.precision == "bfloat16" else {"bf16": False}
    paged = {"optim": "paged_adamw_32bit"} if job.work.packed and job.device == "cuda" else {}
    config = trl.SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=job.work.batch,
        max_steps=job.steps,
        max_length=job.work.longest,
        train_sampling_strategy="sequential",
        learning_rate=worker.LEARNING_RATE,
        lr_scheduler_type="constant",
        seed=job.seed,
        use_cpu=job.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(dict(job.settings) | native | paged),
    )
    weights = torch.float32 if job.work.method == "full" else getattr(torch, job.precision)
    trainer = WatchedTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=weights, **_packed(job)),
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in order]),
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
        callbacks=[Clock(clock)],
        peft_config=lora if job.work.method == "lora" else None,
    )
    if job.work.method == "lora":
        set_start(trainer.model, job.folder / "lora.safetensors")
    return trainer


def _packed(job: worker.Job) -> dict[str, Any]:
    """What makes of the frozen weights four bits, where the workload wants that."""
    if not job.work.packed:
        return {}
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, job.precision),
    )
    return {"quantization_config": nf4}


def main() -> int:
    job = worker.job_from_arguments()
    device = Device(job.device)
    clock = worker.StepClock(job, device.settle)
    before = probe(job.precision, device, widest=job.widest)
    peak_is_fresh = device.forget_peak()
    rows = worker.read_rows(job)
    with tempfile.TemporaryDirectory(dir=job.home) as scratch:
        trainer = make_trainer(job, rows, clock, scratch)
        at_start = copies(trainer.model)
        trainer.train()
    peak = device.peak()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    worker.print_line(
        worker.result_line(
            job,
            clock=clock,
            counted=worker.count(job, rows, [batch_of(inputs) for inputs in trainer.batches]),
            losses=[entry["loss"] for entry in log],
            grad_norms=[float(entry["grad_norm"]) for entry in log],
            parameters=changed_since(at_start, trainer.model),
            probes={"before": before, "after": probe(job.precision, device, widest=job.widest)},
            peak=peak | {"peak_excludes_probes": peak_is_fresh},
            machine=device.machine(),
            packages=("torch", "transformers", "trl", "peft", "accelerate", "datasets", *BITS[: job.work.packed]),
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
