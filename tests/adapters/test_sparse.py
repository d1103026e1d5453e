"""Sparse tuning: which weights are chosen, the gradient at their places, and files that hold places exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from luthier.adapters.sparse import Choice, Places, Sparse
from luthier.core.chosen import choose
from luthier.core.errors import NumericError
from luthier.data.rendering.rendered import Rendered
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.quantizers import Quantizer
from luthier.recipes.opening.quantized import quantize
from luthier.train.first_look import look
from luthier.train.stepper import Stepper
from tests import forests


@pytest.mark.parametrize("choice", ["largest", "smallest", "random"])
def test_the_chosen_weights_are_those_that_were_asked_for(choice: Choice) -> None:
    """Breaks when size has a sign, the wrong end is taken, or a place is chosen twice."""
    model = forests.language_model("llama")
    method = Sparse(density=0.1, choice=choice)
    torch.manual_seed(0)
    for site, edit in zip(model.sites.select("all-linear"), method.attach(model.sites), strict=True):
        assert isinstance(edit, Places)
        sizes = site.weight().abs()
        chosen = torch.zeros(sizes.shape, dtype=torch.bool)
        chosen[edit.rows, edit.columns] = True
        assert int(chosen.sum()) == method.count(site) == len(edit.values)
        if choice == "largest":
            assert sizes[chosen].min() >= sizes[~chosen].max()
        if choice == "smallest":
            assert sizes[chosen].max() <= sizes[~chosen].min()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_output_and_gradient_are_those_of_the_dense_matrix(architecture: str) -> None:
    """Breaks when rows and columns are exchanged, or a gradient lands at another place."""
    model = forests.language_model(architecture)
    edit = Sparse(density=0.2).attach(model.sites)[0]
    assert isinstance(edit, Places)
    forests.shake([edit.values])
    x = torch.randn(2, 3, edit.shape[1], requires_grad=True)
    y = torch.randn(2, 3, edit.shape[0])
    dense = torch.zeros(edit.shape).index_put((edit.rows, edit.columns), edit.values)
    found, expected = edit.after(x, y), y + F.linear(x, dense)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    inputs = (x, edit.values)
    grads = [torch.autograd.grad(each.square().sum(), inputs) for each in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_at_least_one_weight_is_trained_and_the_config_comes_back() -> None:
    """Breaks when a tiny density trains nothing."""
    model = forests.language_model("llama")
    method = Sparse(density=1e-9, choice="random", targets=("q_proj",))
    assert method.parameter_count(model.sites) == len(model.sites.select(("q_proj",)))
    assert Sparse.from_peft(method.peft_config(model.sites)) == method


# -------------------------------------------------------------------------------------------- chosen by the gradient


def settled(
    architecture: str, method: Sparse, *, views: list[Rendered], fused: bool = True, quantizer: str = "none"
) -> tuple[Stepper, list[Places]]:
    """A model with the adapter on it that has looked at the rows, and its edits."""
    model = forests.language_model(architecture, fused=fused)
    quantize(model, choose("quantizers", Quantizer, quantizer))
    attachment = model.attach(method.attach(model.sites))
    stepper = Stepper(model, attachment, SFT(), AdamW(), micro_tokens=8)
    rows = [SFT().trees(view) for view in views[: method.first_look]]
    method.settle(attachment.edits, lambda: look(stepper, rows))
    return stepper, [edit for edit in attachment.edits if isinstance(edit, Places)]


def brute(architecture: str, choice: Choice, views: list[Rendered]) -> dict[str, torch.Tensor]:
    """The scores of all weights (out, in), from the zoo's own loss on one row after another."""
    model = forests.zoo(architecture, ours=False)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    conv = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for view in views:
        model.zero_grad()
        ids = torch.from_numpy(view.tokens.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(view.weights)[None] > 0, ids, -100)
        (model(input_ids=ids, labels=labels).loss * int((labels[0, 1:] >= 0).sum())).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            scores[name] += weight.grad.square() if choice == "fisher" else weight.grad
    return {name.removesuffix(".weight"): (s.t() if name in conv else s).abs() for name, s in scores.items()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("choice", ["gradient", "fisher"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_weights_of_the_largest_gradient_are_chosen(architecture: str, choice: Choice, fused: bool) -> None:
    """Breaks when rows are mixed before they are squared, a row is left out or counted twice, or a Conv1D is turned."""
    views = forests.views(5, seed=3, longest=14)
    method = Sparse(density=0.1, choice=choice, rows=4)
    stepper, edits = settled(architecture, method, views=views, fused=fused)
    scores = brute(architecture, choice, views[:4])
    for edit in edits:
        own = scores[edit.site_name]
        chosen = torch.zeros(edit.shape, dtype=torch.bool)
        chosen[edit.rows, edit.columns] = True
        assert int(chosen.sum()) == len(edit.values)
        # Nearly equal ones may change places in rounding.
        assert own[chosen].min() >= own[~chosen].max() * (1 - 1e-3), edit.site_name
        assert not edit.values.any() and edit.values.grad is None
    assert stepper.pending_weight == 0


def test_what_is_chosen_does_not_depend_on_how_much_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a second look sees other rows, or what the first one has chosen changes the gradient."""
    views, method = forests.views(4, seed=1), Sparse(density=0.05, choice="fisher", rows=4)
    _, once = settled("llama", method, views=views)
    looks = 0
    plain = Places.watch

    def watch(self: Places, *, squares: bool) -> None:
        nonlocal looks
        looks += 1
        assert sum(edit._seen is not None for edit in edits) == 0
        plain(self, squares=squares)

    monkeypatch.setattr("luthier.adapters.sparse.GRADIENT_BYTES", 1)
    edits: list[Places] = []
    model = forests.language_model("llama")
    attachment = model.attach(method.attach(model.sites))
    edits += [edit for edit in attachment.edits if isinstance(edit, Places)]
    monkeypatch.setattr(Places, "watch", watch)
    stepper = Stepper(model, attachment, SFT(), AdamW())
    method.settle(edits, lambda: look(stepper, [SFT().trees(view) for view in views]))
    assert looks == len(edits)
    for one, other in zip(once, edits, strict=True):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.columns, other.columns)


def test_a_packed_weight_is_chosen_from_too() -> None:
    """Breaks when the gradient of a weight needs the weight to be a parameter of its own."""
    views = forests.views(4, seed=1)
    _, edits = settled("llama", Sparse(density=0.05, choice="gradient", rows=4), views=views, quantizer="int8")
    assert all(int(edit.rows.max()) > 0 and len(edit.rows.unique()) > 1 for edit in edits)


def test_a_gradient_that_is_not_finite_chooses_nothing() -> None:
    """Breaks when places are chosen by NaN, which sorts as if it were the largest."""
    model = forests.language_model("llama")
    with torch.no_grad():
        model.module.get_parameter("model.norm.weight")[0] = torch.inf
    method = Sparse(choice="gradient", rows=1)
    attachment = model.attach(method.attach(model.sites))
    stepper = Stepper(model, attachment, SFT(), AdamW())
    with pytest.raises(NumericError, match="chooses no weights"):
        method.settle(attachment.edits, lambda: look(stepper, [SFT().trees(forests.views(1)[0])]))
