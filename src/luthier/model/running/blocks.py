"""Blocks of a zoo model run by our own operations: the zoo's modules and weights, fewer passes and less kept.

Idea: most decoders of today have the same block: RMSNorm, projected and rotated queries and keys, attention, RMSNorm,
gated feed-forward. Where a model's modules have that shape, its weights go through `kernels/blocks.py`; whether that is
the same function is probed when the model is loaded, not assumed from its name. An edit that is a low-rank term, or
trains weights, is part of these operations. Any other edit, a hook, or dropout in the base sends its half of a block
through the zoo's own module, so that nothing anybody put on a module is passed over.
The last block's feed-forward, and the last norm, see only the rows that are asked for.
The first blocks may be recomputed: of such a block only its input is kept, and its inside is made again, bit for bit
and with the same random numbers, when the backward pass comes to it. The first, as by then all later ones are gone.
Source: the sub-module names and the forward pass of transformers' llama, which qwen2, qwen3, mistral and others share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from luthier.data.forest import Span
from luthier.kernels.backend import Backend, Seen
from luthier.kernels.blocks import added_product, gated_feed_forward, normed, normed_products, rotated
from luthier.kernels.causal import causal_attention
from luthier.kernels.halves import our_products
from luthier.kernels.lanes import Lane
from luthier.kernels.products import Product
from luthier.model.attending.attention import ForestPlan, forest_attention
from luthier.model.attending.kept import AttentionCall
from luthier.model.editing.edits import EditedModule, base_modules, routed
from luthier.model.editing.low_rank import Layer
from luthier.model.routes import Routes
from luthier.model.running.block_parts import (
    FEEDS,
    HEAD_NORMS,
    NORMS,
    PROJECTIONS,
    attention_layers,
    feed_layers,
    inner,
    norm_of,
    watchers,
)
from luthier.model.running.far_inputs import FarInputs
from luthier.model.running.graphs import Graphs, Pass
from luthier.model.running.own_lengths import short_length
from luthier.model.running.whole_blocks import BlockKeeper
from luthier.model.zoo import ZooModule

_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_BLOCK = {"self_attn", "mlp", *NORMS}


@final
@dataclass(frozen=True)
class Blocks:
    """The body of a model whose blocks have the common shape.

    `head_size` is the width of one attention head; `calls` says how each layer's attention is called; `backend` does
    what lies between the products. The first `recomputed` blocks keep nothing but their input for the backward pass,
    in the host's memory where there is a `lane` to it. `graphs` play a recorded pass again, where they take it.
    """

    body: nn.Module
    head_size: int
    calls: Mapping[int, AttentionCall]
    backend: Backend
    recomputed: int = 0
    lane: Lane | None = None
    graphs: Graphs | None = None
    keeper: BlockKeeper = field(default_factory=BlockKeeper, compare=False)

    @classmethod
    def of(cls, module: ZooModule, calls: Mapping[int, AttentionCall], backend: Backend) -> Blocks | None:
        """The blocks of a model as it was loaded, or None when its modules have another shape."""
        body = module.base_model
        if not isinstance(body, nn.Module) or _names(body) != _BODY:
            return None
        layers = list(body.get_submodule("layers").children())
        if not layers or not all(_has_the_shape(layer) for layer in layers) or not _is_rmsnorm_of(body.norm):
            return None
        if set(calls) != set(range(len(layers))) or any(call.softcap is not None for call in calls.values()):
            return None
        return cls(body, int(layers[0].self_attn.head_dim), calls, backend)  # type: ignore[union-attr, arg-type]

    @property
    def taken(self) -> tuple[bool, bool]:
        """Whether attention, and the feed-forward, of all of the blocks runs by our operations, as they stand now."""
        layers = list(self.body.get_submodule("layers").children())
        if _is_watched(self.body) or any(isinstance(layer, EditedModule) for layer in layers):
            return False, False
        attention = all(attention_layers(layer.get_submodule("self_attn"), None) is not None for layer in layers)
        return attention, all(feed_layers(layer, None) is not None for layer in layers)

    @property
    def take_everything(self) -> bool:
        """Whether all of the model's blocks run by our operations, as it stands now."""
        return all(self.taken)

    def keep_rows_apart(self, sites: Sequence[str], *, named: bool) -> bool:
        """Whether our operations run all of the blocks, with low-rank terms at these sites, so that a row is the same
        in any company of few. Of adapters that rows have not `named` the terms are the library's outside of one call.
        """
        layers = list(self.body.get_submodule("layers").children())
        there = all(site.rpartition(".")[2] in (*PROJECTIONS, *FEEDS) for site in sites)
        whole = self.keeper.over(layers, self.calls, self.head_size, self.backend)
        return there and self.keeper.keeps_rows_apart and (named or not sites or whole is not None)

    def hidden(
        self,
        tokens: Int[Tensor, " T"] | Float[Tensor, "T d"],
        positions: Int[Tensor, " T"],
        plan: ForestPlan,
        rows: Int[Tensor, " N"] | None,
    ) -> Float[Tensor, "N d"]:
        """The final hidden states of `rows`, all when it is None; `tokens` are ids, or their embeddings."""
        x = self._played(tokens, positions, plan)
        if x is None:
            x = self._states(tokens, positions, plan, rows)
        elif rows is not None:
            x = x.index_select(0, rows)
        last = self.body.get_submodule("norm")
        if _is_watched(last) or isinstance(last, EditedModule):
            with routed(last, plan.routes if rows is None else plan.row_routes):
                states: Tensor = last(x) if plan.routes is None else last(x[None])[0]
            return states
        return normed(x, *norm_of(last), self.backend)

    def _played(self, tokens: Tensor, positions: Int[Tensor, " T"], plan: ForestPlan) -> Float[Tensor, "T d"] | None:
        """The states of all tokens after the last block, by a pass that was recorded; None where there is none."""
        graphs = self.graphs
        if graphs is None or self.recomputed or not graphs.take(tokens, plan, self.calls) or not self.take_everything:
            return None
        if short_length(self.body) is not None:
            # Angles that go by the length of each text are no part of what is recorded.
            return None

        def states(tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
            whole = ForestPlan(spans=(Span(0, len(tokens), ()),))
            # Only the device knows how many texts the one span is.
            whole.seen = Seen((), starts=starts)
            return self._states(tokens, positions, whole, None)

        return graphs.states(tokens, positions, plan, Pass(self.body, states))

    def _states(
        self, tokens: Tensor, positions: Int[Tensor, " T"], plan: ForestPlan, rows: Int[Tensor, " N"] | None
    ) -> Float[Tensor, "N d"]:
        """The states after the last block."""
        body = self.body
        x = tokens
        if not tokens.is_floating_point():
            embed = body.get_submodule("embed_tokens")
            with routed(embed, plan.routes):
                x = embed(tokens[None])[0]
        angles = body.get_submodule("rotary_emb")(x[None], position_ids=positions[None])
        halves = tuple(angle[0, :, : self.head_size // 2].contiguous() for angle in angles)
        layers = list(body.get_submodule("layers").children())
        # Keys that somebody has asked for stay alive with all that they come from: nothing would be saved.
        recomputed = self.recomputed if torch.is_grad_enabled() and plan.captured is None else 0
        far = None if self.lane is None else FarInputs(self.lane)
        kept = plan.kept is not None and not torch.is_grad_enabled() and self.backend.few > 0
        whole = self.keeper.over(layers, self.calls, self.head_size, self.backend) if kept else None
        if whole is not None and len(x) > whole.blocks.most:
            whole = None
        # Of whole blocks it is known that nobody watches them; else all modules have to be asked.
        watched = whole is None and _is_watched(body)
        index = 0
        while index < len(layers):
            made = None if whole is None else whole.through(index, x, halves, plan)
            if made is not None:
                x, index = made
                x = x if index < len(layers) or rows is None else x.index_select(0, rows)
                continue
            wanted = rows if index == len(layers) - 1 else None
            block = partial(
                self._block, layers[index], angles=angles, halves=halves, plan=plan, rows=wanted, watched=watched
            )
            # The tensor is an argument of its own: it says of which device random numbers are put back.
            x = _made_again(block, x, far) if index < recomputed else block(x)
            index += 1
        return x

    def _block(
        self,
        layer: nn.Module,
        x: Float[Tensor, "T d"],
        angles: tuple[Tensor, Tensor],
        halves: tuple[Tensor, ...],
        plan: ForestPlan,
        rows: Int[Tensor, " N"] | None,
        *,
        watched: bool,
    ) -> Float[Tensor, "N d"]:
        if isinstance(layer, EditedModule) or watched:
            # What surrounds a block, or watches it, gets it as it is.
            with routed(layer, plan.routes), our_products(x, self.backend.product):
                out = layer(x[None], position_embeddings=angles, attention_mask=_untouched(x), forest_plan=plan)
            states: Tensor = (out if isinstance(out, Tensor) else out[0])[0]
            return states if rows is None else states.index_select(0, rows)
        attention, norm = inner(layer, "self_attn"), inner(layer, "input_layernorm")
        outer, feeds = attention_layers(attention, plan.routes), feed_layers(layer, plan.routes)
        routes = plan.routes
        if outer is None:
            with routed(attention, routes), our_products(x, self.backend.product):
                attended = attention(
                    hidden_states=norm(x[None]), position_embeddings=angles, attention_mask=_untouched(x),
                    forest_plan=plan,
                )  # fmt: skip
            x = x + attended[0][0]
        else:
            products = tuple(each.product(routes) for each in outer[:3])
            heads = self._attended(attention, norm, x, halves, plan, products)
            if rows is not None and feeds is not None:
                # Not before a module of the zoo: what it drops must not depend on who asks.
                x, heads, rows = x.index_select(0, rows), heads.index_select(0, rows), None
                routes = plan.row_routes
            x = added_product(x, heads, outer[3].product(routes), self.backend)
        x = self._fed_forward(layer, x, feeds, routes)
        return x if rows is None else x.index_select(0, rows)

    def _attended(
        self,
        attention: nn.Module,
        norm: nn.Module,
        x: Float[Tensor, "T d"],
        halves: tuple[Tensor, ...],
        plan: ForestPlan,
        products: tuple[Product, ...],
    ) -> Float[Tensor, "T q"]:
        """The heads' results side by side, before the output product."""
        weight, eps = norm_of(norm)
        heads = [y.unflatten(1, (-1, self.head_size)) for y in normed_products(x, weight, eps, products, self.backend)]
        query, key = heads[0], heads[1]
        if "q_norm" in attention._modules and "k_norm" in attention._modules:
            query, key = self._head_normed(attention, "q_norm", query), self._head_normed(attention, "k_norm", key)
        cosines, sines = halves
        query, key = (rotated(each, cosines, sines, self.backend) for each in (query, key))
        layer = int(attention.layer_idx)  # type: ignore[arg-type]
        call, value = self.calls[layer], heads[2]
        if plan.kept is not None:
            plan.calls += 1
            return plan.kept.attend(layer, query, key, value, call).flatten(1)
        near = call.window is None or plan.longest <= call.window
        if near and self.backend.attends(query, plan.seen):
            plan.calls += 1
            if plan.captured is not None:
                plan.captured[layer] = (key.transpose(0, 1)[None], value.transpose(0, 1)[None])
            if plan.outside:
                sides = zip(*plan.outer_keys(layer, key.dtype), strict=True)
                first, second = ([tensor[0].transpose(0, 1) for tensor in side] for side in sides)
                key, value = torch.cat([*first, key]), torch.cat([*second, value])
            runs = [(unit.count, unit.length) for unit in plan.units]
            scale = self.head_size**-0.5 if call.scale is None else call.scale
            return causal_attention(query, key, value, runs, scale, self.backend, seen=plan.seen).flatten(1)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        found, _ = forest_attention(
            attention, query, key, value, None, scaling=call.scale, sliding_window=call.window, forest_plan=plan
        )
        return found[0].flatten(1)

    def _head_normed(self, attention: nn.Module, name: str, heads: Float[Tensor, "T h _"]) -> Float[Tensor, "T h _"]:
        """Heads after the norm of each, by our operation where nothing is on it."""
        norm = inner(attention, name)
        if isinstance(norm, EditedModule):
            made: Tensor = norm(heads)
            return made
        return normed(heads.flatten(0, 1), *norm_of(norm), self.backend).view_as(heads)

    def _fed_forward(
        self, layer: nn.Module, x: Float[Tensor, "n d"], layers: tuple[Layer, ...] | None, routes: Routes | None
    ) -> Float[Tensor, "n d"]:
        norm, feed = inner(layer, "post_attention_layernorm"), inner(layer, "mlp")
        if layers is None:
            # As the zoo calls it, with a batch of one.
            with routed(feed, routes), our_products(x, self.backend.product):
                fed: Tensor = x + feed(norm(x[None]))[0]
            return fed
        weight, eps = norm_of(norm)
        gate, up, down = (each.product(routes) for each in layers)
        return gated_feed_forward(x, weight, eps, (gate, up, down), self.backend)


def _made_again(
    block: Callable[[Tensor], Tensor], x: Float[Tensor, "T d"], far: FarInputs | None
) -> Float[Tensor, "N d"]:
    """A block of which only the input is kept. Hooks of others do not reach inside, where nothing is kept."""
    with nullcontext() if far is None else saved_tensors_hooks(far.keep, far.give):
        made: Tensor = checkpoint(block, x, use_reentrant=False)
    return made


def _has_the_shape(layer: nn.Module) -> bool:
    if _names(layer) != _BLOCK:
        return False
    attention, feed = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if _names(attention) - set(HEAD_NORMS) != set(PROJECTIONS) or _names(feed) != {*FEEDS, "act_fn"}:
        return False
    if len(_names(attention) & set(HEAD_NORMS)) == 1:
        return False
    linear = [attention.get_submodule(name) for name in PROJECTIONS] + [feed.get_submodule(name) for name in FEEDS]
    norms = [layer.get_submodule(name) for name in NORMS]
    heads = [attention.get_submodule(name) for name in HEAD_NORMS if name in attention._modules]
    numbers = torch.linspace(-3, 3, 7)
    bends = feed.get_submodule("act_fn")(numbers)
    return (
        all(type(module) is nn.Linear for module in linear)
        and all(_is_rmsnorm_of(norm) for norm in [*norms, *heads])
        and all(norm.get_parameter("weight").numel() == attention.head_dim for norm in heads)
        and torch.equal(bends, F.silu(numbers))
    )


def _is_rmsnorm_of(module: object) -> bool:
    names = {name for name, _ in module.named_parameters()} if isinstance(module, nn.Module) else set()
    return names == {"weight"} and isinstance(vars(module).get("variance_epsilon"), float)


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_watched(body: nn.Module) -> bool:
    """Whether a module has a hook or a forward pass of somebody else, which our operations would not call."""
    return any(any(watchers(module)) or "forward" in vars(module) for module in base_modules(body))


def _untouched(x: Tensor) -> Tensor:
    # A 4-D mask is handed through untouched by every mask function of the zoo: nothing of size T x T is ever built.
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=x.device)
