"""Drawing tokens: the cuts of top-k, nucleus and min-p as a threshold a row, and the inverse of a distribution.

Idea: what is cut is one threshold a row, so that tokens that tie with the last one kept stay whatever the order of a
sort; it is looked for among the likeliest tokens, and among more of them only while it may lie beyond. What a row keeps
and which token a number from [0, 1) draws depend on that row alone, not on its company.
Equation: p = softmax(z / temperature) over what the cuts leave; the token is the first whose cumulative sum is past the
    number times the whole sum.
Source: top-k: Fan et al., arXiv 1805.04833; nucleus: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al.,
    arXiv 2407.01082.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from luthier.model.speaker import Sampling

_WIDTHS: Final = (256, 4096, None)
"""How many of the likeliest tokens a cut is looked for among, one after the other; at last among all."""
_BLOCK: Final = 16
"""Tokens whose best stands for them while the likeliest are looked for."""
_COLDEST: Final = 1e-30
"""A temperature that float32 can divide by; below it nothing changes any more."""
_NEVER: Final = float("-inf")


@final
class Share(NamedTuple):
    """Rows of a batch with what each of some tokens weighs in them: of those that `ids` names, ascending, or of all."""

    rows: list[int]
    weights: Float[Tensor, "R W"]
    ids: Int[Tensor, "R W"] | None


def drawn(
    settings: Sequence[Sampling], numbers: Sequence[float], scores: Float[Tensor, "B V"]
) -> Int[Tensor, " B"]:
    """A token for each row, by its number from [0, 1) and the inverse of its cumulative distribution."""
    tokens = torch.empty(len(settings), dtype=torch.long, device=scores.device)
    for share in shares(settings, scores):
        found = _inverse(share.weights, [numbers[row] for row in share.rows])
        tokens[share.rows] = (found if share.ids is None else share.ids.gather(1, found))[:, 0]
    return tokens


def shares(settings: Sequence[Sampling], scores: Float[Tensor, "B V"]) -> Iterator[Share]:
    """What the tokens weigh after temperature and cuts.

    A row that is cut is looked at among its likeliest tokens, and among more of them while the cut lies beyond. How
    many is a matter of the row alone, so that its sums are the same in any company.
    """
    vocabulary = scores.shape[1]
    cut = [row for row, each in enumerate(settings) if 0 < each.top_k < vocabulary or each.top_p < 1 or each.min_p]
    whole = sorted(set(range(len(settings))) - set(cut))
    if whole:
        yield Share(whole, _chances(_rows(scores, whole), [settings[row] for row in whole]), None)
    for width in _WIDTHS:
        if not cut:
            return
        width = vocabulary if width is None else min(width, vocabulary)
        best, ids = _best(_rows(scores, cut), width)
        mine = [settings[row] for row in cut]
        scaled = (best - best[:, :1]) / _temperatures(best, mine)
        edge, certain = _edge(scaled, mine, _rows(scores, cut))
        sure = [at for at, fine in enumerate(certain.tolist()) if fine]
        if sure:
            ascending, order = ids[sure].sort(-1)
            kept = scaled[sure].exp() * (scaled[sure] >= edge[sure])
            yield Share([cut[at] for at in sure], kept.gather(1, order), ascending)
        cut = [row for at, row in enumerate(cut) if at not in set(sure)]


def _inverse(weights: Float[Tensor, "R W"], numbers: Sequence[float]) -> Int[Tensor, "R 1"]:
    """Where the sum of the weights goes past a share of the whole."""
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, _column(weights, numbers) * cumulative[:, -1:], right=True)
    found = found.clamp(max=weights.shape[1] - 1)
    hit = weights.gather(1, found) > 0
    if bool(hit.all()):
        return found
    # The number may round up to the whole sum, and a sum made in parallel may waver: take the nearest one before that
    # has a weight, or the first.
    place = torch.arange(weights.shape[1], device=weights.device)
    before = torch.where((weights > 0) & (place <= found), place, -1).amax(-1, keepdim=True)
    first = (weights > 0).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(hit, found, torch.where(before >= 0, before, first))


def _edge(
    scaled: Float[Tensor, "R W"], settings: Sequence[Sampling], scores: Float[Tensor, "R V"]
) -> tuple[Float[Tensor, "R 1"], Bool[Tensor, " R"]]:
    """The least score that each row keeps, and whether nothing beyond these tokens, best first, could be kept too."""
    width, vocabulary = scaled.shape[1], scores.shape[1]
    edge = _column(scaled, [math.log(each.min_p) if each.min_p else _NEVER for each in settings])
    counts = [each.top_k if 0 < each.top_k < vocabulary else 0 for each in settings]
    counted = torch.tensor([[count > 0] for count in counts]).to(scaled.device)
    place = torch.tensor([[min(max(count, 1), width) - 1] for count in counts]).to(scaled.device)
    least = torch.where(counted, scaled.gather(1, place), _NEVER)
    edge = torch.maximum(edge, least)
    if any(each.top_p < 1 for each in settings):
        inside = scaled.exp() * (scaled >= least)
        total = inside.sum(-1, keepdim=True)
        free = [row for row, each in enumerate(settings) if each.top_p < 1 and not counts[row]]
        if free and width < vocabulary:
            # The best token weighs 1 here, and its chance is 1 / total.
            chances = _chances(_rows(scores, free), [settings[row] for row in free])
            total[free] = 1 / chances.amax(-1, keepdim=True)
        before = (inside.cumsum(-1) - inside) / total
        share = _column(scaled, [each.top_p if each.top_p < 1 else math.inf for each in settings])
        last = ((before < share).sum(-1, keepdim=True) - 1).clamp(min=0)
        edge = torch.maximum(edge, torch.where(share < 1, scaled.gather(1, last), _NEVER))
    end = scaled[:, -1:]
    certain = (end < edge) & ~(counted & (end >= least)) | (end == _NEVER)
    return edge, certain[:, 0] | (width == vocabulary)


def _best(scores: Float[Tensor, "R V"], width: int) -> tuple[Float[Tensor, "R W"], Int[Tensor, "R W"]]:
    """The best scores of each row and their tokens, best first."""
    blocks = scores.shape[1] // _BLOCK
    if blocks < 2 * width:
        best = scores.topk(width)
        return best.values, best.indices
    # The best are in the blocks whose own best are best. A block is every so manyth token, to be compared side by side.
    apart = scores[:, : blocks * _BLOCK].unflatten(1, (_BLOCK, blocks))
    at = apart.amax(1).topk(width).indices[:, None].expand(-1, _BLOCK, -1)
    ids = at + blocks * torch.arange(_BLOCK, device=scores.device)[:, None]
    rest = torch.arange(blocks * _BLOCK, scores.shape[1], device=scores.device).expand(len(scores), -1)
    found = torch.cat([apart.gather(2, at).flatten(1), scores[:, blocks * _BLOCK :]], 1)
    best = found.topk(width)
    return best.values, torch.cat([ids.flatten(1), rest], 1).gather(1, best.indices)


def _chances(scores: Float[Tensor, "R V"], settings: Sequence[Sampling]) -> Float[Tensor, "R V"]:
    """The probabilities at each row's temperature."""
    if all(each.temperature == 1 for each in settings):
        return scores.softmax(-1)
    return ((scores - scores.amax(-1, keepdim=True)) / _temperatures(scores, settings)).softmax(-1)


def _temperatures(like: Float[Tensor, "R W"], settings: Sequence[Sampling]) -> Float[Tensor, "R 1"]:
    return _column(like, [max(each.temperature, _COLDEST) for each in settings])


def _rows(scores: Float[Tensor, "B V"], rows: list[int]) -> Float[Tensor, "R V"]:
    return scores if len(rows) == len(scores) else scores[rows]


def _column(like: Float[Tensor, "R W"], values: Sequence[float]) -> Float[Tensor, "R 1"]:
    return torch.tensor(values, dtype=like.dtype).to(like.device)[:, None]
