"""Training in closed formulas that hold for any engine: what a parameter costs, activations, FLOPs, and sharding.

Idea: these are the figures of papers and handbooks, for a first look and for comparison with what others report. What
luthier's own engine takes is counted tensor by tensor (memory.py, counted.py), and that is what a plan promises.
Equation: a trained parameter: weight + gradient + float32 master + state of the optimizer. Activations of a GPT block
    in 16 bits, s tokens, b rows, width h, a heads, t devices that share its tensors: sbh (10 + 24/t + 5 a s / (h t))
    bytes; without the s x s tensors of attention ("selective", and what flash attention keeps) sbh (10 + 24/t); with
    the input alone ("full") 2 sbh, and one block. FLOPs a token: 6 N, 4 N where the base is frozen, 2 N more where all
    is made again, and 12 L a s for attention (half of it where it looks back only). ZeRO 1, 2, 3 divide the optimizer's
    state, then gradients, then parameters by the number of devices.
Source: Korthikanti et al., arXiv 2205.05198, equations 1, 2, 4 and table 2 (dropout masks of one byte; no gate);
    Rajbhandari et al., arXiv 1910.02054, section 5; Kaplan et al., arXiv 2001.08361, section 2.1 (N without the table).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Recompute = Literal["none", "selective", "full"]
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]

_SHARDED: Final[Mapping[Sharding, tuple[str, ...]]] = {
    "none": (),
    "zero1": ("optimizer", "masters"),
    "zero2": ("optimizer", "masters", "gradients"),
    "zero3": ("optimizer", "masters", "gradients", "weights"),
    "fsdp": ("optimizer", "masters", "gradients", "weights"),
}
"""What each way divides by the number of devices; FSDP with full sharding is ZeRO 3."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of each trained parameter: as it computes, its gradient, its float32 master, and the optimizer's state."""

    weight: float = 2
    gradient: float = 4
    master: float = 4
    optimizer: float = 8

    @property
    def total(self) -> float:
        """Bytes a trained parameter in all."""
        return self.weight + self.gradient + self.master + self.optimizer


def state_bytes(
    trained: int, state: State, *, frozen: float = 0.0, devices: int = 1, sharding: Sharding = "none"
) -> dict[str, float]:
    """Bytes on each device by part; `frozen` are the bytes of weights that are not trained."""
    parts = {
        "weights": frozen + trained * state.weight,
        "gradients": trained * state.gradient,
        "masters": trained * state.master,
        "optimizer": trained * state.optimizer,
    }
    return divided(parts, devices, sharding)


def divided(parts: Mapping[str, float], devices: int, sharding: Sharding) -> dict[str, float]:
    """Parts as each of several devices holds them."""
    shared = _SHARDED[sharding]
    return {name: size / devices if name in shared else size for name, size in parts.items()}


def activation_bytes(
    *,
    sequence: int,
    batch: int,
    hidden: int,
    heads: int,
    layers: int,
    recompute: Recompute = "none",
    tensor_parallel: int = 1,
) -> float:
    """Activations of a GPT's blocks in 16 bits, by Korthikanti's formulas; the head and its logits come on top."""
    t, tokens = tensor_parallel, sequence * batch
    light = tokens * hidden * (10 + 24 / t)
    squares = 5 * heads * sequence * sequence * batch / t
    if recompute == "selective":
        return layers * light
    # What is made again is there for one block at a time.
    return layers * (light + squares) if recompute == "none" else 2 * layers * tokens * hidden + light + squares


def logit_bytes(*, tokens: int, vocabulary: int, number: int = 4, copies: int = 2) -> int:
    """Logits that exist all at once, with their gradient: what an engine without a chunked head takes."""
    return tokens * vocabulary * number * copies


def model_flops(
    parameters: float,
    *,
    layers: int,
    width: int,
    sequence: int,
    trained_base: bool = True,
    recompute: Recompute = "none",
    causal: bool = True,
) -> float:
    """FLOPs of a training token, forward and backward; `width` is heads times head size.

    `parameters` are those of products: blocks and head. A frozen base needs gradients of what goes in, not of weights.
    """
    again = 2 if recompute == "full" else 0
    attention = 12 * layers * width * sequence / (2 if causal else 1)
    repeated = {"none": 1.0, "selective": 4 / 3, "full": 4 / 3}[recompute]
    return ((6 if trained_base else 4) + again) * parameters + attention * repeated
