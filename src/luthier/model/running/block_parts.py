"""The parts of a block of the common shape: its linear layers with what is on them, its norms, by the zoo's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from luthier.model.editing.edits import EditedModule
from luthier.model.editing.low_rank import Layer, low_rank_layers
from luthier.model.routes import Routes

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS: Final = ("q_norm", "k_norm")
FEEDS: Final = ("gate_proj", "up_proj", "down_proj")
NORMS: Final = ("input_layernorm", "post_attention_layernorm")


def attention_layers(attention: nn.Module, routes: Routes | None) -> tuple[Layer, ...] | None:
    """Queries, keys, values and output, or None when the zoo's own attention has to run."""
    if attention.training and dropout_of(attention):
        return None
    return low_rank_layers(attention, PROJECTIONS, routes)


def feed_layers(layer: nn.Module, routes: Routes | None) -> tuple[Layer, ...] | None:
    """Gate, up and down, or None when something is around them, or on them, that is no low-rank term."""
    feed = inner(layer, "mlp")
    if isinstance(feed, EditedModule):
        active = set(feed.edits) - feed.disabled if routes is None else feed.own(routes.every)
        if active:
            return None
        feed = feed.base
    return low_rank_layers(feed, FEEDS, routes)


def watchers(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """What holds the hooks of a module, which our operations would not call."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def norm_of(module: nn.Module) -> tuple[Tensor, float]:
    """The weight of a norm, and what it adds to the mean of the squares."""
    weight = module._parameters["weight"]
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no weight")
    return weight, float(vars(module)["variance_epsilon"])


def inner(module: nn.Module, name: str) -> nn.Module:
    """What `get_submodule` finds, straight from where it is kept: a step of a text asks a hundred times."""
    found = module._modules[name]
    if found is None:
        raise ValueError(f"{type(module).__name__} has no {name}")
    return found


def dropout_of(attention: nn.Module) -> float:
    """The share of attention weights that are dropped in training."""
    return float(vars(attention).get("attention_dropout") or 0.0)
