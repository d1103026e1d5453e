"""Sparse tuning: which weights are chosen, the gradient at their places, and files that hold places exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.adapters.sparse import Choice, Places, Sparse
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
