"""The cache: keys and values of all layers in pages, and attention over them.

Idea: each layer has one tensor of rows, a page is a run of rows, and a text is a list of pages. A pass writes the keys
of its new tokens to their rows, then all new tokens attend over the rows of their texts: prompts in pieces, single
tokens, and texts under different adapters in one call.
Source: Kwon et al., arXiv 2309.06180.
Cost: 2 x heads x size numbers for each token and layer; memory is taken when a page is first written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from luthier.data.forest import Span
from luthier.kernels.backend import AddedTerms, Backend, KeptRows, Paged, TokenBlocks
from luthier.kernels.thin_pass import ThinPass
from luthier.model.attending.attention import ForestPlan, Root, soft_capped
from luthier.model.attending.kept import AttentionCall, KeptKeys
from luthier.model.running.executor import flat_hidden

Widths = tuple[tuple[int, int, int], ...]
"""For each layer: key heads, the size of a key, the size of a value."""


@final
@dataclass(frozen=True)
class Layers:
    """What the layers of a model hold of a token, and how many tokens the one that looks back furthest sees, its own
    included; None where one sees all of a text."""

    widths: Widths
    window: int | None


def layers_of(module: PreTrainedModel) -> Layers:
    """What a model's cache has to hold, found out with a text of one token."""
    plan = ForestPlan(spans=(Span(0, 1, ()),), captured={})
    zero = torch.zeros(1, dtype=torch.int64, device=module.device)
    flat_hidden(module, zero, zero, plan)
    captured = plan.captured or {}
    widths = tuple((key.shape[1], key.shape[3], value.shape[3]) for _, (key, value) in sorted(captured.items()))
    windows = [call.window for call in plan.noted.values()]
    near = [window for window in windows if window is not None]
    return Layers(widths, max(near) if near and len(near) == len(windows) else None)


@final
class Cache:
    """Rows of keys and values for `pages` pages of `size` tokens, in every layer."""

    def __init__(self, widths: Widths, *, pages: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        rows = pages * size
        self.keys = [torch.empty(rows, heads, wide, dtype=dtype, device=device) for heads, wide, _ in widths]
        self.values = [torch.empty(rows, heads, wide, dtype=dtype, device=device) for heads, _, wide in widths]

    def put(self, rows: Int[Tensor, " r"], root: Root, first: int) -> None:
        """Write the keys of a learned root, from its token `first` on, to rows."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            own_keys, own_values = root.keys_values(layer, keys.dtype)
            part = slice(first, first + len(rows))
            keys.index_copy_(0, rows, own_keys[0].transpose(0, 1)[part].to(keys.dtype))
            values.index_copy_(0, rows, own_values[0].transpose(0, 1)[part].to(values.dtype))

    def copy_page(self, start: int, to: int) -> None:
        """Copy all of a page to another."""
        here, there = (slice(page * self.size, (page + 1) * self.size) for page in (start, to))
        for tensor in (*self.keys, *self.values):
            tensor[there] = tensor[here]


@final
@dataclass(frozen=True)
class PassKeys(KeptKeys):
    """The cache in one pass: `rows` are where the keys of its new tokens go, `texts` says who sees what,
    and `thin` are the terms of an adapter that is on all rows."""

    cache: Cache
    rows: Int[Tensor, " n"]
    texts: Paged
    backend: Backend
    thin: ThinPass | None = None

    @property
    def laid_out(self) -> ThinPass | None:
        return self.thin

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "n H D"],
        key: Float[Tensor, "n h D"],
        value: Float[Tensor, "n h E"],
        call: AttentionCall,
    ) -> Float[Tensor, "n H E"]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(0, self.rows, key.to(keys.dtype))
        values.index_copy_(0, self.rows, value.to(values.dtype))
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        if call.softcap is None and key.shape[-1] == value.shape[-1]:
            return self.backend.attend_pages(query.contiguous(), keys, values, self.texts, scale, call.window)
        return _by_text(query, keys, values, self.texts, scale, call)

    def through(
        self,
        blocks: TokenBlocks,
        which: range,
        x: Float[Tensor, "n d"],
        angles: tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]],
        added: AddedTerms | None,
    ) -> Float[Tensor, "n d"] | None:
        own = slice(which.start, which.stop)
        kept = KeptRows(self.cache.keys[own], self.cache.values[own], self.rows, self.texts)
        return blocks.through(x, which, angles, kept, added)


def paged(pages: Sequence[Sequence[int]], counts: Sequence[int], news: Sequence[int], cache: Cache) -> Paged:
    """The texts of a pass: their pages, how many keys each has with its new tokens, and how many new tokens."""
    most = max(len(own) for own in pages)
    device = cache.keys[0].device
    table = np.zeros((len(pages), most), dtype=np.int64)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    starts = torch.tensor([0, *news], dtype=torch.int64).cumsum(0)
    held = torch.tensor(counts, dtype=torch.int64)
    one_each = all(new == 1 for new in news)
    return Paged(torch.from_numpy(table).to(device), held.to(device), starts.to(device), cache.size, one_each)


def _by_text(
    query: Float[Tensor, "n H D"],
    keys: Float[Tensor, "rows h D"],
    values: Float[Tensor, "rows h E"],
    texts: Paged,
    scale: float,
    call: AttentionCall,
) -> Float[Tensor, "n H E"]:
    """Attention as no backend has it, with a soft cap or with values of another size: a call for each text."""
    parts = []
    starts = texts.starts.tolist()
    within = torch.arange(texts.size, device=query.device)
    for index, count in enumerate(texts.counts.tolist()):
        q = query[starts[index] : starts[index + 1]]
        used = texts.pages[index, : -(-count // texts.size)]
        rows = (used[:, None] * texts.size + within).flatten()[:count]
        last = torch.arange(count - len(q), count, device=query.device)[:, None]
        places = torch.arange(count, device=query.device)[None]
        seen = places <= last if call.window is None else (places <= last) & (places > last - call.window)
        q, k, v = (each.transpose(0, 1)[None] for each in (q, keys[rows], values[rows]))
        if call.softcap is not None:
            found = soft_capped(q, k, v, seen, scale, call.softcap, 0.0)
        else:
            grouped = q.shape[1] != k.shape[1]
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)
