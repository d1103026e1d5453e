"""Speaker: something that continues token sequences and says how likely what it said was.

The protocol lives here, below the machines, so that training can sample without knowing the generation engine, and the
engine can be swapped for a remote one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing.

    Generation of a row ends at a token of `stop_ids`, at a string of `stop`, or after `max_new_tokens`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise RecipeError(f"{name} is {getattr(self, name)}", allowed=allowed)


@dataclass(frozen=True)
class Spoken:
    """A continuation: its tokens (the stop token included), the log-probability of each under the model itself
    (before temperature and cuts), and why it ended: "stop" or "length"."""

    tokens: Ints
    log_probs: list[float]
    ended: str


class Speaker(Protocol):
    """Continues prompts."""

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in order."""
