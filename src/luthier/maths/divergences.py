"""Divergences: how far one distribution over next tokens is from another, summed over the whole vocabulary.

Idea: the likelihood of one sampled token is a noisy word about two policies that both know a number for every token.
Where the logits of both are at hand, the sum over the vocabulary says the same without noise. Forward KL makes the
student cover whatever the teacher may say, reverse KL makes it keep to what the teacher is sure of, and the generalised
Jensen-Shannon divergence lies between the two.
Equation: forward sum_v t (log t - log s); reverse sum_v s (log s - log t);
    jsd: b sum_v t (log t - log m) + (1 - b) sum_v s (log s - log m) with m = b t + (1 - b) s.
Source: Agarwal et al., On-policy distillation of language models (GKD), arXiv 2306.13649, section 2 and equation 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class Comparison:
    """What is measured: the kind of divergence, and the teacher's `share` in the middle of jsd."""

    kind: Divergence
    share: float = 0.5


def divergences(
    student: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], comparison: Comparison
) -> Float[Tensor, " n"]:
    """The divergence of each row, from log-probabilities."""
    kind, share = comparison.kind, comparison.share
    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    middle = torch.logaddexp(teacher + math.log(share), student + math.log1p(-share))
    return share * kl(teacher, middle) + (1 - share) * kl(student, middle)


def kl(of: Float[Tensor, "n V"], to: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(of || to) of each row, from log-probabilities; what is impossible under `of` counts nothing."""
    probabilities = of.exp()
    return torch.where(probabilities > 0, probabilities * (of - to), 0.0).sum(-1)
