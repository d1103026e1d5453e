"""Inputs that lie in the host's memory: the same bits, however late the copies are, and two on the device at most."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from luthier.kernels.lanes import Lane, PlainLane
from luthier.model.running.far_inputs import UNDER_WAY, FarInputs
from tests import forests
from tests.lanes import LateLane
from tests.model.test_recompute import TREES, passed, stepper


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["lora", "full", "prefix_tuning"])
def test_no_bit_depends_on_where_inputs_lie(adapter: str, dtype: torch.dtype) -> None:
    """Breaks when an input is read before it has arrived, comes back as another block's, or dropout falls otherwise."""
    near = passed(stepper("llama", adapter, 2, dtype=dtype, micro_tokens=64), TREES)
    for lane in (PlainLane(), LateLane()):
        made = stepper("llama", adapter, 0, dtype=dtype, micro_tokens=64)
        made.model.recompute(2, lane=lane)
        report, gradients, left = passed(made, TREES)
        assert report == near[0] and torch.equal(left, near[2])
        assert gradients.keys() == near[1].keys()
        assert all(torch.equal(each, near[1][name]) for name, each in gradients.items())


def test_what_goes_out_is_the_input_of_each_block_and_nothing_else() -> None:
    """Breaks when the inside of a block goes to the host, or an input stays."""
    lane = LateLane()
    made = stepper("llama", "lora", 0, dtype=torch.float32, micro_tokens=4096)
    made.model.recompute(made.model.recomputable, lane=lane)
    trees = forests.rows(3)
    made.forward_backward(trees)
    each = sum(tree.token_count for tree in trees) * made.model.sites.hidden * 4
    assert lane.out_bytes == lane.back_bytes == each * made.model.recomputable
    assert not lane.begun, "every copy was waited for"
    with torch.no_grad():
        forests.engine_loss(made.model, trees)
    assert lane.out_bytes == each * made.model.recomputable, "nothing goes out where nothing comes back"


@pytest.mark.parametrize("lane", [PlainLane(), LateLane()], ids=["plain", "late"])
def test_two_inputs_are_on_the_device_at_most(lane: Lane) -> None:
    """Breaks when something keeps the tensors that went out, or all come back at once."""
    far, seen = FarInputs(lane), list[weakref.ref[Tensor]]()
    kept = []
    for number in range(6):
        x = torch.full((3, 4), float(number))
        seen.append(weakref.ref(x))
        kept.append(far.keep(x))
        del x
        assert sum(ref() is not None for ref in seen) <= UNDER_WAY
    assert kept == [0, 1, 2, 3, 4, 5]
    for number in reversed(kept):
        back = far.give(number)
        seen.append(weakref.ref(back))
        assert torch.equal(back, torch.full((3, 4), float(number)))
        coming = len(vars(far)["_coming"])
        del back
        assert coming <= 1 and sum(ref() is not None for ref in seen) == 0
    assert torch.equal(far.give(5), torch.full((3, 4), 5.0)), "a graph that is kept may ask again"
