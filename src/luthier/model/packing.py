"""Packing the weights of a model, and unpacking them for good."""

from __future__ import annotations

import torch
from torch import nn

from luthier.core.errors import RecipeError
from luthier.model.editing.sites import Site
from luthier.model.language_model import LanguageModel
from luthier.model.packed import Pack, PackedWeight, Packing, packing_of


@torch.no_grad()
def pack_weights(model: LanguageModel, pack: Pack, *, head: bool = False) -> int:
    """Pack the weight of every linear layer in the blocks, and with `head` of the output head; how many there were.

    A head that is the table of embeddings too gets a packed copy; the table stays as it is.
    Raises RecipeError when something is attached, or there is nothing to pack.
    """
    _require_bare(model)
    sites = packed_sites(model) + (model.sites.role("head") if head else [])
    if not sites:
        raise RecipeError(
            f"{model.source} has no linear layer in its blocks, so there is nothing to quantize",
            do="use quantizer none",
        )
    for site in sites:
        put_packing(site, pack(site.weight()), pack)
    return len(sites)


@torch.no_grad()
def unpack_weights(model: LanguageModel) -> int:
    """Make plain weights of all packed ones, with the numbers that those stand for; how many there were."""
    _require_bare(model)
    packed = [site for site in packed_sites(model) if packing_of(site.weight_parameter) is not None]
    for site in packed:
        dense = site.weight_parameter.clone()
        site.module.register_parameter("weight", nn.Parameter(dense.contiguous(), requires_grad=False))
    return len(packed)


@torch.no_grad()
def unpack_in_place(module: nn.Module) -> int:
    """The same below whatever is attached, for a merge that shall not pack again; how many there were."""
    packed = [each for each in module.modules() if isinstance(each._parameters.get("weight"), PackedWeight)]
    for each in packed:
        dense = each.get_parameter("weight").clone().contiguous()
        each.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
    return len(packed)


def packed_sites(model: LanguageModel) -> list[Site]:
    """The sites whose weights are packed: every linear layer in the blocks."""
    return [site for site in model.sites.linear() if site.layer is not None]


def put_packing(site: Site, packing: Packing, pack: Pack) -> None:
    """Let a packing stand where the weight of a site is."""
    weight = PackedWeight(packing, site.weight_parameter.dtype, pack, transposed=site.transposed)
    site.module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _require_bare(model: LanguageModel) -> None:
    if model.attachments:
        raise RecipeError(
            f"{', '.join(model.attachments)} is on the model, whose weights cannot be replaced then",
            do="pack or unpack first, then attach",
        )
