"""The sync probe: whether an engine somewhere else computes the model that we have, adapter included.

Idea: the log-probabilities that the engine tells of some tokens are compared with ours, once of texts that it is given
and once of what it says itself, for the kernels that read are not those that speak. Numbers alone do not say what is
wrong, so they are held against our base too: how far the engine has moved from the base in the direction of the adapter
is the adapter's `share`. 1 is right, 0 is an engine that ignores it, one half is a scale read as half. The engine's
base against ours tells another base, and what mere rounding costs there.
Equation: with d = adapter - base of our log-probabilities and e = theirs - our base, share = <d, e> / <d, d>, with a
    standard error of |e - share d| / (|d| sqrt(n)).
Source: ours; the mismatch of sampler and trainer that it is to catch is described by Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025.
Cost: some dozen requests of some dozen tokens, and the same tokens in one pass of ours, with and without the adapter.
Use when: another engine is to serve or to roll out what we have trained; a `RemoteSpeaker` cannot be had without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np

from luthier.core.errors import GateError, RecipeError
from luthier.data.forest import Ints
from luthier.infer.dialects import BASE, Dialect
from luthier.model.speaker import Sampling

Score = Callable[[Sequence[Ints]], list[list[float]]]
"""Log-probabilities of the tokens of some texts, each but the first, by a model of ours."""
TOLERANCE: Final = 0.05
"""Mean |difference| of two log-probabilities: bfloat16 logits alone make 0.01 to 0.03."""
WORST: Final = 20.0
"""How much more a single token may differ."""
SHARE: Final = 0.1
"""How far from 1 the adapter's share may be."""
RESIDUE: Final = 0.05
"""What may be left beside the adapter's own change, as a share of it, beyond thrice what rounding does to the base."""
SAID: Final = 16
"""Tokens that the engine says after each text."""


@final
@dataclass(frozen=True)
class Distance:
    """How far two lists of log-probabilities are apart: in the mean, in the quadratic mean, and at most."""

    mean: float
    root: float
    worst: float

    @classmethod
    def of(cls, found: Sequence[float], wanted: Sequence[float]) -> Distance:
        """Of two lists of the same tokens."""
        apart = np.abs(np.array(found) - np.array(wanted))
        return cls(float(apart.mean()), float(np.sqrt(np.mean(apart**2))), float(apart.max()))

    def within(self, tolerance: float) -> bool:
        """Whether rounding may have done it."""
        return self.mean <= tolerance and self.worst <= WORST * tolerance

    def __str__(self) -> str:
        return f"{self.mean:.4f} in the mean and {self.worst:.3f} at most"


@final
@dataclass(frozen=True, kw_only=True)
class Sync:
    """What a probe has found. `wrong` says what is the matter, and is empty where the engine computes our model.

    `apart` is the engine against us. Where there is an adapter, `from_base` is the engine against our base, `base` the
    engine's base against ours, `effect` our adapter against our base, and `share` how much of it the engine computes,
    give or take `error`. `renewed` is how much there is of what has changed since earlier weights, if it can be told.
    Where the engine was `proved` to compute such adapters, one is let pass where it is no further away than rounding
    makes the base, for one that is small cannot be told from that.
    """

    model: str
    texts: int
    tokens: int
    tolerance: float
    apart: Distance
    from_base: Distance | None = None
    base: Distance | None = None
    effect: Distance | None = None
    share: float | None = None
    error: float | None = None
    renewed: float | None = None
    proved: bool = False

    @property
    def fine(self) -> bool:
        """Whether the engine computes our model."""
        return not self.wrong

    @property
    def left(self) -> float:
        """What the engine's move from the base has beside the adapter's direction, in the quadratic mean."""
        if self.error is None or self.effect is None:
            return 0.0
        return self.error * math.sqrt(self.tokens) * self.effect.root

    @property
    def wrong(self) -> str:
        """What is the matter, the first thing that is: a wrong base makes the rest meaningless."""
        if self.base is not None and not self.base.within(self.tolerance):
            return f"its base is not ours: log-probabilities differ by {self.base} without any adapter"
        told = self._of_adapter()
        if not told and not self.apart.within(self.tolerance):
            told = f"it computes another model: log-probabilities differ by {self.apart}"
        return told

    def require(self) -> None:
        """Raise GateError where the engine does not compute our model."""
        if self.wrong:
            raise GateError(
                f"the engine does not compute {self.model or 'the base'} as we do: {self.wrong}",
                allowed=f"a mean difference of {self.tolerance} over {self.tokens} tokens",
                do="look at its base, its precision and how it was started; luthier lint tells what it takes amiss",
            )

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        pairs = {"apart": self.apart, "from_base": self.from_base, "base": self.base, "effect": self.effect}
        shown = {name: None if one is None else {"mean": one.mean, "worst": one.worst} for name, one in pairs.items()}
        return {"model": self.model, "texts": self.texts, "tokens": self.tokens, "tolerance": self.tolerance, **shown,
                "share": self.share, "renewed": self.renewed, "fine": self.fine, "wrong": self.wrong}  # fmt: skip

    def _of_adapter(self) -> str:
        """What is wrong with how the adapter is computed."""
        if self.share is None or self.error is None or self.effect is None:
            return ""
        rounding = 3 * self.base.root if self.base is not None else self.tolerance
        if self.proved and self.apart.root <= rounding:
            return ""
        if self.from_base is not None and self.from_base.root < self.apart.root / 4 and self.share < 0.5:
            return f"it ignores the adapter: its numbers are the base's, and differ by {self.apart} from ours"
        if self.renewed is not None and self.renewed < 0.5:
            return f"it goes on with the adapter's weights as they were: {self.renewed:.2f} of the change has come"
        if self.error > SHARE:
            if self.proved or not self.apart.within(self.tolerance):
                return ""
            return (f"nobody can tell whether it has the adapter, which changes log-probabilities by {self.effect} on "
                    f"these texts, while the engine is {self.apart} away")  # fmt: skip
        # What rounding adds to our own change is in none of theirs, so it makes the share smaller.
        hidden = (self.base.root / self.effect.root) ** 2 if self.base is not None else 0.0
        away = abs(self.share - 1) > SHARE + 2 * self.error + hidden
        if away or self.apart.root > rounding + RESIDUE * self.effect.root:
            return (f"it computes the adapter otherwise, as with another lora_alpha or with weights of another step: "
                    f"{self.share:.2f} of its change, {self.left:.3f} beside it, {self.apart} from ours")  # fmt: skip
        return ""


@final
@dataclass(frozen=True)
class _Piece:
    """A text, from where its tokens are compared, and what the engine tells of them."""

    tokens: Ints
    start: int
    theirs: list[float]


def probe(
    engine: Dialect,
    model: str,
    texts: Sequence[Ints],
    *,
    ours: Score,
    base: Score | None,
    before: Score | None = None,
    proved: bool = False,
    tolerance: float = TOLERANCE,
    said: int = SAID,
) -> Sync:
    """Compare an engine's `model` with ours on some texts; `base` is our model without the adapter, if there is one,
    and `before` ours as it was when the engine got it last; for `proved` see `Sync`. The engine says `said` tokens
    after half of each text.

    Raises RemoteError for an engine that does not answer as it should. What is found is told, good or bad:
    `Sync.require` refuses.
    """
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise RecipeError(f"a probe with {len(texts)} texts of two tokens and more", allowed="at least one")
    pieces = _told(engine, model, texts, said)
    mine = _lined_up(ours, pieces)
    theirs = [each for piece in pieces for each in piece.theirs]
    found = Sync(model=model, texts=len(texts), tokens=len(theirs), tolerance=tolerance,
                 apart=Distance.of(theirs, mine))  # fmt: skip
    if base is None:
        return found
    plain = _lined_up(base, pieces)
    alone = _told(engine, BASE, texts, said)
    share, error = _share(np.array(theirs) - plain, np.array(mine) - plain)
    renewed = None
    if before is not None:
        old = _lined_up(before, pieces)
        new, sure = _share(np.array(theirs) - old, np.array(mine) - old)
        renewed = new if sure < 0.25 else None
    bare = Distance.of([each for piece in alone for each in piece.theirs], _lined_up(base, alone))
    return replace(
        found, from_base=Distance.of(theirs, plain), base=bare, effect=Distance.of(mine, plain), share=share,
        error=error, renewed=renewed, proved=proved,
    )  # fmt: skip


def _told(engine: Dialect, model: str, texts: Sequence[Ints], said: int) -> list[_Piece]:
    """What the engine tells of the texts, and of what it says after the first half of each."""
    pieces = [_Piece(text, 1, engine.score(text, model)) for text in texts] if engine.scores else []
    for number, text in enumerate(texts):
        prompt = text[: max(1, len(text) // 2)]
        # At temperature 1 it says what is not too likely, where differences show.
        spoken = engine.speak(prompt, Sampling(max_new_tokens=said, temperature=1.0, seed=number), model)
        pieces.append(_Piece(np.concatenate([prompt, spoken.tokens]), len(prompt), spoken.log_probs))
    return pieces


def _lined_up(score: Score, pieces: Sequence[_Piece]) -> list[float]:
    """Our log-probabilities of the same tokens."""
    found = score([piece.tokens for piece in pieces])
    return [each for piece, told in zip(pieces, found, strict=True) for each in told[piece.start - 1 :]]


def _share(moved: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """How much of the wanted change there is, and the standard error of that."""
    power = float(wanted @ wanted)
    if power == 0:
        return 0.0, math.inf
    share = float(wanted @ moved) / power
    left = moved - share * wanted
    return share, math.sqrt(float(left @ left) / max(1, len(wanted) - 1) / power)
