"""A backend that runs on another device than its tensors: what is given goes there, what comes back is brought home.

With it the tests of test_backends.py, whose tensors are on the CPU, test a GPU as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from luthier.kernels.backend import Backend, Paged, PairCodes, Run, Seen


@final
class OnDevice(Backend):
    """`inner`, on `device`."""

    def __init__(self, inner: Backend, device: torch.device) -> None:
        self._inner, self._device = inner, device

    @property
    def name(self) -> str:
        return self._inner.name

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse = self._inner.norm(self._there(x), self._there(weight), eps)
        return out.cpu(), inverse.cpu()

    def normed(self, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        return self._inner.normed(self._there(x), self._there(weight), self._there(inverse)).cpu()

    def norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, added: Tensor | None) -> Tensor:
        given = [self._there(each) for each in (grad, x, weight, inverse)]
        more = None if added is None else self._there(added)
        return self._inner.norm_backward(given[0], given[1], given[2], given[3], more).cpu()

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._inner.gated(self._there(gate), self._there(up)).cpu()

    def gated_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        found = self._inner.gated_backward(self._there(grad), self._there(gate), self._there(up))
        return found[0].cpu(), found[1].cpu()

    def rotated(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        return self._inner.rotated(self._there(x), self._there(cosines), self._there(sines)).cpu()

    def label_slopes(self, logits: Tensor, labels: Tensor, *, slopes: bool) -> tuple[Tensor, Tensor | None]:
        log_probs, found = self._inner.label_slopes(self._there(logits), self._there(labels), slopes=slopes)
        return log_probs.cpu(), None if found is None else found.cpu()

    def unpacked_rows(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return self._inner.unpacked_rows(self._there(codes), self._there(scales), dtype).cpu()

    def unpacked(
        self, codes: Tensor, scales: Tensor, levels: Tensor, block: int, numbers: int, dtype: torch.dtype
    ) -> Tensor:
        given = [self._there(each) for each in (codes, scales, levels)]
        return self._inner.unpacked(given[0], given[1], given[2], block, numbers, dtype).cpu()

    def attends(self, query: Tensor, seen: Seen | None) -> bool:
        return self._inner.attends(self._there(query), seen)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], scale: float, seen: Seen | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, kept = self._inner.attend(self._there(query), self._there(key), self._there(value), runs, scale, seen)
        return out.cpu(), tuple(each.cpu() for each in kept)

    def attend_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        kept: Sequence[Tensor],
        runs: Sequence[Run],
        scale: float,
        seen: Seen | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = [self._there(each) for each in (grad, query, key, value, out)]
        held = [self._there(each) for each in kept]
        found = self._inner.attend_backward(given[0], given[1], given[2], given[3], given[4], held, runs, scale, seen)
        return found[0].cpu(), found[1].cpu(), found[2].cpu()

    def attend_pages(
        self, query: Tensor, keys: Tensor, values: Tensor, texts: Paged, scale: float, window: int | None
    ) -> Tensor:
        given = [self._there(each) for each in (query, keys, values)]
        places = [self._there(each) for each in (texts.pages, texts.counts, texts.starts)]
        there = Paged(places[0], places[1], places[2], texts.size, texts.one_each)
        return self._inner.attend_pages(given[0], given[1], given[2], there, scale, window).cpu()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        more = None if bias is None else self._there(bias)
        return self._inner.product(self._there(x), self._there(weight), more).cpu()

    @property
    def few(self) -> int:
        return self._inner.few

    def multiplies_packed(self, rows: int, dtype: torch.dtype) -> bool:
        return self._inner.multiplies_packed(rows, dtype)

    def product_of_bytes(self, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        given = [self._there(each) for each in (x, codes, scales)]
        return self._inner.product_of_bytes(given[0], given[1], given[2]).cpu()

    def product_of_codes(self, x: Tensor, weight: PairCodes) -> Tensor:
        moved = {name: self._there(each) for name, each in vars(weight.scales).items() if isinstance(each, Tensor)}
        there = replace(
            weight, codes=self._there(weight.codes), levels=self._there(weight.levels),
            scales=replace(weight.scales, **moved),
        )  # fmt: skip
        return self._inner.product_of_codes(self._there(x), there).cpu()

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)
