"""Whole blocks of a model in one call, when a few tokens are made.

Idea: what the kernels have to know of the weights is the same from token to token, so it is laid out once, for all
blocks. Before each pass it is looked up whether everything still stands where it stood: each module in its place, each
parameter, and its memory; if not, it is laid out anew. Low-rank terms of adapters go along. A block with anything else
on it goes by its operations, and the others around it still go in one call.
Cost: a lookup for each module and parameter in each pass, by functions of C alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_
from typing import Any, Final, Literal, final

from jaxtyping import Float
from torch import Tensor, nn

from luthier.kernels.backend import AddedTerms, Backend, Bare, BareBlock, Codes, TokenBlocks
from luthier.kernels.thin import ThinTerms
from luthier.kernels.thin_pass import ThinPass
from luthier.model.attending.attention import ForestPlan
from luthier.model.attending.kept import AttentionCall
from luthier.model.editing.edits import EditedModule, base_modules
from luthier.model.editing.low_rank import Layer
from luthier.model.packed import packing_of
from luthier.model.routes import Routes
from luthier.model.running.block_parts import (
    FEEDS,
    HEAD_NORMS,
    NORMS,
    PROJECTIONS,
    attention_layers,
    dropout_of,
    feed_layers,
    inner,
    norm_of,
    watchers,
)

Terms = tuple[ThinTerms | None, ...]
_NOTHING: Final[Terms] = (None,) * 7


@dataclass
class _Found:
    """What was found in a model: entries of dictionaries, and where tensors lie."""

    holders: list[Mapping[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    values: list[object] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    hooks: list[Mapping[int, Any]] = field(default_factory=list)
    own: list[Mapping[str, Any]] = field(default_factory=list)
    edited: bool = False
    """Whether a module that was looked for since this was last set to False had edits around it."""
    rows_apart: bool = True
    """Whether a row of the products with all weights is the same in any company of few."""

    @property
    def stands(self) -> bool:
        """Whether all of it is as it was."""
        # By functions of C alone: there are hundreds of entries in a small model.
        same = all(map(is_, map(dict.get, self.holders, self.names), self.values))  # type: ignore[arg-type]
        return same and not self.watched and list(map(Tensor.data_ptr, self.tensors)) == self.pointers

    @property
    def watched(self) -> bool:
        """Whether a module has a hook or a forward pass of somebody else, which our operations would not call."""
        return any(self.hooks) or any(map(dict.__contains__, self.own, repeat("forward")))  # type: ignore[arg-type]

    def look_at(self, module: nn.Module) -> None:
        """Note what would make `watched` true of a module."""
        self.hooks += watchers(module)
        self.own.append(vars(module))

    def module(self, holder: nn.Module, name: str) -> nn.Module:
        """The module of that name, without what is around it."""
        found = inner(holder, name)
        self._note(holder._modules, name, found)
        if not isinstance(found, EditedModule):
            return found
        self.edited = True
        return self.module(found, "base")

    def norm(self, module: nn.Module) -> tuple[Tensor, float]:
        """The weight of a norm, and its number."""
        weight, eps = norm_of(module)
        self._note(module._parameters, "weight", weight)
        self._lies(weight)
        return weight, eps

    def linear(self, module: nn.Module) -> Bare:
        """A linear layer, its weight as codes where it is kept so."""
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        if weight is None:
            raise ValueError(f"{type(module).__name__} has no weight")
        packing = packing_of(weight)
        codes = None if packing is None else packing.as_codes()
        own: Tensor | Codes = weight if codes is None else codes
        self.rows_apart = self.rows_apart and (weight.is_contiguous() if packing is None else packing.rows_apart)
        self._note(module._parameters, "weight", weight)
        self._note(module._parameters, "bias", bias)
        for tensor in codes.tensors if codes is not None else () if packing is not None else (weight,):
            self._lies(tensor)
        if bias is not None:
            self._lies(bias)
        return own, bias

    def _note(self, holder: Mapping[str, Any], name: str, value: object) -> None:
        self.holders.append(holder)
        self.names.append(name)
        self.values.append(value)

    def _lies(self, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        self.pointers.append(tensor.data_ptr())


@final
@dataclass(frozen=True)
class WholeBlocks:
    """The blocks of a model as they stand; of the `questioned` ones a pass has to ask what is on them."""

    layers: Sequence[nn.Module]
    questioned: Sequence[bool]
    blocks: TokenBlocks

    def through(
        self, index: int, x: Float[Tensor, "n d"], halves: tuple[Tensor, ...], plan: ForestPlan
    ) -> tuple[Float[Tensor, "n d"], int] | None:
        """What comes of as many blocks from `index` on as go in one call, and where they end; None where none does."""
        if plan.kept is None:
            return None
        terms: list[Terms] = []
        for layer, asked in zip(self.layers[index:], self.questioned[index:], strict=True):
            own = _terms_on(layer, plan, x) if asked else _NOTHING
            if own is None:
                break
            terms.append(own)
        stop = index + len(terms)
        thin = _laid_out(plan)
        some = thin is not None and any(own is not _NOTHING for own in terms)
        added = AddedTerms(tuple(terms), thin.rows) if thin is not None and some else None
        made = plan.kept.through(self.blocks, range(index, stop), x, (halves[0], halves[1]), added) if terms else None
        if made is None:
            return None
        plan.calls += len(terms)
        return made, stop


@final
class BlockKeeper:
    """Lays out the blocks of one model when they are asked for, and keeps them while they stand."""

    def __init__(self) -> None:
        self._found: _Found | None = None
        self._backend: Backend | None = None
        self._whole: WholeBlocks | None = None

    def over(
        self, layers: Sequence[nn.Module], calls: Mapping[int, AttentionCall], head_size: int, backend: Backend
    ) -> WholeBlocks | None:
        """The blocks of a model as they stand now; None where its backend has no shorter way than its operations, or
        somebody watches them."""
        if self._found is not None and self._backend is backend and self._found.stands:
            return self._whole
        found, blocks, questioned = _Found(), [], []
        for layer in layers:
            for each in base_modules(layer):
                found.look_at(each)
        if found.watched:
            return None
        for index, layer in enumerate(layers):
            found.edited = isinstance(layer, EditedModule)
            blocks.append(_bare_block(layer, calls[index], head_size, found))
            questioned.append(found.edited)
        made = backend.token_blocks(blocks)
        self._whole = None if made is None else WholeBlocks(tuple(layers), questioned, made)
        self._found, self._backend = found, backend
        return self._whole

    @property
    def keeps_rows_apart(self) -> bool:
        """Whether a row is the same in any company of few, in the blocks that were asked for last, as they stand."""
        return self._found is not None and self._found.rows_apart and self._found.stands


def _bare_block(layer: nn.Module, call: AttentionCall, head_size: int, found: _Found) -> BareBlock:
    """A block without what is on it."""
    bare = found.module(layer, "base") if isinstance(layer, EditedModule) else layer
    attention, feed = found.module(bare, "self_attn"), found.module(bare, "mlp")
    found.edited = found.edited or dropout_of(attention) > 0
    query, key, value, output = (found.linear(found.module(attention, name)) for name in PROJECTIONS)
    gate, up, down = (found.linear(found.module(feed, name)) for name in FEEDS)
    first, second = (found.norm(found.module(bare, name)) for name in NORMS)
    heads = [found.norm(found.module(attention, name)) for name in HEAD_NORMS if name in attention._modules]
    scale = head_size**-0.5 if call.scale is None else call.scale
    return BareBlock(
        (query, key, value, output, gate, up, down), (first, second), (heads[0], heads[1]) if heads else None,
        head_size, scale, call.window,
    )  # fmt: skip


def _laid_out(plan: ForestPlan) -> ThinPass | None:
    """The low-rank terms of a pass, as they are laid out."""
    if plan.routes is not None:
        return plan.routes.thin
    return None if plan.kept is None else plan.kept.laid_out


def _terms_on(layer: nn.Module, plan: ForestPlan, x: Float[Tensor, "n d"]) -> Terms | None:
    """The terms on the layers of a block; None where something else is on it."""
    attention = None if isinstance(layer, EditedModule) else inner(layer, "self_attn")
    if attention is None or isinstance(attention, EditedModule):
        return None
    around = [inner(layer, name) for name in NORMS] + [attention._modules.get(name) for name in HEAD_NORMS]
    outer, feeds = attention_layers(attention, plan.routes), feed_layers(layer, plan.routes)
    if outer is None or feeds is None or any(isinstance(each, EditedModule) for each in around):
        return None
    thin = _laid_out(plan)
    terms = tuple(_term_on(each, plan.routes, thin, x) for each in (*outer, *feeds))
    if "other" in terms:
        return None
    found = tuple(None if each == "other" else each for each in terms)
    return found if any(each is not None for each in found) else _NOTHING


def _term_on(
    layer: Layer, routes: Routes | None, thin: ThinPass | None, x: Float[Tensor, "n d"]
) -> ThinTerms | Literal["other"] | None:
    """The terms on a layer as they are laid out, or that something else is on it."""
    if layer.edited is None or (routes is None and not layer.terms):
        return None
    if thin is None or thin.dtype != x.dtype:
        return "other"
    site = layer.edited.site_name
    if routes is None:
        fine = all(name in thin.numbers and thin.has(site, name) for name in layer.terms)
    else:
        fine = not layer.terms and thin.only_terms(site)
    return thin.sites.get(site) if fine else "other"
