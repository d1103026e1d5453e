"""Speaker: something that continues token sequences and says how likely what it said was.

The protocol lives here, below the machines, so that training can sample without knowing the generation engine, and the
engine can be swapped for a remote one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from luthier.core.errors import RecipeError
from luthier.core.waiting import Waits
from luthier.data.forest import Ints

Likely = tuple[tuple[int, float], ...]
"""Tokens with their log-probabilities, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 cut nothing.

    `min_p` drops what is less likely than that share of the likeliest. `repetition_penalty` divides the positive logits
    of tokens that the prompt or the answer holds, and multiplies the negative ones; `presence_penalty` is taken off the
    logit of each token that was said, `frequency_penalty` as often as it was; `logit_bias` is added to logits of single
    tokens. Generation of a row ends at a token of `stop_ids` (not among the first `min_new_tokens`), at a string of
    `stop`, or after `max_new_tokens`. `likeliest` is how many of the likeliest tokens are told with each that was said;
    with `prompt_log_probs` the same is told of the prompt's tokens.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    likeliest: int = 0
    prompt_log_probs: bool = False

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):
            raise RecipeError(f"stop is the text {stop!r:.80}", allowed="a tuple of texts", do="write (text,)")
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, f"0 to {self.max_new_tokens}"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p < 1, "0 (off) or more, below 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 is none"),
            "presence_penalty": (-100 <= self.presence_penalty <= 100, "-100 to 100; 0 is none"),
            "frequency_penalty": (-100 <= self.frequency_penalty <= 100, "-100 to 100; 0 is none"),
            "likeliest": (self.likeliest >= 0, "0 (none) or more"),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise RecipeError(f"{name} is {getattr(self, name)}", allowed=allowed)

    @property
    def told_at(self) -> float:
        """The temperature of the softmax whose log-probabilities are told."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class PolicySampling(Sampling):
    """Sampling of what a policy is trained on: log-probabilities are told at the temperature of the draw, and nothing
    is cut off or steered, for the policy that is trained is the whole softmax."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        plain = Sampling()
        names = ("min_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "logit_bias")  # fmt: skip
        found = next((name for name in names if getattr(self, name) != getattr(plain, name)), None)
        if found is not None or self.temperature == 0:
            name = found or "temperature"
            raise RecipeError(
                f"{name} is {getattr(self, name)}, and the tokens' log-probabilities are to be trained on",
                allowed="sampling from the whole softmax at a temperature above 0: a policy that is cut off or steered "
                "is another than the one that is trained",
            )

    @property
    def told_at(self) -> float:
        return self.temperature


@dataclass(frozen=True)
class Spoken:
    """A continuation: its tokens (the stop token included), the log-probability of each under the model itself
    (before temperature, penalties and cuts, save for a PolicySampling), and why it ended: "stop" or "length".

    `likeliest` has, for each token, the likeliest ones in its place, if they were asked for.
    """

    tokens: Ints
    log_probs: list[float]
    ended: str
    likeliest: tuple[Likely, ...] = ()


@runtime_checkable
class Speaker(Protocol):
    """Continues prompts."""

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in order."""


class Pinned(Speaker, Protocol):
    """Says what a policy would have said when it was pinned, whatever its weights have become; from any thread."""

    @property
    def weights(self) -> Mapping[str, NDArray[Any]]:
        """The weights it speaks with, as they may be saved, and pinned again."""

    @property
    def lost(self) -> bool:
        """Whether it could not speak because the weights were lost there."""


@runtime_checkable
class SpeakerElsewhere(Speaker, Protocol):
    """Continues prompts outside of this process."""

    @property
    def waits(self) -> Waits:
        """How it is waited for."""

    def pinned(self, sampling: Sampling, weights: Mapping[str, NDArray[Any]] | None = None) -> Pinned:
        """The weights as they are now, or others, handed over to be sampled from in this way."""

    def told(self) -> Mapping[str, Any]:
        """What was found out about it since this was last asked, as plain values."""

    def end(self) -> None:
        """Have whoever still waits for an answer, in whatever thread, wait no longer."""

    def close(self) -> None:
        """Let go of what it holds there."""
