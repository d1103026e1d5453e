"""Relative position biases, made for the segments that need them and not for all pairs of a flat batch.

Idea: T5 adds to each attention score a learned number that depends on the distance of key and query alone. Its zoo
module makes them for all pairs of the tokens it is given, which in a flat batch would be T x T x heads, nearly all of
them for pairs that do not see each other. While a flat pass runs, the module hands on an object of this class instead,
and attention asks it for the few pairs of each segment.
Equation: score(q, k) = q . k + b[bucket(place(k) - place(q))], with T5's buckets: exact near by, logarithmic far off.
Source: Raffel et al., arXiv 1910.10683, section 2.1; the buckets and the table are the zoo module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.core.errors import UndrivableAttentionError

TABLE = "relative_attention_bias"
"""The embedding of a zoo module that has such biases: a row for each bucket, a column for each head."""
_HAS = "has_relative_attention_bias"
"""What a zoo module with or without them says of itself."""


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """The biases of one zoo module, by the places of queries and keys on their path; `made` is for one pass."""

    table: nn.Module
    bucket: Callable[..., Tensor]
    both_ways: bool
    buckets: int
    farthest: int
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def between(self, before: int, own: int) -> Float[Tensor, "1 H own all"]:
        """Of the `own` last queries of a path and all its `before + own` keys; the layers of a stack share them."""
        key = (before, own)
        if key not in self.made:
            self.made[key] = self._between(before, own)
        return self.made[key]

    def _between(self, before: int, own: int) -> Float[Tensor, "1 H own all"]:
        weight = self.table.get_parameter("weight")
        places = torch.arange(before + own, device=weight.device)
        distance = places[None, :] - places[before:, None]
        rows = self.bucket(
            distance, bidirectional=self.both_ways, num_buckets=self.buckets, max_distance=self.farthest
        )
        found: Tensor = self.table(rows)
        return found.permute(2, 0, 1)[None]


@contextmanager
def by_segment(stack: nn.Module) -> Iterator[None]:
    """For the length of a `with` block, the modules below `stack` hand on a `RelativeBias` instead of a tensor.

    Those without biases would make zeros for all pairs of tokens of answers and texts; they hand on an empty tensor.
    """
    found = [module for module in stack.modules() if isinstance(module._modules.get(TABLE), nn.Module)]
    if not found:
        raise UndrivableAttentionError(f"{type(stack).__name__} has no biases by distance, so positions are its own")
    without = [module for module in stack.modules() if getattr(module, _HAS, None) is False]
    for module in found:
        module.compute_bias = _maker(module)  # type: ignore[assignment]
    for module in without:
        setattr(module, _HAS, True)
        module.compute_bias = _nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in without:
            setattr(module, _HAS, False)
        for module in [*found, *without]:
            # The method of the class is what is called again from here on.
            del module.compute_bias


def _nothing(*sizes: object, **settings: object) -> Tensor:
    return torch.empty(0)


def _maker(module: nn.Module) -> Callable[..., RelativeBias]:
    # The zoo's own attributes: another module of this kind lacks one, and is run by unrolled paths.
    bias = RelativeBias(
        table=module.get_submodule(TABLE),
        bucket=type(module)._relative_position_bucket,  # type: ignore[attr-defined]
        both_ways=not module.is_decoder,
        buckets=int(module.relative_attention_num_buckets),  # type: ignore[arg-type]
        farthest=int(module.relative_attention_max_distance),  # type: ignore[arg-type]
    )

    def make(*sizes: object, **settings: object) -> RelativeBias:
        # Called as the zoo calls its own, which tells it sizes that mean nothing here.
        return bias

    return make
