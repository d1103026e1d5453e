"""int4 in groups: four bits a weight between the smallest and the largest of a group.

Idea: the range of a group of neighbouring inputs is cut into fifteen equal steps; the group keeps its smallest value
and its step.
Equation: w ~ lo_g + step_g q, step_g = (hi_g - lo_g) / 15, q = round((w - lo_g) / step_g).
Source: group-wise asymmetric rounding, the storage of GPTQ (Frantar et al., arXiv 2210.17323, section 4) and AWQ,
    without their choice of what to round how.
Cost: 4 bits a weight and 64 bits a group: 4.5 at groups of 128; unpacking for each product.
Use when: another tool wants integers, or weights are not normal.
Not when: weights are normal, as trained ones are: nf4 loses less in fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.kernels.backend import Backend
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer


@final
class Int4Group(Quantizer):
    """Fifteen equal steps for each group of inputs."""

    provides: ClassVar[frozenset[str]] = frozenset({"packed-weights"})

    group: int = Field(128, ge=2, description="neighbouring inputs that share a range; an even number")

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        rows, columns = weight.shape
        if columns % 2 or self.group % 2:
            raise RecipeError(
                f"a matrix with {columns} inputs in groups of {self.group}",
                allowed="even numbers of both, as two codes share a byte",
                do="set quantizer.group to an even number, or use nf4",
            )
        groups = -(-columns // self.group)
        # What fills up the last group is its own last column: it changes no range.
        filled = torch.cat([weight, weight[:, -1:].expand(-1, groups * self.group - columns)], 1).float()
        parts = filled.view(rows, groups, self.group)
        low, high = parts.amin(2), parts.amax(2)
        steps = (high - low) / 15
        codes = ((parts - low[:, :, None]) / torch.where(steps > 0, steps, 1.0)[:, :, None]).round_().to(torch.uint8)
        codes = codes.view(rows, -1)[:, :columns]
        packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
        return Int4Packing((rows, columns), packed.contiguous(), low, steps, self.group)

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        return shape[0] * shape[1] // 2 + 8 * shape[0] * -(-shape[1] // self.group)


@final
@dataclass(frozen=True)
class Int4Packing(Packing):
    """Codes in pairs, the first of them in the high half of a byte; the smallest value and the step of each group."""

    codes: UInt8[Tensor, "out half"]
    low: Float[Tensor, "out groups"]
    steps: Float[Tensor, "out groups"]
    group: int

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        codes = torch.stack([self.codes >> 4, self.codes & 15], 2).view(self.shape)
        found = torch.empty(self.shape, dtype=dtype, device=codes.device)
        for index, start in enumerate(range(0, self.shape[1], self.group)):
            own = slice(start, start + self.group)
            found[:, own] = torch.addcmul(self.low[:, index, None], codes[:, own], self.steps[:, index, None])
        return found
