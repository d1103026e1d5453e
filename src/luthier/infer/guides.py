"""Guides: what bounds the next token, such as a grammar."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Bool
from torch import Tensor


class Guide(ABC):
    """Says of one continuation, token by token, which tokens may come next.

    At least one may at every place: a guide whose text may only end allows the tokens that end it. A guide that has
    lost its place, or cannot go on, says so when it is asked what is allowed: it raises.
    """

    @abstractmethod
    def allowed(self) -> Bool[Tensor, " V"] | None:
        """Which tokens of the tokenizer may come next; None where all may."""

    @abstractmethod
    def said(self, token: int) -> None:
        """A token was said."""
