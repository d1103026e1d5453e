"""Masters at the end of a lane: the same steps to the bit, little on the device, and resumed from either side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.kernels.lanes import Lane, PlainLane
from luthier.optimizers import Optimizer
from luthier.train.state import LoopState, load_state, take_snapshot
from luthier.train.stepper import Stepper
from tests import forests
from tests.lanes import LateLane
from tests.train.test_in_backward import assert_same, made, trees

METHODS = catalog.names("optimizers")


def stepper(lane: Lane | None, *, method: str = "adamw", dtype: torch.dtype = torch.float32, **more: object) -> Stepper:
    chosen = choose("optimizers", Optimizer, {"method": method, "learning_rate": 1e-2})
    return made(chosen, dtype=dtype, lane=lane, max_grad_norm=1.0, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_the_host_is_the_step(method: str, adapter: str, dtype: torch.dtype) -> None:
    """Breaks when a gradient is added before it has arrived, a micro-batch is left out, or no weight goes back."""
    near = stepper(None, method=method, adapter=adapter, dtype=dtype, micro_tokens=16)
    late = stepper(LateLane(), method=method, adapter=adapter, dtype=dtype, micro_tokens=16)
    for step in range(3):
        for part in (forests.rows(4, seed=step), forests.rows(2, seed=step + 9)):
            assert late.forward_backward(part) == near.forward_backward(part)
        assert late.optim_step() == near.optim_step()
        assert_same(late, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_in_the_backward_pass_are_the_hosts_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a tensor is stepped where its master is not."""
    monkeypatch.setattr(type(choose("optimizers", Optimizer, "lion")), "steps_in_backward", property(lambda self: True))
    pair = [made(choose("optimizers", Optimizer, "lion"), dtype=dtype, lane=lane) for lane in (None, PlainLane())]
    for step in range(2):
        reports = [each.forward_backward(trees(step)) for each in pair]
        assert reports[0] == reports[1] and pair[0].optim_step() == pair[1].optim_step()
        assert_same(pair[1], pair[0])


def test_of_the_gradients_two_are_on_the_device() -> None:
    """Breaks when gradients gather on the device, or what a step needs is left there."""
    lane = LateLane()
    late, held = stepper(lane, adapter="full"), list[int]()

    def look(parameter: torch.Tensor) -> None:
        gradients = [each.grad for each in late.parameters.values() if each.grad is not None]
        held.append(len(gradients) + len(lane.begun))

    for parameter in late.parameters.values():
        parameter.register_post_accumulate_grad_hook(look)
    late.forward_backward(trees())
    assert len(held) == len(late.parameters) and max(held) == 1
    assert lane.out_bytes == sum(each.nbytes for each in late.parameters.values())
    assert all(each.grad is not None for each in late.masters.values()) and not lane.begun
    far = {each.untyped_storage().data_ptr() for each in late.masters.values()}
    assert not far & {each.untyped_storage().data_ptr() for each in late.parameters.values()}


def test_what_was_on_its_way_when_a_pass_failed_is_forgotten() -> None:
    """Breaks when half a pass is in the gradient of the next one."""
    near, late = stepper(None, adapter="full"), stepper(LateLane(), adapter="full")
    handle = next(iter(late.parameters.values())).register_hook(_fail)
    with pytest.raises(ArithmeticError):
        late.forward_backward(trees())
    handle.remove()
    late.zero_grad()
    assert late.forward_backward(trees(1)) == near.forward_backward(trees(1))
    assert late.optim_step() == near.optim_step()
    assert_same(late, near)


def _fail(gradient: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError


def test_a_micro_batch_alone_leaves_nothing_on_its_way() -> None:
    """Breaks when a diagnosis, which runs micro-batches one by one, looks at gradients that have not arrived."""
    near, late = stepper(None, adapter="full"), stepper(lane := LateLane(), adapter="full")
    for each in (near, late):
        for forest in each.micro_batches(trees()):
            list(each.passes(forest))
    assert not lane.begun
    for name, master in late.masters.items():
        expected = near.masters[name].grad
        assert master.grad is not None and expected is not None and torch.equal(master.grad, expected)


@pytest.mark.parametrize("lanes", [(LateLane, LateLane), (None, LateLane), (LateLane, None)],
                         ids=["far", "near to far", "far to near"])  # fmt: skip
def test_a_run_goes_on_from_its_checkpoint(lanes: tuple[type[LateLane] | None, ...], tmp_path: Path) -> None:
    """Breaks when a checkpoint depends on where its tensors lay, or a resumed run has masters of its own."""
    first, second = (stepper(None if lane is None else lane(), adapter="full", dtype=torch.bfloat16) for lane in lanes)
    first.forward_backward(trees(0))
    first.optim_step()
    take_snapshot(LoopState(step=1), first, {}).write(tmp_path)
    load_state(tmp_path, second)
    assert_same(second, first)
    for each in (first, second):
        each.forward_backward(trees(1))
        each.optim_step()
    assert_same(second, first)
