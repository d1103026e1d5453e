"""The numbers that the first step of every system has to show: the same rows in float32, computed twice.

luthier's own engine gives loss and gradient norm; transformers' own forward pass, one row at a time, has to agree with
the loss, so that an error of our engine cannot be its own judge. Where the workload packs weights, both compute in
float32 with the numbers that the packed ones stand for.
"""

from __future__ import annotations

import sys

import sft_luthier
import torch
import torch.nn.functional as F
import worker
from torch import nn
from transformers import AutoModelForCausalLM

from luthier.kernels.torch_backend import TorchBackend
from luthier.quantizers.nf4 import NF4

AGREEMENT = 1e-4


def main() -> int:
    job = worker.job_from_arguments()
    rows = worker.read_rows(job)
    chosen = worker.plan([len(row.ids) for row in rows], job)[0]
    _, stepper = sft_luthier.make(job, "float32")
    loss = stepper.forward_backward(sft_luthier.trees_of(rows, chosen)).loss
    norm = stepper.optim_step().grad_norm
    # Two copies of a model and its gradients need not fit.
    del stepper
    plain = plain_loss(job, [rows[index] for index in chosen])
    if abs(loss - plain) > AGREEMENT:
        raise SystemExit(f"the float32 reference is {loss:.6f} in luthier and {plain:.6f} in transformers")
    worker.print_line({"rows": chosen, "loss": loss, "transformers_loss": plain, "grad_norm": norm})
    return 0


@torch.no_grad()
def plain_loss(job: worker.Job, rows: list[worker.Row]) -> float:
    """The mean loss over all tokens with a label, row by row, without padding."""
    model = AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.float32).to(job.device)
    for module in model.modules() if job.work.packed else ():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.copy_(packed_and_back(module.weight))
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.ids], device=job.device)
        logits = model(ids).logits[0, row.prompt_tokens - 1 : -1]
        total += float(F.cross_entropy(logits, ids[0, row.prompt_tokens :], reduction="sum"))
    return total / sum(row.supervised for row in rows)


def packed_and_back(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that NF4 with double quantization keeps of a weight."""
    packing = NF4().pack(weight, TorchBackend())
    if packing is None:
        raise SystemExit("a weight was not packed")
    return packing.dense(torch.float32)


if __name__ == "__main__":
    sys.exit(main())
