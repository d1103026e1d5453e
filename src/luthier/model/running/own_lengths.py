"""Texts of a flat batch turned each by its own length, where a model's rotary angles depend on how long a text is.

Idea: LongRoPE has two sets of angles, one for texts up to the length of pre-training and one for longer ones, for all
of their places. The zoo looks at the largest position of a pass, which is right for one text. In a pass of many a long
text would turn its neighbours by angles they were not trained with, and the first piece of a long text would have the
angles of a short one. So each token says how long its text is, and has the angles of that.
Equation: theta_i = 1 / (base^(2i/d) f_i), f = long_factor where the text has more places than
    original_max_position_embeddings, else short_factor.
Source: Ding et al., arXiv 2402.13753 (LongRoPE), section 3.2; transformers' `dynamic_rope_update`; its Phi-3 reads a
    text again when it comes to that length.
Cost: the angles twice in a pass that has texts of both kinds; nothing for other models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from luthier.data.forest import Ints, Span

_NAME: Final = "rotary_emb"


def short_length(body: nn.Module) -> int | None:
    """The most places of a text that is turned as a short one; None where all texts are turned alike."""
    rotary = body._modules.get(_NAME)
    if isinstance(rotary, _Turned):
        return rotary.limit
    if rotary is None or vars(rotary).get("rope_type") != "longrope":
        return None
    return int(rotary.config.rope_parameters["original_max_position_embeddings"])  # type: ignore[union-attr, index]


def span_lengths(spans: Sequence[Span], ahead: Sequence[int]) -> list[int]:
    """For each span the places of the longest way through its tree, with those `ahead` of its tree."""
    tops = [span.ancestors[0] if span.ancestors else index for index, span in enumerate(spans)]
    longest: dict[int, int] = {}
    for span, top, before in zip(spans, tops, ahead, strict=True):
        way = before + span.length + sum(spans[index].length for index in span.ancestors)
        longest[top] = max(longest.get(top, 0), way)
    return [longest[top] for top in tops]


def token_lengths(spans: Sequence[Span], ahead: Sequence[int]) -> Ints:
    """The same for each token of a flat batch, (T,)."""
    return np.repeat(np.array(span_lengths(spans, ahead), np.int32), [span.length for span in spans])


@contextmanager
def turned(body: nn.Module, lengths: Callable[[], Ints]) -> Iterator[None]:
    """Within the block each token of a flat batch has the angles of its text, which has so many places, (T,)."""
    limit, rotary = short_length(body), body._modules.get(_NAME)
    if limit is None or rotary is None:
        yield
        return
    body._modules[_NAME] = _Turned(rotary, limit, lengths() > limit)
    try:
        yield
    finally:
        body._modules[_NAME] = rotary


@final
class _Turned(nn.Module):
    """The zoo's rotary embedding, asked for the angles of short texts and of long ones. `is_long` is (T,)."""

    def __init__(self, zoo: nn.Module, limit: int, is_long: np.ndarray) -> None:
        super().__init__()
        self.zoo = zoo
        self.limit = limit
        self.is_long = is_long

    def forward(
        self, x: Float[Tensor, "1 _ d"], position_ids: Int[Tensor, "1 T"]
    ) -> tuple[Float[Tensor, "1 T r"], Float[Tensor, "1 T r"]]:
        if not self.is_long.any():
            return self._short(x, position_ids)
        if self.is_long.all():
            return self._long(x, position_ids)
        is_long = torch.from_numpy(self.is_long).to(position_ids.device)[None]
        short = self._short(x, position_ids.masked_fill(is_long, 0))
        far = self._long(x, position_ids)
        cosines, sines = (torch.where(is_long[..., None], *pair) for pair in zip(far, short, strict=True))
        return cosines, sines

    def _short(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = self.zoo(x, position_ids=position_ids)
        return cosines, sines

    def _long(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # One more place, past the limit: the zoo goes by the largest.
        there = torch.cat([position_ids, torch.full_like(position_ids[:, :1], self.limit)], 1)
        cosines, sines = self.zoo(x, position_ids=there)
        return cosines[:, :-1], sines[:, :-1]
