"""Linear layers with what adapters add to them, as products that `kernels/blocks.py` computes.

Of several adapters in one batch the thin factors stand side by side in one term, and each range of rows has its own
columns of it; so one operation has all of them, and the weight is multiplied once. In passes without gradients, where
rows are few and adapters may be many, terms that are kept for that (thin_terms.py) are added instead, and any other
edit works on its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.kernels.products import LowRankTerm, Product, Share
from luthier.model.editing.edits import EditedModule, SiteEdit
from luthier.model.routes import Routes


@final
@dataclass(frozen=True)
class Layer:
    """A linear layer and the low-rank terms on it by the names of their attachments, and what is `edited` at it."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    terms: Mapping[str, LowRankTerm]
    edited: EditedModule | None = None

    def product(self, routes: Routes | None) -> Product:
        """The layer over rows that are all alike, or that belong to adapters as `routes` say."""
        term = next(iter(self.terms.values()), None) if routes is None else _side_by_side(self.terms, routes)
        around = None
        if self.edited is not None and routes is not None and routes.thin is not None:
            around = self.edited.around(routes, routes.thin.dtype)
        return Product(self.weight, self.bias, term, around)


def low_rank_layers(holder: nn.Module, names: Iterable[str], routes: Routes | None) -> tuple[Layer, ...] | None:
    """The linear layers `names` of a module, or None when something is on them that a product cannot take.

    Without `routes` all edits count that are switched on, and there may be one at a layer; with them those of the
    adapters that have rows.
    """
    found = []
    for name in names:
        module = holder._modules[name]
        layer = _edited(module, routes) if isinstance(module, EditedModule) else _plain(module)
        if layer is None:
            return None
        found.append(layer)
    return tuple(found)


def _plain(module: nn.Module | None) -> Layer | None:
    # Straight from where a module keeps them: the ways to ask it take longer than a small product.
    weight = None if module is None else module._parameters["weight"]
    return None if module is None or weight is None else Layer(weight, module._parameters.get("bias"), {})


def _edited(module: EditedModule, routes: Routes | None) -> Layer | None:
    weight, bias = module.base.get_parameter("weight"), module.base._parameters.get("bias")
    if routes is not None and routes.thin is not None:
        return Layer(weight, bias, {}, module)
    if routes is None:
        disabled = module.disabled
        active = {key: edit for key, edit in module.edits.items() if key not in disabled}
        if len(active) > 1:
            return None
    else:
        active = {name: edit for name in routes.attachments for edit, _ in module.own(((name, 1.0),))}
    terms: dict[str, LowRankTerm] = {}
    for key, edit in active.items():
        term = edit.low_rank() if isinstance(edit, SiteEdit) else None
        if term is None:
            return None
        terms[key] = term
    return Layer(weight, bias, terms, module)


def _side_by_side(terms: Mapping[str, LowRankTerm], routes: Routes) -> LowRankTerm | None:
    """The terms of all rows as one. A mix has those of its parts, their second factors times its weights."""
    if not terms:
        return None
    own = {name: [(terms[part], weight) for part, weight in routes.parts(name) if part in terms]
           for name in routes.names}  # fmt: skip
    here = {name: parts for name, parts in own.items() if parts}
    if not here:
        return None
    if len(routes.names) == 1:
        ((term, weight), *others) = here[routes.names[0]]
        if not others:
            return replace(term, scale=term.scale * weight)
    columns, start = {}, 0
    for name, parts in here.items():
        stop = start + sum(len(term.down) for term, _ in parts)
        columns[name] = (start, stop)
        start = stop
    every = [each for parts in here.values() for each in parts]
    down = torch.cat([term.down for term, _ in every])
    up = torch.cat([term.up * (term.scale * weight) for term, weight in every], 1)
    if len(routes.names) == 1:
        return LowRankTerm(down, up, 1.0)
    shares = tuple(Share(run.start, run.stop, *columns[run.adapter]) for run in routes.runs if run.adapter in here)
    return LowRankTerm(down, up, 1.0, shares)
