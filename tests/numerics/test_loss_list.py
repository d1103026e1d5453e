"""Thirty losses of a small run, committed: a change of any number on the way from rows to parameters shows here.

The run is a tiny llama under LoRA with AdamW, cosine and clipping, in float32. Another machine, thread count or torch
may round otherwise, hence the tolerance of 1e-5; a mistake is larger. To renew the list after a change that is meant
to change numbers (say so in the commit), print it with

    OMP_NUM_THREADS=1 PYTHONPATH=.:src python tests/numerics/test_loss_list.py
"""

from __future__ import annotations

import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.schedules.cosine import Cosine
from luthier.train.loop import Cadence, Loop
from luthier.train.signals import StopRequest
from luthier.train.source import DataSource
from luthier.train.state import LoopState
from luthier.train.stepper import Stepper
from tests import forests
from tests.forests import Diary

LOSSES: list[float] = [
    5.5479791, 5.2730064, 5.0557374, 5.6213108, 5.1196114, 4.6053645,
    4.9838273, 4.8801548, 4.5050002, 4.0849686, 4.4971114, 4.2590036,
    3.9247026, 3.9690930, 3.9707283, 3.9712324, 3.8410598, 3.3885355,
    3.7374460, 3.9362443, 3.6398409, 3.4991767, 3.4749155, 3.6140800,
    3.4315663, 3.3224174, 3.5941967, 3.4494197, 3.4046208, 3.3909728,
]  # fmt: skip


def losses() -> list[float]:
    """The losses of the thirty steps."""
    views = forests.views(10, seed=6)
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach(LoRA(rank=4, alpha=8.0).attach(model.sites))
    optimizer = AdamW(learning_rate=1e-2, weight_decay=0.01)
    diary = Diary()
    loop = Loop(
        source=DataSource(views, SFT(), lengths=forests.lengths(views), seed=1, tokens=30),
        stepper=Stepper(model, attachment, SFT(), optimizer, micro_tokens=16),
        schedule=Cosine(warmup=0.1),
        cadence=Cadence(),
        recorder=diary,
        keeper=diary,
        stop=StopRequest(),
    )
    loop.run(LoopState(total_steps=30))
    found: list[float] = diary.values("step", "loss")
    return found


def test_thirty_losses() -> None:
    """Breaks when initialisation, order, masks, positions, the loss, the gradient or the step change at all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = losses()
    finally:
        torch.set_num_threads(threads)
    assert found == pytest.approx(LOSSES, rel=1e-5)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("LOSSES: list[float] = [\n" + "".join(f"    {loss:.7f},\n" for loss in losses()) + "]")
