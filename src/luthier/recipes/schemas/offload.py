"""Offload: what lies in the host's memory while a GPU trains, and what that asks of a recipe.

    optimizer     masters, gradients and what the optimizer keeps; the host's processor steps
    activations   the inputs of recomputed blocks
    both
"""

from __future__ import annotations

from typing import Literal

from luthier.core.errors import RecipeError
from luthier.kernels.lanes import Lane, StreamLane
from luthier.model.language_model import LanguageModel

Offload = Literal["none", "optimizer", "activations", "both"]


def optimizer_is_far(offload: Offload) -> bool:
    """Whether the host steps."""
    return offload in ("optimizer", "both")


def inputs_are_far(offload: Offload) -> bool:
    """Whether the inputs of recomputed blocks lie with the host."""
    return offload in ("activations", "both")


def require_device(offload: Offload, kind: str) -> None:
    """Raise RecipeError where there is no other memory than the host's."""
    if offload != "none" and kind != "cuda":
        raise RecipeError(
            f"offload is {offload!r}, and the model is on {kind}, whose memory is the host's",
            allowed="offload: none, or a model on a GPU",
            do="leave offload out; optimizer.method paged_adamw keeps moments on a disk, beside a CPU",
        )


def require_recomputed(offload: Offload, recompute: str | int, *, within: str = "") -> None:
    """Raise RecipeError where inputs of recomputed blocks are to be moved and none is recomputed; `within` is what
    stands before both keys."""
    if inputs_are_far(offload) and recompute in ("none", 0):
        raise RecipeError(
            f"{within}offload is {offload!r}, which moves the inputs of recomputed blocks, and {within}recompute is "
            f"{recompute!r}",
            allowed=f"{within}recompute: auto, all, or a number of blocks",
        )


def require_blocks(offload: Offload, recomputable: int) -> None:
    """Raise RecipeError where no block can be recomputed, so that no input of one could go anywhere."""
    if inputs_are_far(offload) and not recomputable:
        raise RecipeError(
            f"offload is {offload!r}, and the model zoo runs this model's blocks, of which none is recomputed",
            allowed="none or optimizer",
        )


def lane_to_host(offload: Offload, model: LanguageModel) -> Lane | None:
    """The lane that a recipe asks for; None where all stays where it is. Raises RecipeError where there can be none."""
    require_device(offload, model.device.type)
    require_blocks(offload, model.recomputable)
    return None if offload == "none" else StreamLane(model.device)
