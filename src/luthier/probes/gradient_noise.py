"""Gradient noise: how many rows a step may have before more of them are wasted.

Idea: below the noise scale, twice the rows in a step save nearly half of the steps; above it they save next to none. It
is small at the start of training and grows as the loss falls, so what is measured at the tuned model is the largest
batch that would have made sense. It does not say which one is best for the final loss.
Equation: B_simple = tr(Sigma) / |G|^2, both estimated without bias from the norms of the gradients of micro-batches
    and of their mean.
Source: McCandlish, Kaplan, Amodei et al., arXiv 1812.06162, section 2.2 and appendix A.1.
Cost: a forward and a backward pass over micro_batches times the rows of one.
Use when: a batch size is to be chosen, or training is to be made faster on more devices.
Not when: there are a few dozen rows: they are all in one step anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.maths.gradient_noise import Noise, noise_of
from luthier.model.comparing.pair import Pair
from luthier.probes import Concern, Probe, Report, Table, require_finite


@final
class GradientNoise(Probe):
    """The simple noise scale at the tuned model."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    concern: ClassVar[Concern] = "knobs"
    by_name_only: ClassVar[bool] = True

    micro_batches: int = Field(32, ge=2, description="gradients that are taken; more make the estimate steadier")

    def look(self, pair: Pair) -> Report:
        source = pair.gradients
        if source is None:
            return Report(verdict=("No gradients are known.",), measured=False)

        def watched() -> Iterator[Float[Tensor, " n"]]:
            for done, each in enumerate(source.each(self.micro_batches)):
                pair.tell("gradient_noise", done, self.micro_batches)
                yield each

        found = noise_of(watched(), source.rows)
        if found.micro_batches < 2:
            sentence = "The run has too few rows for two micro-batches: nothing can be said of noise."
            return Report(verdict=(sentence,), measured=False)
        require_finite("the gradient's norm", found.small)
        tokens = None if found.scale is None else found.scale * source.row_tokens
        return Report(
            verdict=_verdict(found, source.step_rows),
            numbers={
                "noise_scale_rows": found.scale,
                "noise_scale_tokens": tokens,
                "signal": found.signal,
                "noise": found.noise,
                "micro_batches": found.micro_batches,
                "rows_of_a_step": source.step_rows,
            },
            tables=(Table(title="Squared norms of gradients", heads=("of", "rows", "mean squared norm"),
                          rows=[["a micro-batch", found.rows, found.small],
                                ["all of them", found.rows * found.micro_batches, found.large],
                                ["the true gradient, estimated", None, found.signal]]),),
        )  # fmt: skip


def _verdict(found: Noise, step_rows: float) -> tuple[str, ...]:
    scale = found.scale
    if found.small == 0:
        return ("All gradients are zero here: there is nothing left to learn, or nothing that is trained.",)
    if scale is None:
        return (
            f"In {found.micro_batches} micro-batches of {found.rows} rows noise drowns the gradient; its scale is over "
            f"their {found.micro_batches * found.rows} rows. More of them tell: --set gradient_noise.micro_batches=N.",
        )
    start = f"The noise scale is about {scale:.3g} rows; a step of this run has {step_rows:.3g}."
    if step_rows < scale / 2:
        return (start, "Larger steps would pay: twice the rows take nearly half the steps, at a learning rate that is "
                       "raised with them.")  # fmt: skip
    if step_rows > 2 * scale:
        return (start, "Steps are larger than pays: half the rows would take hardly more steps.")
    return (start, "That is about the size at which time and data are balanced.")
