"""What only a GPU has: streams beside the work, recorded passes, attention by mask. Skipped where there is none.

`benchmarks/gpu_check.py` runs this file on one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.kernels.lanes import StreamLane
from luthier.model.language_model import LanguageModel
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.recipes.graphed import recorded
from luthier.train.stepper import Stepper
from tests import forests

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def made(*, lane: bool = False, recomputed: int = 0) -> Stepper:
    """A tiny llama on the GPU with LoRA on; it is the same for the same arguments."""
    module = forests.zoo("llama", dtype=torch.bfloat16).cuda()
    model = LanguageModel(module, source="tiny", digest="")
    torch.manual_seed(0)
    attachment = model.attach(LoRA(rank=4).attach(model.sites))
    way = StreamLane(torch.device("cuda")) if lane else None
    model.recompute(recomputed, lane=way)
    return Stepper(model, attachment, SFT(), AdamW(), micro_tokens=512, lane=way)


def test_kernels_run_the_model() -> None:
    """Breaks when a model on a GPU runs by plain torch, for whatever reason."""
    executor = made().model.executor
    assert executor.backend.name == "triton" and executor.blocks is not None, executor.reason


def test_what_lies_with_the_host_changes_no_step() -> None:
    """Breaks when a copy is read before it has arrived. AdamW of another processor rounds otherwise, so not to the bit.
    """
    near, far = made(), made(lane=True, recomputed=2)
    for step in range(3):
        expected, found = (each.forward_backward(forests.rows(6, seed=step)) for each in (near, far))
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        for each in (near, far):
            each.optim_step()
    assert all(master.device.type == "cpu" and master.is_pinned() for master in far.masters.values())
    for name, master in near.masters.items():
        torch.testing.assert_close(far.masters[name], master.cpu(), rtol=1e-3, atol=1e-4)


def test_a_recorded_pass_is_the_pass() -> None:
    """Breaks when a pass cannot be recorded, or texts of no tokens are not what flash attention takes them for."""
    near, graphed = made(), made()
    graphs = recorded(graphed.model, 512, alone=True)
    assert graphs is not None
    for step in range(4):
        trees = [tree for part in range(3) for tree in forests.rows(8, seed=3 * step + part, longest=30)]
        expected, found = near.forward_backward(trees), graphed.forward_backward(trees)
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        near.optim_step()
        graphed.optim_step()
    assert not graphs.refused and any(graphs.played.values())


def test_a_forest_goes_by_one_call_and_by_many() -> None:
    """Breaks when attention by mask is not that of each segment alone: shared prefixes, on the device."""
    model = made().model
    trees = [forests.branching(), *forests.rows(3)]
    one = forests.engine_loss(model, trees)
    model.executor = replace(model.executor, by_mask=None)
    assert forests.engine_loss(model, trees).item() == pytest.approx(one.item(), rel=1e-2)
