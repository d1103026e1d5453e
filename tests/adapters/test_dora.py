"""DoRA: the equation on a plain layer, the constant norm, and merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.adapters.dora import Directed, DoRA
from luthier.core.errors import RecipeError
from tests import forests

IDS = np.array([5, 17, 90, 3, 44, 71], dtype=np.int32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_site_is_the_equation_and_its_gradient(architecture: str) -> None:
    """Breaks when columns are normed for rows, a bias is scaled, or the gradient goes through the norm."""
    model = forests.language_model(architecture)
    edits = [edit for edit in DoRA(rank=3, alpha=5.0).attach(model.sites) if isinstance(edit, Directed)]
    forests.shake(parameter for edit in edits for parameter in edit.parameters())
    edit = edits[0]
    weight, bias = edit.site.weight(), edit.site.bias
    x = torch.randn(4, edit.site.in_features, generator=torch.Generator().manual_seed(0))
    found = edit.after(x, F.linear(x, weight, bias))
    scale = 5.0 / 3
    turned = weight + scale * (edit.up @ edit.down)
    ratio = edit.length / turned.norm(dim=1).detach()
    expected = F.linear(x, turned * ratio[:, None], bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = [edit.down, edit.up, edit.length]
    grads = [torch.autograd.grad(each.square().sum(), parameters) for each in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert forests.relative_error(ours, theirs) <= 1e-4


def test_the_lengths_start_as_those_of_the_rows() -> None:
    """Breaks when the start is not the base model."""
    model = forests.language_model("llama")
    for edit in DoRA(rank=3).attach(model.sites):
        assert isinstance(edit, Directed)
        torch.testing.assert_close(edit.length.detach(), edit.site.weight().norm(dim=1), rtol=1e-6, atol=1e-7)


def test_what_its_file_may_not_say() -> None:
    """Breaks when a setting that computes something else is passed over, or LoRA reads a DoRA file."""
    model = forests.language_model("llama")
    method = DoRA(rank=4, alpha=8.0, rslora=True, targets=("q_proj",))
    config = {"peft_type": "LORA", **method.peft_config(model.sites)}
    assert DoRA.from_peft(config) == method and DoRA.describes(config)
    assert not DoRA.describes({**config, "use_dora": False})
    for key, value in (("lora_dropout", 0.1), ("modules_to_save", ["lm_head"]), ("bias", "all")):
        with pytest.raises(RecipeError, match="the DoRA file"):
            DoRA.from_peft({**config, key: value})
    with pytest.raises(RecipeError, match="weights were changed"):
        DoRA.from_peft({**config, "init_lora_weights": "pissa"})
