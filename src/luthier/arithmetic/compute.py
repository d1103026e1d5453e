"""FLOPs and bytes of training, from sizes and from what is trained; and how fast a machine could do that at most.

Idea: a token's work is that of the matrix products it goes through. Each is made once forward, once more for the
gradient of its input if anything that is trained lies below, and once more for its own gradient if it is trained. So a
frozen base costs 4 FLOPs a parameter where full tuning costs 6, and layers below the lowest adapter cost 2.
Equation: linear layer: 2 in out (1 + below + trained); low-rank term: 2 r (2 in + 3 out + below in); attention:
    4 c q (1 + 2.5 below) for c attended positions and q, heads times head size; all of it for the share of tokens that
    goes there: the head sees those that are predicted, an encoder texts, a decoder above it answers. A token attends to
    half of its text from left to right, to all of it both ways, and an answer's to all of the text it reads. Limit:
    tokens / max(FLOPs / matrix rate, bytes / bandwidth).
Source: multiplication and addition count as 2; the backward pass of flash attention computes its products anew, hence
    2.5 (arXiv 2205.14135). What recomputation, padding or logits without a label would add need not be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer: its sizes, the ranks of what is beside it, and what of it needs a gradient.

    `below` is whether its input needs one. `share` is the part of all tokens that goes through it.
    """

    inputs: int
    outputs: int
    rank: int = 0
    trained: bool = False
    below: bool = True
    share: float = 1.0

    def flops(self) -> float:
        """FLOPs of a token, forward and backward."""
        matrix = 2 * self.inputs * self.outputs * (1 + self.below + self.trained)
        thin = 2 * self.rank * (2 * self.inputs + 3 * self.outputs + self.below * self.inputs)
        return self.share * (matrix + thin)

    def forward(self) -> float:
        """FLOPs of a token in a forward pass."""
        return 2 * self.share * (self.inputs * self.outputs + self.rank * (self.inputs + self.outputs))


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of one layer: `width` is heads times head size, `context` the mean of positions a token attends to.

    `share` is the part of all tokens that attend here.
    """

    width: int
    context: float
    below: bool = True
    share: float = 1.0

    def flops(self) -> float:
        """FLOPs of a token, forward and backward."""
        return self.forward() * (1 + 2.5 * self.below)

    def forward(self) -> float:
        """FLOPs of a token in a forward pass."""
        return self.share * 4 * self.context * self.width


def flops_per_token(linears: Sequence[Linear], attentions: Sequence[Attention]) -> float:
    """FLOPs of one training token on average."""
    return sum(layer.flops() for layer in linears) + sum(layer.flops() for layer in attentions)


def forward_flops(linears: Sequence[Linear], attentions: Sequence[Attention]) -> float:
    """FLOPs of one token on average in a forward pass: what it costs to recompute these."""
    return sum(layer.forward() for layer in linears) + sum(layer.forward() for layer in attentions)


def bytes_per_token(
    linears: Sequence[Linear], *, number: int, at_once: int, parameters: int, step_tokens: int, looks: float = 0.0
) -> float:
    """A token's share of the traffic of weights and optimizer, in bytes; activations stay in caches where they can.

    Weights of `number` bytes each are read once forward and once backward for `at_once` tokens, and a step over
    `step_tokens` reads and writes weight and two moments of each of `parameters`, and reads and clears its gradient.
    Forward passes beside the training, `looks` of them, read the weights once more each.
    """
    read = sum(number * layer.inputs * layer.outputs * (1 + layer.below + looks) for layer in linears)
    return read / max(1, at_once) + 32 * parameters / max(1, step_tokens)


def limit(flops: float, traffic: float, *, flops_per_second: float, bytes_per_second: float) -> float:
    """Tokens a second that cannot be exceeded with these FLOPs and bytes a token."""
    return 1 / max(flops / flops_per_second, traffic / bytes_per_second)


def mean_context(lengths: Sequence[int]) -> float:
    """Positions that a token of texts of these lengths attends to on average, itself included."""
    total = sum(lengths)
    return sum(length * (length + 1) / 2 for length in lengths) / total if total else 0.0
