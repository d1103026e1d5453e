"""The rehearsal: it finds what does not fit before the first step, and leaves no trace in the run."""

from __future__ import annotations

import pytest
import torch

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.core.errors import MemoryExhaustedError
from luthier.data.forest import Forest
from luthier.model.running.outputs import TokenOutputs
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.rehearsal import rehearse
from luthier.train.source import Cursor, DataSource
from luthier.train.stepper import Stepper
from tests import forests

VIEWS = forests.views(24, seed=5, shortest=4, longest=14)
STEPS = 6


def bench(adapter: Adapter, *, dtype: torch.dtype = torch.float32) -> tuple[Stepper, DataSource]:
    model = forests.language_model("llama", dtype=dtype)
    torch.manual_seed(0)
    attachment = model.attach(adapter.attach(model.sites))
    source = DataSource(VIEWS, SFT(), lengths=forests.lengths(VIEWS), seed=0, tokens=80)
    return Stepper(model, attachment, SFT(), AdamW(learning_rate=1e-2), micro_tokens=40), source


def losses(made: Stepper, source: DataSource) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(made.forward_backward(source.next_step()).loss_sum)
        made.optim_step()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [LoRA(rank=4, dropout=0.3), Full()], ids=["lora", "full"])
def test_a_run_with_a_rehearsal_is_the_run_without_it(adapter: Adapter, dtype: torch.dtype) -> None:
    """Breaks when a gradient, a random number, a row or a mode is used up: resumed and unbroken runs would differ."""
    (plain, plain_source), (made, source) = bench(adapter, dtype=dtype), bench(adapter, dtype=dtype)
    torch.manual_seed(3)
    made.model.train(False)
    state = torch.get_rng_state()
    rehearsal = rehearse(made, source, STEPS)
    assert torch.equal(torch.get_rng_state(), state) and source.cursor == Cursor()
    assert not made.model.module.training and not made.optimizer.state and made.pending_weight == 0
    assert all(master.grad is None for master in made.masters.values())
    assert rehearsal.splits == () and made.micro_tokens == 40 and rehearsal.seconds > 0
    found = losses(made, source)
    torch.manual_seed(3)
    assert found == losses(plain, plain_source)
    assert all(torch.equal(master, plain.masters[name]) for name, master in made.masters.items())


def test_what_is_rehearsed_is_the_largest_of_the_run() -> None:
    """Breaks when some other step is tried: the largest one would come at step 9,000."""
    made, source = bench(LoRA(rank=4))
    tried: list[int] = []
    real = made.model.token_outputs

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        tried.append(forest.token_count)
        return real(forest)

    made.model.token_outputs = outputs  # type: ignore[method-assign]
    rehearsal = rehearse(made, source, STEPS)
    rehearsed = list(tried)
    losses(made, source)
    assert max(rehearsed) == max(tried) == rehearsal.tokens and rehearsal.rows >= 1


@pytest.mark.parametrize("largest", [39, 25, 14])
def test_what_does_not_fit_is_split_before_the_first_step(largest: int) -> None:
    """Breaks when a shortage in the rehearsal ends the run, or the smaller size is not kept."""
    made, source = bench(LoRA(rank=4))
    real = made.model.token_outputs

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        if forest.token_count > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(forest)

    made.model.token_outputs = outputs  # type: ignore[method-assign]
    rehearsal = rehearse(made, source, STEPS)
    assert rehearsal.splits and rehearsal.splits[-1].to_tokens == made.micro_tokens <= largest
    assert all(made.forward_backward(source.next_step()).splits == () for _ in range(STEPS))


def test_room_for_gradients_and_optimizer_is_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the first micro-batch of all is rehearsed, which has neither beside it."""
    made, source = bench(LoRA(rank=4))
    seen: list[bool] = []
    real = made.model.token_outputs

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        seen.append(all(master.grad is not None for master in made.masters.values()))
        return real(forest)

    made.model.token_outputs = outputs  # type: ignore[method-assign]
    rehearse(made, source, STEPS)
    assert seen[0]
    monkeypatch.setattr(AdamW, "resident_bytes", lambda self, shapes: 10**18)
    with pytest.raises(MemoryExhaustedError, match="optimizer's state"):
        rehearse(made, source, STEPS)
    # Its state is there already after a step, and is not taken twice.
    made.forward_backward(source.next_step())
    made.optim_step()
    rehearse(made, source, STEPS)


def test_a_row_that_never_fits_ends_it_at_once() -> None:
    """Breaks when the rehearsal goes on to the first step with a row that cannot be trained on."""
    made, source = bench(LoRA(rank=4))

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        raise MemoryError

    made.model.token_outputs = outputs  # type: ignore[method-assign]
    state = torch.get_rng_state()
    with pytest.raises(MemoryExhaustedError, match=r"row \d+ alone \(14 tokens\)"):
        rehearse(made, source, STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(master.grad is None for master in made.masters.values())


def test_a_loss_that_is_not_finite_is_left_to_the_step() -> None:
    """Breaks when the rehearsal reports a bad number, which the step itself reports with its rows."""
    made, source = bench(LoRA(rank=4))
    with torch.no_grad():
        next(iter(made.parameters.values()))[0] = float("nan")
    assert rehearse(made, source, STEPS).splits == ()
