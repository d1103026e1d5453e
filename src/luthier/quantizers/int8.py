"""int8: eight bits a weight, one scale a row; activations too, but for outliers, if wanted (LLM.int8).

Idea: each output's weights are divided by a 127th of the largest of them and rounded. Activations stay as they are, or
with `outlier_threshold` are rounded the same way, token by token, so that products are of whole numbers. A few features
have values far above all others, and would take the scale for themselves: features with a value beyond the threshold
are multiplied as they are, for all tokens.
Equation: s_i = max_j |W_ij| / 127, q_ij = round(W_ij / s_i); y = x (s q)^T. With a threshold a and the outliers
    O = {j : some |x_tj| >= a}: y_t = c_t s (p_t q^T) + x_tO (s q_O)^T, c_t = max |x_tj| below a / 127,
    p_tj = round(x_tj / c_t) outside O, else 0. The gradient of x is dy s q: rounding passes it on.
Source: weight-only quantization as surveyed by Weng, "Large Transformer Model Inference Optimization" (2023);
    symmetric, one scale an output as in torchao's int8_weight_only. LLM.int8(): Dettmers et al., arXiv 2208.07339,
    section 3, a = 6; as in bitsandbytes outlier columns of W are kept in eight bits as the others are.
Cost: 8 bits a weight and 32 a row; unpacking for each product, on a CPU within its caches for up to 32 or 128 rows, and
    not at all where it multiplies whole numbers (AVX512 with VNNI): there bfloat16 activations of up to 32 rows become
    whole numbers of two bytes, which costs them less than becoming bfloat16 did. A weight is off by s / 2 at most.
    With a threshold a forward product of 2,048 x 896 x 4,864 took 39 to 50 ms on two cores with VNNI: half of what
    weights alone take in float32, but twice what they take in bfloat16; the backward pass is as before. It saves no
    time.
Use when: half of bfloat16's memory is enough. A threshold: to compute what LLM.int8 inference will compute.
Not when: it is not: nf4 takes half of this again. A threshold: results must not depend on what is computed together,
    since other tokens of a micro-batch decide about outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from jaxtyping import Float, Int8
from pydantic import Field
from torch import Tensor

from luthier.kernels.backend import Backend, RowCodes
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer

ROWS: Final = 1024
"""Tokens whose products of whole numbers are made at once: they are wider than what comes of them."""
PIECE: Final = 1 << 22
"""Numbers that are packed at once."""
EXACT: Final = 1040
"""Products of two codes whose sum float32 holds without rounding: 2^24 / 127^2."""


@final
class RowInt8(Quantizer):
    """Symmetric, a scale for each output."""

    provides: ClassVar[frozenset[str]] = frozenset({"packed-weights"})

    outlier_threshold: float | None = Field(
        None, gt=0, description="round activations too, but for features with a value this large (6.0); empty: never"
    )

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        shape = (weight.shape[0], weight.shape[1])
        # Some rows at a time: a head in float32 takes more memory than the whole model that is packed.
        parts = [_packed_rows(own.float().contiguous()) for own in weight.split(max(1, PIECE // max(1, shape[1])))]
        codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        return Int8Packing(shape, codes, scales, self.outlier_threshold, backend)

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        return shape[0] * shape[1] + 4 * shape[0]


@final
@dataclass(frozen=True)
class Int8Packing(Packing):
    """Codes from -127 to 127, and a scale for each row."""

    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, " out"]
    outlier_threshold: float | None
    backend: Backend

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self.backend.unpacked_rows(self.codes, self.scales, dtype)

    def as_codes(self) -> RowCodes | None:
        return RowCodes(self.codes, self.scales) if self.outlier_threshold is None else None

    @property
    def rows_apart(self) -> bool:
        # Which columns hold outliers is asked of all rows.
        return self.outlier_threshold is None and self.backend.few > 0

    def product(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"] | None:
        if self.outlier_threshold is None:
            ours = self.backend.multiplies_bytes(len(x), x.dtype)
            return self.backend.product_of_bytes(x, self.codes, self.scales) if ours else None
        outliers = x.abs() >= self.outlier_threshold
        columns = outliers.any(0)
        chosen = columns.nonzero().view(-1)
        found = x.new_empty(len(x), self.shape[0])
        for start in range(0, len(x), ROWS):
            own = slice(start, start + ROWS)
            inside = x[own].float().masked_fill(outliers[own], 0)
            steps = inside.abs().amax(1) / 127
            codes = (inside / torch.where(steps > 0, steps, 1.0)[:, None]).round_().masked_fill_(columns, 0)
            found[own] = whole_product(codes.to(torch.int8), self.codes).mul_(steps[:, None]).mul_(self.scales)
        if len(chosen):
            found.addmm_(x[:, chosen], torch.mul(self.codes[:, chosen], self.scales[:, None]).to(x.dtype).t())
        return found


def _packed_rows(wide: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, " out"]]:
    """The codes and scales of some rows."""
    scales = wide.abs().amax(1) / 127
    # A row of zeros keeps a scale of zero, and divides by one.
    return (wide / torch.where(scales > 0, scales, 1.0)[:, None]).round_().to(torch.int8), scales


def whole_product(left: Int8[Tensor, "n in"], right: Int8[Tensor, "out in"]) -> Float[Tensor, "n out"]:
    """The product of whole numbers, in float32 at the end."""
    if left.device.type == "cpu":
        return torch._int_mm(left, right.t()).float()
    # What a card has for it is not for every shape. Sums of so few products are exact in float32.
    parts = zip(left.split(EXACT, 1), right.split(EXACT, 1), strict=True)
    return torch.stack([one.float() @ other.float().t() for one, other in parts]).sum(0)
