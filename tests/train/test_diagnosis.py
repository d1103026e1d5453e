"""Diagnosis: whatever is not finite is named, with the rows that lead to it, and nothing is left behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.editing.edits import base_parameters
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.diagnosis import BadNumber, find_bad_number
from luthier.train.stepper import Stepper
from tests import forests
from tests.tiny import VOCABULARY

MARK = VOCABULARY - 1
"""A token that only the guilty rows hold."""

GUILTY = (3, 9)
BAD = (math.nan, math.inf, -math.inf)


def marked(row: int, tree: Tree) -> Tree:
    """The tree with the mark in place of its second token, if the row is guilty; without any mark otherwise."""
    part = tree.segments[0]
    ids = np.where(part.tokens == MARK, 5, part.tokens).astype(np.int32)
    if row in GUILTY:
        ids[1] = MARK
    return Tree((Segment(ids, part.weights),), row=row)


TREES = [marked(tree.row, tree) for tree in forests.rows(12, seed=3, shortest=6, longest=14, ones=True)]
ALL = tuple(range(12))


class Rotten(Objective):
    """A loss that is bad for the guilty rows only, though all log-probabilities are fine."""

    def trees(self, view: Rendered) -> list[Tree]:
        raise NotImplementedError

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        factor = torch.where(torch.isin(outputs.rows, torch.tensor(GUILTY)), torch.tensor(math.inf), torch.tensor(1.0))
        return LossReport((outputs.log_probs * factor).sum(), forest.weight)


def stepper(adapter: Adapter | None = None, objective: Objective | None = None, *, micro_tokens: int = 40) -> Stepper:
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach((adapter or LoRA(rank=2)).attach(model.sites))
    if adapter is None:
        forests.shake(attachment.named_parameters().values())
    return Stepper(model, attachment, objective or SFT(), AdamW(), micro_tokens=micro_tokens)


def marks(made: Stepper) -> list[Tensor]:
    """A list that holds, after each forward pass, where the marks are in the flat batch."""
    seen: list[Tensor] = []

    def note(_module: object, given: tuple[Tensor, ...]) -> None:
        seen[:] = [given[0][0] == MARK]

    made.model.module.get_input_embeddings().register_forward_pre_hook(note)
    return seen


def spoil(made: Stepper, module: str, value: float, *, in_backward: bool = False) -> None:
    """Put `value` into what `module` gives out at the marks, or into the gradient that comes back to it there."""
    where = marks(made)

    def put(output: Tensor) -> Tensor:
        return torch.where(where[0][None, :, None], torch.tensor(value), output)

    def hook(_module: object, _given: object, output: Tensor) -> Tensor | None:
        if in_backward:
            output.register_hook(put)
            return None
        return put(output)

    made.model.module.get_submodule(module).register_forward_hook(hook)


def bad_step(made: Stepper) -> BadNumber:
    """A step as the loop makes it, and what is then found."""
    passed = made.forward_backward(TREES)
    if math.isfinite(passed.loss_sum):
        report = made.optim_step()
        assert not report.applied or report.broken
    else:
        made.zero_grad()
    return find_bad_number(made, TREES)


@pytest.mark.parametrize("value", BAD)
def test_an_activation_is_named_by_its_module_and_its_rows(value: float) -> None:
    """Breaks when a module behind the guilty one is named, or rows that merely shared its micro-batch."""
    made = stepper()
    spoil(made, "model.layers.1.mlp", value)
    found = bad_step(made)
    assert (found.what, found.tensor, found.rows) == ("activation", "model.layers.1.mlp", GUILTY)
    assert found.value == value or (math.isnan(value) and math.isnan(found.value))


def test_an_activation_inside_an_adapters_wrapping_keeps_the_modules_own_name() -> None:
    """Breaks when the name is one that only the attached model has."""
    made = stepper()
    spoil(made, "model.layers.0.self_attn.q_proj.base", math.nan)
    assert bad_step(made).tensor == "model.layers.0.self_attn.q_proj"


def test_a_log_probability_is_named_as_the_heads() -> None:
    """Breaks when the head, which runs as no module, is left out: the objective would be blamed."""
    made = stepper()
    real = made.model.token_outputs

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        found = real(forest)
        guilty = torch.isin(found.rows, torch.tensor(GUILTY))
        bad = torch.where(guilty, torch.tensor(-math.inf), found.log_probs)
        return TokenOutputs(bad, found.labels, found.weights, found.rows, found.trees)

    made.model.token_outputs = outputs  # type: ignore[method-assign]
    found = bad_step(made)
    assert (found.what, found.tensor, found.rows, found.value) == ("activation", "lm_head", GUILTY, -math.inf)


def test_a_loss_is_named_by_its_objective_and_its_rows() -> None:
    """Breaks when a loss that is bad by itself is put on some activation."""
    found = bad_step(stepper(objective=Rotten()))
    assert (found.what, found.rows, found.value) == ("loss", GUILTY, -math.inf)
    assert found.tensor == Rotten.method_name()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("adapter", [None, Full()], ids=["lora", "full"])
def test_a_gradient_is_named_by_the_first_parameter_it_reaches(adapter: Adapter | None, value: float) -> None:
    """Breaks when the loss is fine and the backward pass is not looked at, or the last parameter is named."""
    made = stepper(adapter)
    spoil(made, "model.layers.1.mlp", value, in_backward=True)
    found = bad_step(made)
    assert (found.what, found.rows) == ("gradient", GUILTY) and not math.isfinite(found.value)
    # The feed-forward's last product is the first to see it; with a block trained as a whole, it is one of its weights.
    assert found.tensor.startswith("model.layers.1") and "down_proj" in found.tensor


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("adapter", [None, Full()], ids=["lora", "full"])
def test_a_trained_weight_is_named_and_no_row_is_blamed(adapter: Adapter | None, value: float) -> None:
    """Breaks when rows are blamed for a weight that was bad before they came."""
    made = stepper(adapter)
    name = list(made.parameters)[3]
    with torch.no_grad():
        made.parameters[name].view(-1)[1] = value
    found = bad_step(made)
    assert (found.what, found.tensor, found.rows) == ("weight", name, ())
    assert found.value == value or (math.isnan(value) and math.isnan(found.value))


def test_a_base_weight_is_named_under_the_bases_own_name() -> None:
    """Breaks when only trained weights are looked at: a flipped bit in the base would be an activation."""
    made = stepper()
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        base_parameters(made.model.module)[name].view(-1)[7] = math.inf
    assert bad_step(made) == BadNumber("weight", name, (), math.inf)


def test_weights_that_an_update_has_broken_are_named() -> None:
    """Breaks when the diagnosis after an applied step looks at the rows first."""
    made = stepper()
    first = next(iter(made.masters))

    def step() -> None:
        made.masters[first].data.view(-1)[0] = -math.inf

    made.optimizer.step = step  # type: ignore[method-assign, assignment]
    assert bad_step(made) == BadNumber("weight", first, (), -math.inf)


def test_gradients_that_overflow_only_together_are_named() -> None:
    """Breaks when every row alone is finite and nothing is said at all."""
    made = stepper()
    spoil(made, "model.layers.1.mlp", 1e30, in_backward=True)
    found = bad_step(made)
    assert found.what == "gradient" and found.rows == ALL and found.tensor in made.parameters


def test_dropout_is_drawn_again_as_in_the_bad_step() -> None:
    """Breaks when the diagnosis draws other numbers: what only one mask brings out would not be seen again."""
    made = stepper(LoRA(rank=2, dropout=0.5))
    forests.shake(made.parameters.values())
    torch.manual_seed(11)
    expected = made.forward_backward(TREES).row_losses
    made.zero_grad()
    seen: list[float] = []
    real = made.model.token_outputs

    def outputs(forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        found = real(forest)
        seen.append(float(-(found.log_probs * found.weights).detach().sum()))
        return found

    made.model.token_outputs = outputs  # type: ignore[method-assign]
    assert find_bad_number(made, TREES).what == "unknown"
    assert math.fsum(seen) == pytest.approx(sum(loss for loss, _ in expected.values()), rel=1e-6)


def test_a_finite_step_is_unknown_and_names_all_rows() -> None:
    """Breaks when something is blamed because something must be."""
    made = stepper()
    made.forward_backward(TREES)
    found = find_bad_number(made, TREES)
    assert (found.what, found.tensor, found.rows) == ("unknown", "", ALL) and math.isnan(found.value)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool) -> None:
    """Breaks when a hook, a gradient, a mode or a drawn random number remains: the run would go on differently."""
    made = stepper(LoRA(rank=2, dropout=0.3))
    where = marks(made)
    made.forward_backward(TREES)
    made.model.train(training)
    hooks = _hooks(made)
    state = torch.get_rng_state()
    before = {name: each.detach().clone() for name, each in made.parameters.items()}
    find_bad_number(made, TREES)
    assert where and _hooks(made) == hooks
    assert torch.equal(torch.get_rng_state(), state) and made.model.module.training is training
    assert all(each.grad is None for each in made.parameters.values()) and made.pending_weight == 0
    assert all(torch.equal(each, before[name]) for name, each in made.parameters.items())
    assert torch.is_grad_enabled()


def _hooks(made: Stepper) -> list[Any]:
    modules = [(name, len(each._forward_hooks)) for name, each in made.model.module.named_modules()]
    return [*modules, *((name, len(each._backward_hooks or {})) for name, each in made.parameters.items())]
