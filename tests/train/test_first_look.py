"""The first look: the gradient of one row after another, and no trace in the run."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.core.errors import MemoryExhaustedError
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.first_look import look
from luthier.train.source import Cursor, DataSource
from luthier.train.stepper import Stepper
from tests import forests

VIEWS = forests.views(9, seed=5, shortest=4, longest=14)


def made(*, dtype: torch.dtype = torch.float32) -> tuple[Stepper, DataSource]:
    model = forests.language_model("llama", dtype=dtype)
    torch.manual_seed(0)
    attachment = model.attach(LoRA(rank=4, dropout=0.3).attach(model.sites))
    source = DataSource(VIEWS, SFT(), lengths=forests.lengths(VIEWS), seed=0, rows=2)
    return Stepper(model, attachment, SFT(), AdamW(learning_rate=1e-2), micro_tokens=40), source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_with_a_first_look_is_the_run_without_it(dtype: torch.dtype) -> None:
    """Breaks when a gradient, a random number, a row or a mode is used up."""
    (plain, plain_source), (stepper, source) = made(dtype=dtype), made(dtype=dtype)
    torch.manual_seed(3)
    stepper.model.train()
    state = torch.get_rng_state()
    assert len(list(look(stepper, source.first_rows(5)))) == 5
    assert torch.equal(torch.get_rng_state(), state) and source.cursor == Cursor()
    assert stepper.model.module.training and stepper.pending_weight == 0
    assert all(master.grad is None for master in stepper.masters.values())
    for one, its in ((plain, plain_source), (stepper, source)):
        torch.manual_seed(3)
        for _ in range(3):
            one.forward_backward(its.next_step())
            one.optim_step()
    assert all(torch.equal(value, plain.masters[name]) for name, value in stepper.masters.items())


def test_the_rows_are_the_first_of_the_run_each_alone() -> None:
    """Breaks when the look is at other rows than training sees first, or more than there are."""
    stepper, source = made()
    steps = [tree.row for _ in range(3) for tree in source.next_step()]
    assert [tree.row for trees in source.first_rows(5) for tree in trees] == steps[:5]
    assert len(list(source.first_rows(100))) == len(VIEWS)
    seen = []
    plain = stepper.passes

    def passes(forest):  # type: ignore[no-untyped-def]
        seen.append([tree.row for tree in forest.trees])
        return plain(forest)

    stepper.passes = passes  # type: ignore[method-assign]
    for _ in look(stepper, source.first_rows(4)):
        pass
    assert seen == [[row] for row in steps[:4]]


def test_a_row_that_does_not_fit_is_named_and_nothing_stays_behind() -> None:
    """Breaks when running out of memory is a traceback, or leaves the model in another mode."""
    stepper, source = made()
    stepper.model.train()

    def passes(forest):  # type: ignore[no-untyped-def]
        raise MemoryError("no more")

    stepper.passes = passes  # type: ignore[method-assign]
    row = next(source.first_rows(1))[0].row
    with pytest.raises(MemoryExhaustedError, match=f"row {row} alone .*first look"):
        list(look(stepper, source.first_rows(1)))
    assert stepper.model.module.training
