"""Choosing the next token of each continuation from its logits.

Idea: a `Chooser` is what one continuation remembers: its settings, what it said, its own random numbers. `choose` takes
the logits of many at once. What steers (penalties, biases, grammars) touches single logits; what cuts (top-k, nucleus,
min-p) is one threshold a row, so that tokens that tie with the last one kept stay whatever the order of a sort. A token
is drawn with one number from [0, 1) by the inverse of the cumulative distribution. That number is a hash of the seed,
the choice and the place in the text: the draw depends on nothing else that runs, and needs no state.
Equation: with z the model's logits, c how often a token was said: z' = (z / r if z > 0 else z r) - c frequency -
    [c > 0] presence + bias; p = softmax(z' / temperature) over what the cuts leave. What is told is log softmax z.
Source: top-k: Fan et al., arXiv 1805.04833; nucleus: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al.,
    arXiv 2407.01082; repetition penalty: Keskar et al., arXiv 1909.05858, section 4.1; presence and frequency: the
    OpenAI API reference; the hash is splitmix64: Steele, Lea and Flood, OOPSLA 2014.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.errors import NumericError, RecipeError
from luthier.data.forest import Floats, Ints
from luthier.infer.guides import Guide
from luthier.infer.request import Said
from luthier.model.speaker import Sampling

_NUCLEUS: Final = 1024
"""Tokens among which the edge of a nucleus is looked for before all are sorted."""
_COLDEST: Final = 1e-30
"""A temperature that float32 can divide by; below it nothing changes any more."""
_NEVER: Final = float("-inf")


@final
class Chooser:
    """One continuation: how its tokens are chosen, what it has said, and its random numbers."""

    def __init__(self, sampling: Sampling, prompt: Ints, *, choice: int = 0, guide: Guide | None = None) -> None:
        self.sampling = sampling
        self.guide = guide
        self.said: list[int] = []
        self.log_probs: list[float] = []
        self.counts: dict[int, int] = {}
        self._in_prompt = np.unique(prompt) if sampling.repetition_penalty != 1 else np.empty(0, np.int32)
        self._key = _hashed(_hashed(sampling.seed) ^ choice)

    def uniform(self) -> float:
        """The number from [0, 1) that draws the next token; the same until a token is taken."""
        return (_hashed(self._key + len(self.said)) >> 11) / 2**53

    def seen(self) -> Ints:
        """The tokens of the prompt and of what was said; some twice."""
        return np.concatenate([self._in_prompt, np.fromiter(self.counts, np.int32, len(self.counts))])

    def take(self, said: Said) -> None:
        """Remember the token that comes next."""
        token = said.token
        self.said.append(token)
        self.log_probs.append(said.log_prob)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.guide is not None:
            self.guide.said(token)


def require_possible(sampling: Sampling, vocabulary: int) -> None:
    """Raise RecipeError for settings that name tokens which a model of `vocabulary` tokens does not have."""
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise RecipeError(f"logit_bias names token {token}", allowed=f"the model's tokens, 0 to {vocabulary - 1}")
        if not math.isfinite(bias):
            raise RecipeError(f"the logit_bias of token {token} is {bias}", allowed="a finite number, as -100 to 100")
    _require_likeliest(sampling.likeliest, vocabulary)


def choose(choosers: Sequence[Chooser], logits: Float[Tensor, "B V"]) -> list[Said]:
    """The next token of each continuation, which takes it; row i of `logits` is what the model says after its text."""
    for chooser in choosers:
        if not chooser.said:
            require_possible(chooser.sampling, logits.shape[1])
    if not choosers:
        return []
    own = logits.float()
    steered = _steered(choosers, own)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature > 0]
    if len(drawn) == len(choosers):
        tokens = _drawn(choosers, steered)
    else:
        tokens = steered.argmax(-1)
        if drawn:
            tokens[drawn] = _drawn([choosers[row] for row in drawn], steered[drawn])
    told = _told(own, tokens, [chooser.sampling.likeliest for chooser in choosers])
    for row, said in enumerate(told):
        if not math.isfinite(said.log_prob):
            raise _not_finite(own[row], said.token)
    for chooser, said in zip(choosers, told, strict=True):
        chooser.take(said)
    return told


def choose_drafted(chooser: Chooser, logits: Float[Tensor, "N V"], draft: Sequence[int]) -> Iterator[Said]:
    """The next tokens of one continuation, given the logits after its text and after each token of a draft.

    Each token is chosen as ever; while it is the one that the draft foresaw, the next row of logits is that of the text
    and the choice goes on, for up to one token more than the draft has. A drawn token is the draft's with the
    probability that it has, and otherwise of the others' distribution: this is rejection sampling of a certain draft
    (Leviathan et al., arXiv 2211.17192, algorithm 1), and draws the very text that is drawn without one.
    A token is chosen when it is asked for: stop asking where the text ends.
    """
    for row, foreseen in enumerate([*draft, None]):
        (said,) = choose([chooser], logits[row : row + 1])
        yield said
        if said.token != foreseen:
            return


def distribution(choosers: Sequence[Chooser], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """The probabilities with which `choose` would take each token next, of continuations that are not greedy."""
    weights = _weights(choosers, _steered(choosers, logits.float()))
    return weights / weights.sum(-1, keepdim=True)


def log_probs_of(logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], likeliest: int = 0) -> list[Said]:
    """What the model says of tokens that are given, as those of a prompt; row i of `logits` is what comes before i."""
    _require_likeliest(likeliest, logits.shape[1])
    return _told(logits.float(), tokens.to(logits.device, torch.long), [likeliest] * len(tokens))


def _require_likeliest(likeliest: int, vocabulary: int) -> None:
    if likeliest > vocabulary:
        raise RecipeError(f"likeliest is {likeliest}", allowed=f"0 to {vocabulary}, the model's tokens")


def _told(logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], likeliest: Sequence[int]) -> list[Said]:
    """Each token with its log-probability, and the likeliest in its place."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    log_probs = (logits.gather(1, tokens[:, None]) - normaliser)[:, 0].tolist()
    most = max(likeliest, default=0)
    best: list[list[tuple[int, float]]] = [[] for _ in log_probs]
    if most:
        values, ids = logits.topk(most)
        pairs = zip(ids.tolist(), (values - normaliser).tolist(), strict=True)
        best = [list(zip(*row, strict=True)) for row in pairs]
    return [
        Said(token, log_prob, tuple(row[:count]))
        for token, log_prob, row, count in zip(tokens.tolist(), log_probs, best, likeliest, strict=True)
    ]


def _not_finite(logits: Float[Tensor, " V"], token: int) -> NumericError:
    bad = len(logits) - int(logits.isfinite().sum())
    return NumericError(
        f"{bad} of {len(logits)} logits are not finite, and token {token} has no probability",
        do="look at the weights of the model and of its adapters: luthier doctor, luthier run show RUN",
    )


# ----------------------------------------------------------------------------------------------------------- steering


def _steered(choosers: Sequence[Chooser], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """The logits after penalties, biases, guides and what may not come yet; the very tensor where there is nothing."""
    steered = _penalised(choosers, logits)
    masks = [_allowed(chooser, logits.shape[1]) for chooser in choosers]
    guided = [row for row, mask in enumerate(masks) if mask is not None]
    if guided:
        mask = torch.stack([mask for mask in masks if mask is not None]).to(logits.device)
        steered = steered.clone() if steered is logits else steered
        steered[guided] = steered[guided].masked_fill(~mask, _NEVER)
    return steered


def _penalised(choosers: Sequence[Chooser], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """The logits after the penalties, then the biases: single numbers, those of all rows at once."""
    repeated: list[_Edits] = []
    added: list[_Edits] = []
    for row, chooser in enumerate(choosers):
        settings = chooser.sampling
        if settings.repetition_penalty != 1:
            repeated.append(_Edits.of(row, chooser.seen(), settings.repetition_penalty))
        if settings.presence_penalty or settings.frequency_penalty:
            changes = [-settings.presence_penalty - n * settings.frequency_penalty for n in chooser.counts.values()]
            added.append(_Edits.of(row, list(chooser.counts), changes))
        if settings.logit_bias:
            tokens, biases = zip(*settings.logit_bias, strict=True)
            added.append(_Edits.of(row, tokens, biases))
    if not repeated and not added:
        return logits
    steered = logits.clone()
    if repeated:
        at, penalty = _joined(repeated, logits.device)
        steered[at] = torch.where(steered[at] > 0, steered[at] / penalty, steered[at] * penalty)
    if added:
        at, change = _joined(added, logits.device)
        steered.index_put_(at, change, accumulate=True)
    return steered


@final
class _Edits(NamedTuple):
    """Numbers for single logits of one row."""

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    values: Floats

    @classmethod
    def of(cls, row: int, tokens: Sequence[int] | Ints, values: Sequence[float] | float) -> _Edits:
        at = np.asarray(tokens, np.int64)
        return cls(np.full(at.shape, row), at, np.broadcast_to(np.asarray(values, np.float32), at.shape))


def _joined(edits: list[_Edits], device: torch.device) -> tuple[tuple[Tensor, Tensor], Float[Tensor, " E"]]:
    rows, tokens, values = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*edits, strict=True))
    return (rows, tokens), values


def _allowed(chooser: Chooser, vocabulary: int) -> Bool[Tensor, " V"] | None:
    """Which tokens may come next, by the guide and by the number of tokens that must come first; None for all."""
    guided = chooser.guide.allowed() if chooser.guide is not None else None
    mask = None
    if guided is not None:
        # A model may have more rows than its tokenizer has tokens, and the other way round.
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[: len(guided)] = guided[:vocabulary].cpu()
        if not bool(mask.any()):
            raise RecipeError(
                f"the guide allows none of the model's {vocabulary} tokens after {len(chooser.said)} tokens",
                do="give it stop tokens, with which a text may end",
            )
    if len(chooser.said) < chooser.sampling.min_new_tokens:
        stops = [token for token in chooser.sampling.stop_ids if 0 <= token < vocabulary]
        early = torch.ones(vocabulary, dtype=torch.bool) if mask is None else mask.clone()
        early[stops] = False
        # Where a guide has come to its end, nothing but a stop is left.
        return early if bool(early.any()) else mask
    return mask


# ------------------------------------------------------------------------------------------------------------ drawing


def _drawn(choosers: Sequence[Chooser], scores: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """A token for each row by the inverse of its cumulative distribution."""
    weights = _weights(choosers, scores)
    cumulative = weights.cumsum(-1)
    uniform = torch.tensor([chooser.uniform() for chooser in choosers], dtype=torch.float32).to(scores.device)
    found = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    found = found.clamp(max=weights.shape[1] - 1)
    hit = weights.gather(1, found) > 0
    if not bool(hit.all()):
        # The number may round up to the whole sum, and a sum made in parallel may waver: take the nearest one before
        # that has a weight, or the first.
        place = torch.arange(weights.shape[1], device=scores.device)
        before = torch.where((weights > 0) & (place <= found), place, -1).amax(-1, keepdim=True)
        first = (weights > 0).to(torch.uint8).argmax(-1, keepdim=True)
        found = torch.where(hit, found, torch.where(before >= 0, before, first))
    return found[:, 0]


def _weights(choosers: Sequence[Chooser], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """What each token weighs after temperature and cuts; the heaviest weighs 1."""
    temperature = _column(scores, [max(chooser.sampling.temperature, _COLDEST) for chooser in choosers])
    scaled = (scores - scores.amax(-1, keepdim=True)) / temperature
    edge = _edge(choosers, scaled)
    weights = scaled.exp()
    return weights if edge is None else weights.masked_fill_(scaled < edge, 0)


def _edge(choosers: Sequence[Chooser], scaled: Float[Tensor, "B V"]) -> Float[Tensor, "B 1"] | None:
    """The least score that each row keeps; None when no row is cut. The best score of a row is 0."""
    vocabulary = scaled.shape[1]
    settings = [chooser.sampling for chooser in choosers]
    least = [math.log(each.min_p) if each.min_p else _NEVER for each in settings]
    edge = _column(scaled, least)
    counted = [row for row, each in enumerate(settings) if 0 < each.top_k < vocabulary]
    if counted:
        wanted = torch.tensor([[settings[row].top_k] for row in counted]).to(scaled.device)
        best = scaled[counted].topk(max(settings[row].top_k for row in counted)).values
        floor = torch.full_like(edge, _NEVER)
        floor[counted] = best.gather(1, wanted - 1)
        edge = torch.maximum(edge, floor)
    nucleus = [row for row, each in enumerate(settings) if each.top_p < 1]
    if nucleus:
        inside = scaled[nucleus]
        if counted:
            inside = inside.masked_fill(inside < floor[nucleus], _NEVER)
        share = _column(scaled, [settings[row].top_p for row in nucleus])
        edge[nucleus] = torch.maximum(edge[nucleus], _nucleus_edge(inside, share))
    return edge if counted or nucleus or any(each.min_p for each in settings) else None


def _nucleus_edge(scores: Float[Tensor, "R V"], share: Float[Tensor, "R 1"]) -> Float[Tensor, "R 1"]:
    """The score of the last token of the smallest set whose probability reaches `share`."""
    normaliser = scores.logsumexp(-1, keepdim=True)
    for width in (min(_NUCLEUS, scores.shape[1]), scores.shape[1]):
        best = scores.topk(width).values
        chance = (best - normaliser).exp()
        before = chance.cumsum(-1) - chance
        kept = (before < share).sum(-1, keepdim=True)
        if bool((kept < width).all()):
            break
    return best.gather(1, (kept - 1).clamp(min=0))


def _column(like: Float[Tensor, "B V"], values: Sequence[float]) -> Float[Tensor, "R 1"]:
    return torch.tensor(values, dtype=like.dtype).to(like.device)[:, None]


def _hashed(number: int) -> int:
    """64 bits in which those of `number` are mixed well: a step of splitmix64."""
    mask = 2**64 - 1
    number = (number + 0x9E3779B97F4A7C15) & mask
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
    return number ^ (number >> 31)
