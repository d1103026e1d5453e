"""luthier as one process of `sft.py`: LoRA, QLoRA or full tuning of the prepared model, driven step by step."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
import worker
from devices import Device
from probes import probe
from safetensors.torch import load_file

from luthier.core import catalog
from luthier.data.forest import Tree, row_tree
from luthier.kernels.pool import bound_caches
from luthier.model.editing.attachment import Attachment
from luthier.model.load import Precision, load_model
from luthier.model.packed import packing_of, stored_bytes
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.optimizers.paged_adamw import PagedAdamW
from luthier.quantizers.nf4 import NF4
from luthier.recipes.graphed import recorded
from luthier.recipes.opening.quantized import quantize
from luthier.recipes.sizing.memory import use_pool
from luthier.train.stepper import Stepper

MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}
"""A GPU has the memory for more at once, and its products want it."""


def make(job: worker.Job, precision: Precision) -> tuple[Attachment, Stepper]:
    """What is trained (LoRA with the prepared start, or all weights), and the stepper, laid out as a run is."""
    model = load_model(str(job.folder / "model"), precision=precision, device=job.device)
    if job.work.packed:
        quantize(model, NF4())
    use_pool(model)
    torch.manual_seed(job.seed)
    lora = job.work.method == "lora"
    knobs = {"rank": worker.RANK, "alpha": float(worker.ALPHA)} if lora else {}
    attachment = model.attach(catalog.load("adapters", job.work.method)(**knobs).attach(model.sites))
    tensors = attachment.named_tensors()
    with torch.no_grad():
        for site, start in load_file(job.folder / "lora.safetensors").items() if lora else ():
            tensors[f"base_model.model.{site}.lora_A.weight"].copy_(start)
    optimizer = (PagedAdamW if job.work.packed else AdamW)(learning_rate=worker.LEARNING_RATE)
    micro_tokens = int(job.settings.get("micro_tokens", MICRO_TOKENS[job.device]))
    recorded(model, micro_tokens, alone=True)
    return attachment, Stepper(model, attachment, SFT(), optimizer, micro_tokens=micro_tokens)


def packed_bits(parameters: Sequence[torch.Tensor]) -> dict[str, float]:
    """Bits of a packed weight, by the bytes of its tensors; empty where none is."""
    packed = [parameter for parameter in parameters if packing_of(parameter) is not None]
    numbers = sum(parameter.numel() for parameter in packed)
    return {"bits_a_packed_weight": round(8 * sum(map(stored_bytes, packed)) / numbers, 4)} if packed else {}


def trees_of(rows: list[worker.Row], chosen: list[int]) -> list[Tree]:
    """One tree a row; the prompt has no weight."""
    trees = []
    for index in chosen:
        row = rows[index]
        weights = np.ones(len(row.ids), np.float32)
        weights[: row.prompt_tokens] = 0
        trees.append(row_tree(np.array(row.ids, np.int32), weights, row=index))
    return trees


def main() -> int:
    job = worker.job_from_arguments()
    bound_caches()
    device = Device(job.device)
    clock = worker.StepClock(job, device.settle)
    before = probe(job.precision, device, widest=job.widest)
    peak_is_fresh = device.forget_peak()
    rows = worker.read_rows(job)
    attachment, stepper = make(job, "bfloat16" if job.precision == "bfloat16" else "float32")
    blocks = stepper.model.executor.blocks
    graphs = None if blocks is None else blocks.graphs
    # What is trained are the float32 masters; in bfloat16 a few small steps may all be rounded away.
    at_start = {name: master.detach().clone() for name, master in stepper.masters.items()}
    losses, norms, counted = [], [], []
    for chosen in worker.plan([len(row.ids) for row in rows], job):
        report = stepper.forward_backward(trees_of(rows, chosen))
        step = stepper.optim_step()
        clock.step_ended()
        losses.append(report.loss)
        norms.append(step.grad_norm)
        real, attended = sum(len(rows[row].ids) for row in chosen), worker.pairs([rows[row] for row in chosen])
        counted.append(worker.Counted(real, report.trained_tokens, report.tokens, attended))
    peak = device.peak()
    changed = sum(not torch.equal(at_start[name], master) for name, master in stepper.masters.items())
    worker.print_line(
        worker.result_line(
            job,
            clock=clock,
            counted=counted,
            losses=losses,
            grad_norms=norms,
            parameters={"tensors": len(at_start), "changed": changed, "count": attachment.parameter_count},
            probes={"before": before, "after": probe(job.precision, device, widest=job.widest)},
            peak=peak | {"peak_excludes_probes": peak_is_fresh},
            machine=device.machine(),
            packages=("torch", "transformers", "safetensors"),
            settings={
                "micro_tokens": stepper.micro_tokens,
                "threads": torch.get_num_threads(),
                "optimizer": stepper.method.method_name(),
                **packed_bits([*stepper.model.module.parameters()]),
                **({} if graphs is None else {"recordings": graphs.told()}),
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
