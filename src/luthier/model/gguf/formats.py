"""In which number format each tensor of a GGUF file stands.

Idea: one choice for a file, and rules for the tensors that need more: what is no matrix stays in float32; the head,
which every token goes through, gets six bits where the rest has four; rows that are no whole number of blocks fall
back to the next format whose blocks fit. What fell back is counted and told.
`Q4_K` is the mix that llama.cpp calls Q4_K_M: half of the value and down projections have six bits as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

from luthier.maths.ggml import FORMATS, Format
from luthier.model.gguf.families import is_matrix_to_pack, is_outer
from luthier.model.gguf.writing import Planned

Choice = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K"]
FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 15, "BF16": 32}
"""`general.file_type` by choice; 15 is Q4_K_M."""
_MORE_BITS: Final = re.compile(r"blk\.(\d+)\.(?:attn_v|ffn_down)\.weight")


def format_for(name: str, shape: tuple[int, ...], choice: Choice, *, layers: int, tied: bool) -> Format:
    """The format of one tensor."""
    if not is_matrix_to_pack(name, shape):
        return FORMATS["F32"]
    wanted: str = choice
    if wanted in ("Q4_0", "Q4_K") and is_outer(name, tied=tied):
        wanted = "Q6_K"
    found = _MORE_BITS.fullmatch(name)
    if wanted == "Q4_K" and found and _has_more_bits(int(found[1]), layers):
        wanted = "Q6_K"
    for each in (wanted, "Q8_0", "F16"):
        if shape[-1] % FORMATS[each].block == 0:
            return FORMATS[each]
    return FORMATS["F32"]


def fallbacks(plan: Sequence[Planned], choice: Choice) -> list[str]:
    """A line on what could not have the format that was chosen; empty where all could."""
    if choice in ("F32", "F16", "BF16"):
        return []
    usual = {"Q8_0": ("Q8_0",), "Q4_0": ("Q4_0", "Q6_K"), "Q4_K": ("Q4_K", "Q6_K")}[choice]
    counted = Counter((each.kind.name, each.shape[-1]) for each in plan
                      if is_matrix_to_pack(each.name, each.shape) and each.kind.name not in usual)  # fmt: skip
    return [f"{count} matrices with rows of {columns} numbers are in {name}: no whole number of {choice} blocks"
            for (name, columns), count in sorted(counted.items())]  # fmt: skip


def _has_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule: the first and the last eighth of the layers, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
