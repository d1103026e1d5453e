"""Linear layers with what adapters add to them, as products that `kernels/blocks.py` computes.

Of several adapters in one batch the thin factors stand side by side in one term, and each range of rows has its own
columns of it; so one operation has all of them, and the weight is multiplied once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.kernels.products import LowRankTerm, Product, Share
from luthier.model.edits import EditedModule, SiteEdit
from luthier.model.routes import Routes


@final
@dataclass(frozen=True)
class Layer:
    """A linear layer, and the low-rank terms on it by the names of their adapters."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    terms: Mapping[str, LowRankTerm]

    def product(self, routes: Routes | None) -> Product:
        """The layer over rows that are all alike, or that belong to adapters as `routes` say."""
        term = next(iter(self.terms.values()), None) if routes is None else _side_by_side(self.terms, routes)
        return Product(self.weight, self.bias, term)


def low_rank_layers(holder: nn.Module, names: Iterable[str], routes: Routes | None) -> tuple[Layer, ...] | None:
    """The linear layers `names` of a module, or None when something is on them that is no low-rank term.

    Without `routes` all edits count that are switched on, and there may be one at a layer; with them those of the
    adapters that have rows.
    """
    found = []
    for name in names:
        module = holder.get_submodule(name)
        terms: dict[str, LowRankTerm] = {}
        if isinstance(module, EditedModule):
            disabled = module.disabled
            active = {key: edit for key, edit in module.edits.items() if key not in disabled}
            if routes is not None:
                active = {key: edit for key, edit in active.items() if key in routes.names}
            elif len(active) > 1:
                return None
            for key, edit in active.items():
                term = edit.low_rank() if isinstance(edit, SiteEdit) else None
                if term is None:
                    return None
                terms[key] = term
            module = module.base
        found.append(Layer(module.get_parameter("weight"), module._parameters.get("bias"), terms))
    return tuple(found)


def _side_by_side(terms: Mapping[str, LowRankTerm], routes: Routes) -> LowRankTerm | None:
    here = {name: terms[name] for name in routes.names if name in terms}
    if not here:
        return None
    if len(routes.names) == 1:
        return here[routes.names[0]]
    columns, start = {}, 0
    for name, term in here.items():
        columns[name] = (start, start + len(term.down))
        start += len(term.down)
    shares = tuple(Share(run.start, run.stop, *columns[run.adapter]) for run in routes.runs if run.adapter in here)
    down = torch.cat([term.down for term in here.values()])
    up = torch.cat([term.up * term.scale for term in here.values()], 1)
    return LowRankTerm(down, up, 1.0, shares)
