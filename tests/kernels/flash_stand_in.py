"""Torch's flash attention for CUDA as its documentation says it works, in plain torch, one text at a time.

It stands where a GPU would have to be, so that what lies around the operation is tested. What it cannot tell is whether
the operation does what is written of it; the trial of a model's blocks at loading tells that, on the GPU.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import varlen


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on attention of every precision and size is allowed, and computed here."""
    monkeypatch.setattr(varlen, "allowed", lambda query: True)
    monkeypatch.setattr(varlen, "_forward", _forward)
    monkeypatch.setattr(varlen, "_backward", _backward)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, places: varlen.Places, scale: float
) -> tuple[Tensor, Tensor]:
    """What torch documents of its operation, text by text with a dense mask; the log-sums are left empty."""
    return _text_by_text(query, key, value, places, scale), torch.zeros(query.shape[1], len(query))


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, places: varlen.Places,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert out.shape == query.shape and log_sums.shape == (query.shape[1], len(query))
    given = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        return torch.autograd.grad(_text_by_text(given[0], given[1], given[2], places, scale), given, grad)


def _text_by_text(query: Tensor, key: Tensor, value: Tensor, places: varlen.Places, scale: float) -> Tensor:
    texts = []
    queries, keys = pairwise(places.queries.tolist()), pairwise(places.keys.tolist())
    for (start, stop), (first, last) in zip(queries, keys, strict=True):
        if start == stop:
            # A text of no tokens; torch's kernel for CPUs divides by their number.
            continue
        assert stop - start <= places.longest_queries and last - first <= places.longest_keys
        corner = torch.ones(stop - start, last - first, dtype=torch.bool).tril(last - first - (stop - start))
        sides = [tensor.transpose(0, 1)[None] for tensor in (query[start:stop], key[first:last], value[first:last])]
        found = F.scaled_dot_product_attention(*sides, attn_mask=corner, scale=scale, enable_gqa=True)
        texts.append(found[0].transpose(0, 1))
    return torch.cat(texts)
