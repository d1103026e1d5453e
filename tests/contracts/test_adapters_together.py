"""Every adapter of the catalog in one batch with all others, with weights, and with rows of the base: each as alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.data.forest import Forest, Span, Tree
from luthier.model.attending.attention import ForestPlan
from luthier.model.language_model import LanguageModel
from luthier.model.running.executor import flat_hidden
from tests import forests

ARCHITECTURES = ["llama", "gpt2", "mistral", "gemma2"]
"""The common block, fused products with learned positions, and two with a sliding window."""
WEIGHT = 0.75


def methods() -> dict[str, Adapter]:
    """Those that can stand beside each other, by their names."""
    every = {name: choose("adapters", Adapter, name) for name in catalog.names("adapters")}
    return {name: each for name, each in every.items() if "trains-base" not in each.provides}


def put(model: LanguageModel, name: str) -> LanguageModel:
    torch.manual_seed(len(name))
    attachment = model.attach(methods()[name].attach(model.sites), name=name, named_only=True)
    forests.shake(attachment.named_parameters().values(), seed=len(name), std=0.1)
    return model


def mix(model: LanguageModel, name: str) -> LanguageModel:
    """Its scaled form, or, where it has a root, its root with something else that is scaled."""
    if model.attachments[name].root is None:
        model.mix(f"{name} scaled", [(name, WEIGHT)])
        return model
    if "ia3" not in model.attachments:
        put(model, "ia3")
    model.mix(f"{name} scaled", [("ia3", WEIGHT), (name, 1.0)])
    return model


@cache
def everyone(architecture: str) -> LanguageModel:
    """A model with all of them on it, for rows that name them."""
    model = forests.language_model(architecture)
    for name in methods():
        put(model, name)
    for name in methods():
        mix(model, name)
    model.mix("the base", [])
    return model


def names() -> list[str]:
    return [*methods(), *(f"{name} scaled" for name in methods()), "the base"]


def trees(name: str) -> Iterator[Tree]:
    for tree in (*forests.rows(2, seed=len(name)), forests.branching(seed=len(name))):
        yield replace(tree, adapter=name)


def alone(architecture: str, name: str) -> LanguageModel:
    """A model that has never seen any other adapter."""
    model = forests.language_model(architecture)
    if name == "the base":
        model.mix(name, [])
        return model
    put(model, name.removesuffix(" scaled"))
    return mix(model, name.removesuffix(" scaled")) if name.endswith(" scaled") else model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_adapters_and_mixes_in_one_batch_are_each_as_alone(architecture: str) -> None:
    """Breaks when a method leaves its rows, is not scaled as a mix promises, or has a root that others see."""
    turns = zip(*(trees(name) for name in names()), strict=True)
    batch = [tree for turn in turns for tree in turn]
    found = everyone(architecture).token_outputs(Forest(tuple(batch)))
    for name in names():
        own = torch.tensor([batch[tree].adapter == name for tree in found.trees.tolist()])
        expected = alone(architecture, name).token_outputs(Forest(tuple(trees(name)))).log_probs
        close(found.log_probs[own].detach(), expected.detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_in_passes_without_gradients_too_and_beside_rows_of_nobody(architecture: str) -> None:
    """Breaks when terms that are added at once differ from those that are added one by one, for any method."""

    def states(model: LanguageModel, rows: list[str]) -> list[Tensor]:
        texts = [forests.tokens(np.random.default_rng(len(name)), 3 + len(name) % 5) for name in rows]
        ends = np.cumsum([len(text) for text in texts]).tolist()
        spans = [Span(end - len(text), end, ()) for end, text in zip(ends, texts, strict=True)]
        routes = model.routes((name, len(text)) for name, text in zip(rows, texts, strict=True))
        plan = ForestPlan(spans=tuple(spans), routes=routes, row_routes=routes)
        tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
        places = torch.cat([torch.arange(len(text)) for text in texts])
        made = flat_hidden(model.module, tokens, places, plan, blocks=model.executor.blocks)
        return list(made.split([len(text) for text in texts]))

    every = [each for name in names() for each in ("", name)]
    for found, name in zip(states(everyone(architecture), every), every, strict=True):
        close(found, states(alone(architecture, name or "the base"), [name])[0])
