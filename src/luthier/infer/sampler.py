"""Choosing the next token of each continuation from its logits.

Idea: a `Chooser` is what one continuation remembers: its settings, what it said, its own random numbers. `choose` takes
the logits of many at once. What steers (penalties, biases, grammars) touches single logits; what cuts (top-k, nucleus,
min-p) and the draw itself are in drawing.py. A token is drawn with one number from [0, 1), a hash of the seed, the
choice and the place in the text: the draw depends on nothing else that runs, and needs no state.
Equation: with z the model's logits, c how often a token was said: z' = (z / r if z > 0 else z r) - c frequency -
    [c > 0] presence + bias; p = softmax(z' / temperature) over what the cuts leave. What is told is log softmax z.
Source: repetition penalty: Keskar et al., arXiv 1909.05858, section 4.1; presence and frequency: the
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
from luthier.infer import drawing
from luthier.infer.guides import Guide
from luthier.infer.request import Said
from luthier.kernels.backend import Backend
from luthier.kernels.torch_backend import TorchBackend
from luthier.model.speaker import Sampling

_NEVER: Final = float("-inf")
TWIN: Final = TorchBackend()


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
        self._bound: Tensor | None = None
        self._asked = False
        self._key = _hashed(_hashed(sampling.seed) ^ choice)

    def uniform(self) -> float:
        """The number from [0, 1) that draws the next token; the same until a token is taken."""
        return (_hashed(self._key + len(self.said)) >> 11) / 2**53

    def seen(self) -> Ints:
        """The tokens of the prompt and of what was said; some twice."""
        return np.concatenate([self._in_prompt, np.fromiter(self.counts, np.int32, len(self.counts))])

    def bound(self, vocabulary: int) -> Bool[Tensor, " V"] | None:
        """Which of the model's tokens may come next, by the guide and by `min_new_tokens`; None for all.

        `choose` asks for it. Whoever asks before, of each continuation alone, meets what its guide raises there, where
        it need not end the others.
        """
        if not self._asked:
            self._bound, self._asked = self._asked_for(vocabulary), True
        return self._bound

    def ahead(self) -> Chooser:
        """One that begins where this one is and goes on by itself, with the same random numbers and without a guide."""
        other = Chooser(self.sampling, self._in_prompt)
        other.said, other.counts, other._key = list(self.said), dict(self.counts), self._key
        return other

    def take(self, said: Said) -> None:
        """Remember the token that comes next."""
        token = said.token
        self.said.append(token)
        self.log_probs.append(said.log_prob)
        self.counts[token] = self.counts.get(token, 0) + 1
        self._asked = False
        if self.guide is not None:
            self.guide.said(token)

    def _asked_for(self, vocabulary: int) -> Bool[Tensor, " V"] | None:
        guided = self.guide.allowed() if self.guide is not None else None
        mask = None
        if guided is not None:
            # A model may have more rows than its tokenizer has tokens, and the other way round.
            mask = torch.zeros(vocabulary, dtype=torch.bool)
            mask[: len(guided)] = guided[:vocabulary].cpu()
            if not bool(mask.any()):
                raise RecipeError(
                    f"the guide allows none of the model's {vocabulary} tokens after {len(self.said)} tokens",
                    do="give it stop tokens, with which a text may end",
                )
        if len(self.said) >= self.sampling.min_new_tokens:
            return mask
        early = torch.ones(vocabulary, dtype=torch.bool) if mask is None else mask.clone()
        early[[token for token in self.sampling.stop_ids if 0 <= token < vocabulary]] = False
        # Where a guide has come to its end, nothing but a stop is left.
        return early if bool(early.any()) else mask


def require_possible(sampling: Sampling, vocabulary: int) -> None:
    """Raise RecipeError for settings that name tokens which a model of `vocabulary` tokens does not have."""
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise RecipeError(f"logit_bias names token {token}", allowed=f"the model's tokens, 0 to {vocabulary - 1}")
        if not math.isfinite(bias):
            raise RecipeError(f"the logit_bias of token {token} is {bias}", allowed="a finite number, as -100 to 100")
    _require_likeliest(sampling.likeliest, vocabulary)


def choose(choosers: Sequence[Chooser], logits: Float[Tensor, "B V"], *, backend: Backend = TWIN) -> list[Said]:
    """The next token of each continuation, which takes it; row i of `logits` is what the model says after its text."""
    for chooser in choosers:
        if not chooser.said:
            require_possible(chooser.sampling, logits.shape[1])
    if not choosers:
        return []
    best, normalisers = backend.best(logits)
    steered = _steered(choosers, logits)
    drawn = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature > 0]
    if len(drawn) == len(choosers):
        tokens = _drawn(choosers, steered)
    else:
        tokens = best if steered is logits else steered.argmax(-1)
        if drawn:
            tokens[drawn] = _drawn([choosers[row] for row in drawn], steered[drawn])
    heats = [chooser.sampling.told_at for chooser in choosers]
    own = logits if set(heats) == {1.0} else logits.float() / logits.new_tensor(heats, dtype=torch.float32)[:, None]
    normalisers = normalisers if own is logits else backend.best(own)[1]
    told = _told(own, tokens, normalisers, [chooser.sampling.likeliest for chooser in choosers])
    for row, said in enumerate(told):
        if not math.isfinite(said.log_prob):
            raise _not_finite(logits[row], said.token)
    for chooser, said in zip(choosers, told, strict=True):
        chooser.take(said)
    return told


def choose_drafted(
    chooser: Chooser, logits: Float[Tensor, "N V"], draft: Sequence[int], *, backend: Backend = TWIN
) -> Iterator[Said]:
    """The next tokens of one continuation, given the logits after its text and after each token of a draft.

    Each token is chosen as ever; while it is the one that the draft foresaw, the next row of logits is that of the text
    and the choice goes on, for up to one token more than the draft has. A drawn token is the draft's with the
    probability that it has, and otherwise of the others' distribution: this is rejection sampling of a certain draft
    (Leviathan et al., arXiv 2211.17192, algorithm 1), and draws the very text that is drawn without one.
    A token is chosen when it is asked for: stop asking where the text ends.
    """
    for row, foreseen in enumerate([*draft, None]):
        (said,) = choose([chooser], logits[row : row + 1], backend=backend)
        yield said
        if said.token != foreseen:
            return


def distribution(choosers: Sequence[Chooser], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """The probabilities with which `choose` would take each token next, of continuations that are not greedy."""
    chances = torch.zeros(logits.shape, device=logits.device)
    for share in drawing.shares([chooser.sampling for chooser in choosers], _steered(choosers, logits.float())):
        at = torch.arange(logits.shape[1], device=logits.device) if share.ids is None else share.ids
        chances[torch.tensor(share.rows, device=logits.device)[:, None], at] = share.weights
    return chances / chances.sum(-1, keepdim=True)


def log_probs_of(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], likeliest: int = 0, *, backend: Backend = TWIN
) -> list[Said]:
    """What the model says of tokens that are given, as those of a prompt; row i of `logits` is what comes before i."""
    _require_likeliest(likeliest, logits.shape[1])
    return _told(logits, tokens.to(logits.device, torch.long), backend.best(logits)[1], [likeliest] * len(tokens))


def _require_likeliest(likeliest: int, vocabulary: int) -> None:
    if likeliest > vocabulary:
        raise RecipeError(f"likeliest is {likeliest}", allowed=f"0 to {vocabulary}, the model's tokens")


def _told(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], normalisers: Tensor, likeliest: Sequence[int]
) -> list[Said]:
    """Each token with its log-probability, and the likeliest in its place; `normalisers` are log sum exp of a row."""
    log_probs = (logits.gather(1, tokens[:, None])[:, 0].float() - normalisers).tolist()
    best: list[list[tuple[int, float]]] = [[] for _ in log_probs]
    # Which of several that tie are told depends on how many are: not on what others want.
    for count in sorted(set(likeliest) - {0}):
        own = [row for row, wanted in enumerate(likeliest) if wanted == count]
        values, ids = (logits if len(own) == len(logits) else logits[own]).topk(count)
        found = (values.float() - normalisers[own][:, None]).tolist()
        for row, names, numbers in zip(own, ids.tolist(), found, strict=True):
            best[row] = list(zip(names, numbers, strict=True))
    told = zip(tokens.tolist(), log_probs, best, strict=True)
    return [Said(token, log_prob, tuple(row)) for token, log_prob, row in told]


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
    masks = [chooser.bound(logits.shape[1]) for chooser in choosers]
    guided = [row for row, mask in enumerate(masks) if mask is not None]
    if guided:
        mask = torch.stack([mask for mask in masks if mask is not None]).to(logits.device)
        steered = logits.to(torch.float32, copy=True) if steered is logits else steered
        steered[guided] = torch.where(mask, steered[guided], _NEVER)
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
    steered = logits.to(torch.float32, copy=True)
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


def _drawn(choosers: Sequence[Chooser], scores: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    settings, numbers = zip(*((chooser.sampling, chooser.uniform()) for chooser in choosers), strict=True)
    return drawing.drawn(settings, numbers, scores.float())


def _hashed(number: int) -> int:
    """64 bits in which those of `number` are mixed well: a step of splitmix64."""
    mask = 2**64 - 1
    number = (number + 0x9E3779B97F4A7C15) & mask
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
    return number ^ (number >> 31)
