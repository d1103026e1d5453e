"""The cache: keys and values of all layers in pages, and attention over them.

Idea: each layer has one tensor of rows, a page is a run of rows, and a text is a list of pages. Layers with one window
are a group: a text has the same pages in all of them, and other ones in those of another group (stores.py). A pass
writes the keys of its new tokens to their rows, then all new tokens attend over the rows of their texts: prompts in
pieces, single tokens, and texts under different adapters in one call.
Source: Kwon et al., arXiv 2309.06180.
Cost: 2 x heads x size numbers for each token and layer; memory is taken when a page is first written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from luthier.data.forest import Span
from luthier.infer.pages import Table
from luthier.infer.stores import Tables
from luthier.kernels.backend import AddedTerms, Backend, KeptRows, Paged, TokenBlocks
from luthier.kernels.thin_pass import ThinPass
from luthier.model.attending.attention import ForestPlan, Root, soft_capped
from luthier.model.attending.kept import AttentionCall, KeptKeys
from luthier.model.language_model import LanguageModel
from luthier.model.running.executor import flat_hidden

Ints64 = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Widths = tuple[tuple[int, int, int], ...]
"""For each layer: key heads, the size of a key, the size of a value."""


@final
@dataclass(frozen=True)
class Layers:
    """What each layer of a model holds of a token, and how many tokens it sees, its own included; None where it sees
    all of a text."""

    widths: Widths
    windows: tuple[int | None, ...]

    @cached_property
    def groups(self) -> tuple[int | None, ...]:
        """The windows that there are, the widest first."""
        return tuple(sorted(set(self.windows), key=lambda each: (each is not None, -(each or 0))))

    @cached_property
    def of(self) -> tuple[int, ...]:
        """The group of each layer."""
        return tuple(self.groups.index(window) for window in self.windows)

    @property
    def window(self) -> int | None:
        """How many tokens the layer sees that looks back furthest."""
        return self.groups[0]

    def page_bytes(self, size: int, dtype: torch.dtype) -> tuple[int, ...]:
        """Bytes of a page of `size` tokens in each group."""
        numbers = [0] * len(self.groups)
        for group, (heads, key, value) in zip(self.of, self.widths, strict=True):
            numbers[group] += heads * (key + value)
        return tuple(each * size * dtype.itemsize for each in numbers)


def layers_of(model: LanguageModel) -> Layers:
    """What a model's cache has to hold, found out with a text of one token."""
    plan, blocks = ForestPlan(spans=(Span(0, 1, ()),), captured={}), model.executor.blocks
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    flat_hidden(model.module, zero, zero, plan, blocks=blocks)
    captured = plan.captured or {}
    calls = plan.noted if blocks is None else blocks.calls
    widths = tuple((key.shape[1], key.shape[3], value.shape[3]) for _, (key, value) in sorted(captured.items()))
    return Layers(widths, tuple(calls[layer].window for layer in sorted(captured)))


@final
class Cache:
    """Rows of keys and values: in the layers of each group for so many pages of `size` tokens as `pages` says."""

    def __init__(
        self, layers: Layers, *, pages: Sequence[int], size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.size = size
        self.of = layers.of
        self.page_bytes = layers.page_bytes(size, dtype)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for group, (heads, key, value) in zip(layers.of, layers.widths, strict=True):
            rows = pages[group] * size
            self.keys.append(torch.empty(rows, heads, key, dtype=dtype, device=device))
            self.values.append(torch.empty(rows, heads, value, dtype=dtype, device=device))

    def put(self, places: Sequence[Int[Tensor, " r"]], root: Root, first: int) -> None:
        """Write the keys of a learned root, from its token `first` on, to the rows of each group."""
        for layer, (group, keys, values) in enumerate(zip(self.of, self.keys, self.values, strict=True)):
            own_keys, own_values = root.keys_values(layer, keys.dtype)
            rows = places[group]
            part = slice(first, first + len(rows))
            keys.index_copy_(0, rows, own_keys[0].transpose(0, 1)[part].to(keys.dtype))
            values.index_copy_(0, rows, own_values[0].transpose(0, 1)[part].to(values.dtype))

    def copy_page(self, group: int, start: int, to: int) -> None:
        """Copy all of a page to another, in the layers of a group."""
        here, there = (slice(page * self.size, (page + 1) * self.size) for page in (start, to))
        for own, keys, values in zip(self.of, self.keys, self.values, strict=True):
            if own == group:
                keys[there] = keys[here]
                values[there] = values[here]


@final
@dataclass(frozen=True)
class PassKeys(KeptKeys):
    """The cache in one pass: for each group of layers `rows` are where the keys of its new tokens go, and `texts` says
    who sees what; `thin` are the terms of an adapter that is on all rows."""

    cache: Cache
    rows: Sequence[Int[Tensor, " n"]]
    texts: Sequence[Paged]
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
        keys, values, group = self.cache.keys[layer], self.cache.values[layer], self.cache.of[layer]
        rows, texts = self.rows[group], self.texts[group]
        keys.index_copy_(0, rows, key.to(keys.dtype))
        values.index_copy_(0, rows, value.to(values.dtype))
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        if call.softcap is None and key.shape[-1] == value.shape[-1]:
            return self.backend.attend_pages(query.contiguous(), keys, values, texts, scale, call.window)
        return _by_text(query, keys, values, texts, scale, call)

    def through(
        self,
        blocks: TokenBlocks,
        which: range,
        x: Float[Tensor, "n d"],
        angles: tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]],
        added: AddedTerms | None,
    ) -> Float[Tensor, "n d"] | None:
        own = slice(which.start, which.stop)
        cache = self.cache
        kept = KeptRows(cache.keys[own], cache.values[own], cache.of[own], self.rows, self.texts)
        return blocks.through(x, which, angles, kept, added)


def paged(texts: Sequence[Tables], stops: Sequence[int], news: Sequence[int], cache: Cache) -> list[Paged]:
    """The texts of a pass as each group of layers sees them: where they lie, up to which place each has keys with its
    new tokens, and how many of these there are."""
    device, size = cache.keys[0].device, cache.size
    starts = torch.tensor([0, *news], dtype=torch.int64).cumsum(0).to(device)
    one_each = all(new == 1 for new in news)
    found = []
    for tables in zip(*texts, strict=True):
        pages = np.zeros((len(tables), max(len(table.pages) for table in tables)), dtype=np.int64)
        for row, table in zip(pages, tables, strict=True):
            row[: len(table.pages)] = table.pages
        # What its windows have passed is not there: who sees whom is a matter of distances.
        counts = [stop - table.passed * size for stop, table in zip(stops, tables, strict=True)]
        held = torch.tensor(counts, dtype=torch.int64)
        found.append(Paged(torch.from_numpy(pages).to(device), held.to(device), starts, size, one_each))
    return found


def rows_of(texts: Sequence[Tables], ranges: Sequence[tuple[int, int]], cache: Cache) -> list[Int[Tensor, " n"]]:
    """The rows of places of texts, end to end, in the layers of each group."""
    device, size = cache.keys[0].device, cache.size
    found = []
    one_each = all(stop - start == 1 for start, stop in ranges)
    for tables in zip(*texts, strict=True):
        each = list(zip(tables, ranges, strict=True))
        if one_each:
            rows = [table.pages[start // size - table.passed] * size + start % size for table, (start, _) in each]
            found.append(torch.tensor(rows, dtype=torch.int64).to(device))
            continue
        parts = [_rows(table, start, stop, size) for table, (start, stop) in each]
        found.append(torch.from_numpy(np.concatenate(parts)).to(device))
    return found


def _rows(table: Table, start: int, stop: int, size: int) -> Ints64:
    first = start // size
    pages = np.array(table.pages[first - table.passed : -(-stop // size) - table.passed], dtype=np.int64)
    places = np.arange(start, stop)
    found: Ints64 = pages[places // size - first] * size + places % size
    return found


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
