"""How far an artefact may be from what it was made from, by the form of its weights and not by the model.

Idea: rounding is no damage, and how much of it there is belongs to the form that numbers are written in. Bounds are
measured (docs/export.md has the figures and their command) and stand well above what rounding alone does.
Use with parity.py, which measures; the forms of GGUF have theirs in `model/gguf/parts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch

from luthier.core.units import percent_text
from luthier.model.load import Precision


@final
@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What is let pass: `difference` in standard deviations of the source's logits, `kl` in nats a token.

    `form` says what of the artefact makes it necessary. `agreement` is needed of the tokens that are no near ties:
    which of two words is ahead by less than `tie` standard deviations, rounding decides. `weights` is how far a tensor
    may be from its like in the source, as a share of its norm, where both have it by name: among many layers one wrong
    one hardly shows in logits.
    """

    form: str
    difference: float
    kl: float
    tie: float
    agreement: float = 0.99
    weights: float | None = None

    def loosest(self, other: Tolerance) -> Tolerance:
        """What has to be let pass where both round, in the words of this one; no tensors where either compares none."""
        weights = None if self.weights is None or other.weights is None else max(self.weights, other.weights)
        return Tolerance(form=self.form, difference=max(self.difference, other.difference), kl=max(self.kl, other.kl),
                         tie=max(self.tie, other.tie), agreement=min(self.agreement, other.agreement),
                         weights=weights)  # fmt: skip

    def bounds(self) -> str:
        """What is let pass, in words."""
        share = percent_text(self.agreement)
        return (f"{self.form}: {self.difference:g} of the spread, KL {self.kl:g}, and {share} of the likeliest tokens, "
                f"where they are ahead by more than {self.tie:g} of the spread")  # fmt: skip


EXACT: Final = Tolerance(form="weights in float32", difference=1e-3, kl=1e-6, tie=1e-3, weights=1e-6)
HALF: Final = Tolerance(form="weights in float16", difference=0.03, kl=1e-5, tie=0.01, weights=2e-3)
BRAIN: Final = Tolerance(form="weights in bfloat16", difference=0.5, kl=2e-3, tie=0.05, weights=4e-3)
COARSE: Final = Tolerance(form="weights and products in bfloat16", difference=1.2, kl=5e-3, tie=0.15, weights=4e-3)


def tolerance_for(dtype: torch.dtype, *, computed: Precision = "float32") -> Tolerance:
    """What is let pass for weights that are written in `dtype`, where both sides compute in `computed`.

    The largest difference is that of the few tokens where a model is at its most sensitive: among 512 tokens of the
    seedling it is several times that of a hundred. So bounds are at least one and a half times what rounding alone does
    in 12,288 tokens of prose (docs/export.md has the figures and their command); what is wrong in a tensor is found by
    its sketch. Random models are nearly undecided between words: there a tenth of the likeliest changes at a mean KL of
    4e-4, so near ties convict nobody.
    """
    if computed != "float32":
        return COARSE
    return {torch.float32: EXACT, torch.float16: HALF}.get(dtype, BRAIN)
