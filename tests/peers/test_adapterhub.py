"""Bottleneck adapters against AdapterHub's own modules, with the names of its files.

The package `adapters` 1.3.0 asks for transformers 4.57 and cannot be imported beside a newer one. Its module of narrow
networks needs nothing of that: it is loaded alone here, where the package lies on the path (pip install --no-deps).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from luthier.adapters.bottleneck import Bottleneck, Narrow
from tests import forests

FOUND = importlib.util.find_spec("adapters")
CONFIGS = {"pfeiffer": "SeqBnConfig", "houlsby": "DoubleSeqBnConfig", "parallel": "ParBnConfig"}
pytestmark = pytest.mark.skipif(FOUND is None, reason="the package adapters is not on the path")


@pytest.fixture(name="hub")
def alone() -> Iterator[tuple[Any, Any]]:
    """AdapterHub's configurations and modules, without the rest of the package."""
    before = dict(sys.modules)
    home = Path(str(FOUND.origin)).parent if FOUND is not None else Path()
    for name in ("", ".methods", ".configuration"):
        part = ModuleType(f"adapters{name}")
        part.__path__ = [str(home / name.removeprefix("."))]
        sys.modules[part.__name__] = part
    for name, inside in (("utils", "resolve_adapter_config"), ("context", "ForwardContext")):
        stub = ModuleType(f"adapters.{name}")
        setattr(stub, inside, object)
        sys.modules[stub.__name__] = stub
    for name in ("adapter_config", "adapter_fusion_config"):
        found = importlib.import_module(f"adapters.configuration.{name}")
        vars(sys.modules["adapters.configuration"]).update(vars(found))
    yield importlib.import_module("adapters.configuration.adapter_config"), importlib.import_module(
        "adapters.methods.modeling"
    )
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] == "adapters":
            del sys.modules[name]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("preset", CONFIGS)
def test_it_computes_what_adapterhubs_module_does(hub: tuple[Any, Any], preset: Any, activation: Any) -> None:
    """Breaks when a bend, the factor or the place of a bias is another one, or a tensor has another name."""
    configs, modules = hub
    model, scale = forests.language_model("gpt2"), 4.0 if preset == "parallel" else 2.0
    method = Bottleneck(preset=preset, size=8, activation=activation, scale=scale)
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    edit = next(each for each in attachment.edits if isinstance(each, Narrow))
    config = getattr(configs, CONFIGS[preset])(reduction_factor=4, non_linearity=activation, scaling=scale)
    kind = "ParallelAdapter" if preset == "parallel" else "Adapter"
    other = getattr(modules, kind)("any", forests.HIDDEN, 8, config)
    other.load_state_dict(dict(edit.tensors()))
    x, y = torch.randn(2, 5, forests.HIDDEN), torch.randn(2, 5, forests.HIDDEN)
    expected = y + other(x, y)[0] if preset == "parallel" else other(y, y)[0]
    torch.testing.assert_close(edit.after(x, y), expected, rtol=0, atol=1e-6)
