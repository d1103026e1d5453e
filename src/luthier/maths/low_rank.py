"""Low-rank factors: what a product B A of two thin matrices may start as.

Idea: a start whose product is zero leaves a model as it is. A start from the matrix itself trains the directions that
matter most in it; the product is then no zero, and whoever uses it has to take it off again.
Equation: kaiming: A uniform in +-1/sqrt(in), B = 0; gaussian: A ~ N(0, 1/r^2), B = 0;
    orthogonal: Q of a random r x r matrix, A = (0.1 X Q_even)^T, B = 0.1 Y Q_odd, with X, Y ~ N(0, 1), so B A = 0;
    pissa: W = U S V^T, A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s), so s B A is W's best approximation of rank r;
    olora: W = Q R, A = the first r rows of R, B = the first r columns of Q.
Source: kaiming as in the reference implementation of LoRA (arXiv 2106.09685), gaussian and orthogonal as in PEFT (the
    latter after datta0.github.io/posts/rethink-lora-init); PiSSA: Meng et al., arXiv 2404.02948, equations 2 to 4;
    OLoRA: Bueyuekakyuez, arXiv 2406.01775, section 3.
Cost: pissa a singular value decomposition of W, olora its QR; the others nothing.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]
"""A and B."""


def kaiming(rank: int, inputs: int, outputs: int) -> Factors:
    """A uniform, B zero."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound), torch.zeros(outputs, rank)


def gaussian(rank: int, inputs: int, outputs: int) -> Factors:
    """A normal, B zero."""
    return torch.empty(rank, inputs).normal_(std=1 / rank), torch.zeros(outputs, rank)


def orthogonal(rank: int, inputs: int, outputs: int) -> Factors:
    """Rows of A and columns of B that see nothing of each other; `rank` is even."""
    turned, _ = torch.linalg.qr(torch.randn(rank, rank))
    down = torch.randn(inputs, rank // 2).mm(turned[0::2]).t() / 10
    up = torch.randn(rank // 2, outputs).t().mm(turned[1::2]) / 10
    return down.contiguous(), up.contiguous()


@torch.no_grad()
def principal(weight: Float[Tensor, "out in"], rank: int, scale: float) -> Factors:
    """The strongest singular vectors, weighted so that `scale` B A is the best approximation of that rank."""
    left, sizes, right = torch.linalg.svd(weight.float(), full_matrices=False)
    roots = (sizes[:rank] / scale).sqrt()
    return (roots[:, None] * right[:rank]).contiguous(), (left[:, :rank] * roots).contiguous()


@torch.no_grad()
def triangular(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """The first columns of Q and the first rows of R."""
    left, right = torch.linalg.qr(weight.float())
    return right[:rank].contiguous(), left[:, :rank].contiguous()
