"""Keys that stay between passes, as attention sees them: who keeps them attends too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from luthier.kernels.backend import AddedTerms, TokenBlocks
from luthier.kernels.thin_pass import ThinPass


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

    def through(
        self,
        blocks: TokenBlocks,
        which: range,
        x: Float[Tensor, "n d"],
        angles: tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]],
        added: AddedTerms | None,
    ) -> Float[Tensor, "n d"] | None:
        """The layers `which` as whole blocks, keys kept and all, where there is a shorter way than their operations."""
        return None

    @property
    def laid_out(self) -> ThinPass | None:
        """The terms of the one adapter that is switched on for all rows, where they are laid out."""
        return None
