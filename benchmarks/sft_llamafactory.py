"""LLaMA-Factory as one process of `sft.py`. Runs in the peer's own virtual environment.

Its training entry point is called in this process with the prepared ids and labels as a tokenised data set, in their
order, which it reads as documented (`tokenized_path`, `disable_shuffling`). What is set beside that is what makes the
work equal and what keeps it from reporting. It takes weights in the precision of the checkpoint; `pure_bf16` it refuses
on a CPU, `bf16` turns autocast on, as its examples for GPUs do. All weights are trained in float32.
"""

from __future__ import annotations

import importlib.machinery
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import transformers
import worker
from datasets import Dataset, DatasetDict
from devices import Device
from hf_peer import Clock, batch_of, changed_since, copies, set_start
from probes import probe


class Watch(transformers.TrainerCallback):
    """Sets the LoRA start before the first step and keeps what the result line needs; the trainer is never returned."""

    def __init__(self, job: worker.Job) -> None:
        self.job = job
        self.at_start: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.log: list[dict[str, float]] = []
        self.peak: dict[str, int | None] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if self.job.work.method == "lora":
            set_start(model, self.job.folder / "lora.safetensors")
        self.at_start = copies(model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        # Here, because the model is saved after this, which needs memory of its own.
        self.peak = Device(self.job.device).peak()
        self.parameters = changed_since(self.at_start, model)
        self.log = [entry for entry in state.log_history if "loss" in entry]
        # It has an argument of its own for this; that of the trainer says nothing.
        checkpointing = not self.job.settings.get("disable_gradient_checkpointing", False)
        self.settings = {
            "gradient_checkpointing": checkpointing,
            "bf16_autocast": args.bf16,
            "weights": str(next(model.parameters()).dtype).removeprefix("torch."),
            "grouped": self.job.grouped,
            "optimizer": str(args.optim.value),
            "attention": model.config._attn_implementation,
            "threads": torch.get_num_threads(),
        }


def watch_steps() -> list[dict[str, torch.Tensor]]:
    """The inputs of every step. LLaMA-Factory makes the trainer itself, so its base class is what can be watched."""
    seen: list[dict[str, torch.Tensor]] = []
    plain = transformers.Trainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append({name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
        return plain(self, model, inputs, *args, **kwargs)

    transformers.Trainer.training_step = watched
    return seen


def stand_in_for_torchaudio() -> None:
    """It imports torchaudio for text too, which has no build beside every torch; an empty module is enough."""
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", module)


def write_rows(job: worker.Job, rows: list[worker.Row], folder: Path) -> None:
    """The planned rows as the tokenised data set that it would write itself."""
    order = [rows[row] for batch in worker.plan([len(row.ids) for row in rows], job) for row in batch]
    items = [{"input_ids": row.ids, "attention_mask": [1] * len(row.ids), "labels": row.labels} for row in order]
    DatasetDict({"train": Dataset.from_list(items)}).save_to_disk(folder)


def model_folder(job: worker.Job, scratch: Path) -> Path:
    """The prepared model; a copy in float32 where products are to be made in it, as the checkpoint decides."""
    prepared, copy = job.folder / "model", scratch / "model"
    if job.precision == "bfloat16":
        return prepared
    transformers.AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32).save_pretrained(copy)
    transformers.AutoTokenizer.from_pretrained(prepared).save_pretrained(copy)
    return copy


def settings(job: worker.Job, model: Path, scratch: Path) -> dict[str, Any]:
    """The settings of a run, the system's own last."""
    native = {} if job.precision == "bfloat16" else {"bf16": False}
    lora = {"lora_rank": worker.RANK, "lora_alpha": worker.ALPHA, "lora_target": "all"}
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": job.work.method,
        **(lora if job.work.method == "lora" else {}),
        "template": "empty",
        "dataset": "prepared",
        "tokenized_path": str(scratch / "rows"),
        "disable_shuffling": True,
        "cutoff_len": job.work.longest,
        "output_dir": str(scratch / "out"),
        "per_device_train_batch_size": job.work.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": worker.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "seed": job.seed,
        "use_cpu": job.device == "cpu",
        "bf16": job.device == "cuda",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **job.settings,
        **native,
    }


def main() -> int:
    job = worker.job_from_arguments()
    device = Device(job.device)
    clock = worker.StepClock(job, device.settle)
    before = probe(job.precision, device, widest=job.widest)
    rows = worker.read_rows(job)
    stand_in_for_torchaudio()
    # Only now: importing it needs the stand-in.
    from llamafactory.train.tuner import run_exp

    watch, batches = Watch(job), watch_steps()
    with tempfile.TemporaryDirectory(dir=job.home) as scratch:
        write_rows(job, rows, Path(scratch) / "rows")
        model = model_folder(job, Path(scratch))
        peak_is_fresh = device.forget_peak()
        run_exp(settings(job, model, Path(scratch)), callbacks=[watch, Clock(clock)])
    worker.print_line(
        worker.result_line(
            job,
            clock=clock,
            counted=worker.count(job, rows, [batch_of(inputs) for inputs in batches]),
            losses=[entry["loss"] for entry in watch.log],
            grad_norms=[float(entry["grad_norm"]) for entry in watch.log],
            parameters=watch.parameters,
            probes={"before": before, "after": probe(job.precision, device, widest=job.widest)},
            peak=watch.peak | {"peak_excludes_probes": peak_is_fresh},
            machine=device.machine(),
            packages=("torch", "transformers", "llamafactory", "trl", "peft", "accelerate", "datasets"),
            settings=watch.settings,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
