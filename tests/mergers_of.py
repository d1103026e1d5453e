"""What tests of mergers merge: small matrices of several models that come from one base; oracles are torch's."""

from __future__ import annotations

from typing import Any

import torch

from luthier.core.chosen import choose
from luthier.mergers import Merger, Part


def merger(name: str, **knobs: Any) -> Merger:
    """The merger of this name."""
    return choose("mergers", Merger, {"method": name, **knobs})


def part(*models: torch.Tensor, base: torch.Tensor | None = None, weights: tuple[float, ...] = ()) -> Part:
    """Whole tensors as a part; vectors become one row."""
    rows = [model.reshape(-1, model.shape[-1]).float().numpy() for model in models]
    own = None if base is None else base.reshape(-1, base.shape[-1]).float().numpy()
    return Part(tuple(rows), own, weights or (1.0,) * len(rows), 0, rows[0].size, 7)


def merge_whole(method: Merger, given: Part) -> torch.Tensor:
    """Whole tensors merged at once, as a tensor."""
    return torch.from_numpy(method.whole(given))


def family(count: int, rows: int = 12, columns: int = 10, *, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and models that have changed a little of it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    return base, [base + 0.1 * torch.randn(rows, columns, generator=generator) for _ in range(count)]
