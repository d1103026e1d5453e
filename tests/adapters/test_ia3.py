"""(IA)^3: its equation on outputs and inputs, and the files it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.adapters.ia3 import IA3, Rescale
from luthier.core.errors import RecipeError
from tests import forests


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_outputs_and_feed_forward_inputs_are_rescaled(architecture: str) -> None:
    """Breaks when a bias escapes the rescaling, or the feed-forward vector sits on the wrong side."""
    model = forests.language_model(architecture)
    bases = {site.name: site.module for site in model.sites.select("all-linear")}
    attachment = model.attach(IA3().attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    sides = set()
    for edit in attachment.edits:
        assert isinstance(edit, Rescale)
        base, vector = bases[edit.site_name], edit.vector
        x = torch.randn(3, model.sites.hidden if not edit.on_input else len(vector))
        expected = base(x * vector) if edit.on_input else base(x) * vector
        torch.testing.assert_close(model.module.get_submodule(edit.site_name)(x), expected)
        sides.add((edit.site_name.rpartition(".")[2], edit.on_input))
    names = {("c_attn", False), ("c_proj", True)} if architecture == "gpt2" else None
    assert sides == (names or {("k_proj", False), ("v_proj", False), ("down_proj", True)})


def test_a_site_named_twice_is_rescaled_on_its_input_only() -> None:
    """Breaks when a site gets two vectors under one name in the file."""
    model = forests.language_model("llama")
    method = IA3(targets=("k", "down"), feedforward=("down",))
    edits = method.attach(model.sites)
    assert len({edit.site_name for edit in edits if isinstance(edit, Rescale)}) == len(edits) == 4
    assert method.parameter_count(model.sites) == sum(p.numel() for edit in edits for p in edit.parameters())


def test_vectors_are_columns_on_outputs_and_rows_on_inputs() -> None:
    """Breaks when PEFT could not read the shapes."""
    sites = forests.language_model("llama").sites
    shapes = {}
    for edit in IA3().attach(sites):
        assert isinstance(edit, Rescale)
        shapes[edit.site_name.rpartition(".")[2]] = tuple(edit.tensors()["ia3_l"].shape)
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 48)}


@pytest.mark.parametrize(("targets", "feedforward", "count"), [(("v",), (), 2), ((), ("down",), 2)])
def test_either_side_may_be_empty(targets: tuple[str, ...], feedforward: tuple[str, ...], count: int) -> None:
    """Breaks when an empty list means everything."""
    sites = forests.language_model("llama").sites
    assert len(IA3(targets=targets, feedforward=feedforward).attach(sites)) == count


def test_a_config_comes_back_with_the_same_sites() -> None:
    """Breaks when the feed-forward sites come back as outputs."""
    sites = forests.language_model("llama").sites
    again = IA3.from_peft(IA3().peft_config(sites))
    assert again.parameter_count(sites) == IA3().parameter_count(sites)
    assert [type(edit) for edit in again.attach(sites)] == [type(edit) for edit in IA3().attach(sites)]
    assert [list(edit.state_dict()) for edit in again.attach(sites)] == [
        list(edit.state_dict()) for edit in IA3().attach(sites)
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
        {"target_modules": ["k_proj"], "feedforward_modules": [], "exclude_modules": ["x"]},
        {"target_modules": ".*k_proj", "feedforward_modules": []},
    ],
)
def test_a_file_that_computes_something_else_is_refused(config: dict[str, Any]) -> None:
    """Breaks when a setting we do not have is passed over in silence."""
    with pytest.raises(RecipeError):
        IA3.from_peft(config)


def test_a_target_without_a_match_is_an_error() -> None:
    """Breaks when a missing feed-forward site is passed over."""
    with pytest.raises(RecipeError, match="no site matches"):
        IA3(feedforward=("dwon",)).attach(forests.language_model("llama").sites)
