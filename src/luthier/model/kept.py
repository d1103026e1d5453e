"""Keys that stay between passes, as attention sees them: who keeps them attends too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from luthier.kernels.backend import BareBlock


@dataclass(frozen=True)
class AttentionCall:
    """How a layer of the zoo calls its attention: the factor of its logits, its window and its soft cap, if any."""

    scale: float | None
    window: int | None
    softcap: float | None


class KeptKeys(ABC):
    """Keys and values that stay between passes: of a pass it takes what is new, and attends over all."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: Float[Tensor, "n H D"],
        key: Float[Tensor, "n h D"],
        value: Float[Tensor, "n h E"],
        call: AttentionCall,
    ) -> Float[Tensor, "n H E"]:
        """The attention of the new tokens of all texts, which lie end to end, each over its text's keys so far."""

    def block(
        self,
        layer: int,
        x: Float[Tensor, "n d"],
        block: BareBlock,
        angles: tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]],
        call: AttentionCall,
    ) -> Float[Tensor, "n d"] | None:
        """A whole block with nothing on it, keys kept and all, where there is a shorter way than its operations."""
        return None
