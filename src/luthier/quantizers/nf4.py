"""NF4: four bits a weight, with levels where normal numbers lie, and scales in eight bits.

Idea: trained weights are nearly normal. Sixteen levels at the quantiles of a normal distribution, scaled to the largest
of 64 neighbours, lose little; the scales, one for 64 weights, are quantized themselves (double quantization).
Equation: w ~ s_b level[c], s_b = max |w| of the block; s_b ~ t_g map[q] + mean(s), one t for 256 scales.
Source: Dettmers et al., arXiv 2305.14314, section 3. Codes, scales and their order are those of bitsandbytes: blocks
    run through the flattened matrix, the first of two codes is the high half of a byte, the reciprocal is multiplied.
    Files are bitsandbytes' too (`QuantState.as_dict`), so that transformers loads them.
Cost: 4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight (4.5 without double quantization); unpacking for each product.
Use when: the base does not fit otherwise: with LoRA on all linear layers and paged AdamW it is QLoRA.
Not when: it fits in bfloat16: unpacking costs time, and what is lost is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Self, final, get_args

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from luthier.core.errors import CorruptError, DataError
from luthier.data.strict_json import Place, decode_text, parse
from luthier.kernels.backend import Backend, BlockScales, PairCodes
from luthier.maths import codebooks
from luthier.model.packed import Packing
from luthier.quantizers import Quantizer

Block = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
_BLOCKS: Final[tuple[Block, ...]] = get_args(Block)
PIECE: Final = 1 << 22
"""Numbers that are packed at once: a multiple of every block."""
SCALES: Final = 256
"""Scales that share a scale of their own."""


@final
class NF4(Quantizer):
    """Sixteen levels of a normal distribution, in blocks."""

    provides: ClassVar[frozenset[str]] = frozenset({"packed-weights"})
    file_mark: ClassVar[str] = "weight.quant_state.bitsandbytes__nf4"

    block: Block = Field(64, description="weights that share a scale")
    double: bool = Field(True, description="keep the scales in eight bits too")

    def pack(self, weight: Float[Tensor, "out in"], backend: Backend) -> Packing | None:
        # In pieces of whole blocks: a head in float32 takes more memory than the whole model that is packed.
        parts = [nf4_codes(own.float(), self.block) for own in weight.reshape(-1).split(PIECE)]
        codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        halves = torch.cat([codes, codes.new_full((len(codes) % 2,), _ZERO)]).view(-1, 2)
        packed = (halves[:, 0] << 4) | halves[:, 1]
        shape = (weight.shape[0], weight.shape[1])
        if not self.double:
            return NF4Packing(shape, packed, scales, None, None, None, self.block, backend)
        mean = scales.mean()
        levels = codebooks.table(codebooks.dynamic_levels(signed=True), scales.device)
        scale_codes, scale_scales = codebooks.packed(scales - mean, levels, SCALES)
        return NF4Packing(shape, packed, None, scale_codes, scale_scales, mean, self.block, backend)

    def packed_bytes(self, shape: tuple[int, int]) -> int | None:
        numbers = math.prod(shape)
        blocks = math.ceil(numbers / self.block)
        scales = blocks + 4 * math.ceil(blocks / SCALES) + 4 if self.double else 4 * blocks
        return math.ceil(numbers / 2) + scales

    @classmethod
    def reads(cls, config: Mapping[str, object]) -> bool:
        return config.get("quant_method") == "bitsandbytes" and config.get("bnb_4bit_quant_type") == "nf4"

    @classmethod
    def from_file(cls, held: Mapping[str, Tensor], backend: Backend) -> tuple[Self, Packing]:
        packing = _from_file(held, _state_of(held), backend)
        return cls(block=packing.block, double=packing.scales is None), packing


@final
@dataclass(frozen=True)
class NF4Packing(Packing):
    """Codes in pairs, and the scales either as they are or as codes with scales and a mean."""

    codes: UInt8[Tensor, " pairs"]
    scales: Float[Tensor, " blocks"] | None
    scale_codes: UInt8[Tensor, " blocks"] | None
    scale_scales: Float[Tensor, " groups"] | None
    scale_mean: Float[Tensor, ""] | None
    block: Block
    backend: Backend

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        levels = codebooks.table(codebooks.NF4, self.codes.device)
        flat = self.backend.unpacked(self.codes, self.block_scales(), levels, self.block, math.prod(self.shape), dtype)
        return flat.view(self.shape)

    @property
    def rows_apart(self) -> bool:
        return self.backend.few > 0 and self.block % 2 == self.shape[1] % 2 == 0

    def product(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"] | None:
        if not self.backend.multiplies_packed(len(x), x.dtype):
            return None
        return self.backend.product_of_codes(x, self.as_codes())

    def as_codes(self) -> PairCodes:
        scales = BlockScales(self.scales) if self.scales is not None else self._coded_scales()
        levels = codebooks.table(codebooks.NF4, self.codes.device)
        return PairCodes(self.codes, scales, levels, self.block, self.shape)

    def file_tensors(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        levels = codebooks.table(codebooks.NF4, self.codes.device)
        state: dict[str, object] = {"quant_type": "nf4", "blocksize": self.block}
        state |= {"dtype": _name(dtype), "shape": list(self.shape)}
        # Tables of their own: a file has no tensor that is in two places.
        held = {"weight": self.codes[:, None], "weight.quant_map": levels.clone()}
        if self.scales is not None:
            held["weight.absmax"] = self.scales
        elif self.scale_codes is not None and self.scale_scales is not None and self.scale_mean is not None:
            held |= {"weight.absmax": self.scale_codes, "weight.nested_absmax": self.scale_scales}
            nested = codebooks.table(codebooks.dynamic_levels(signed=True), self.codes.device)
            held["weight.nested_quant_map"] = nested.clone()
            state |= {"nested_blocksize": SCALES, "nested_dtype": "float32", "nested_offset": float(self.scale_mean)}
        text = json.dumps(state).encode()
        return {**held, NF4.file_mark: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def file_config(self) -> Mapping[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.scales is None,
            "bnb_4bit_quant_storage": "uint8",
        }

    def block_scales(self) -> Float[Tensor, " blocks"]:
        """The scale of each block, in float32."""
        if self.scales is not None:
            return self.scales
        return self._coded_scales().each()

    def _coded_scales(self) -> BlockScales:
        if self.scale_codes is None or self.scale_scales is None or self.scale_mean is None:
            raise ValueError("a packing with neither scales nor codes of scales")
        levels = codebooks.table(codebooks.dynamic_levels(signed=True), self.codes.device)
        return BlockScales(self.scale_scales, self.scale_codes, levels, self.scale_mean, SCALES)


_ZERO: Final = codebooks.NF4.index(0.0)


def nf4_codes(flat: Float[Tensor, " n"], block: int) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """Codes and the scale of each block, to the bit what bitsandbytes makes of these numbers in float32."""
    levels = codebooks.table(codebooks.NF4, flat.device)
    whole = len(flat) // block * block
    rows = flat[:whole].view(-1, block)
    scales = rows.abs().amax(1) if len(rows) else flat.new_empty(0)
    shares = (rows * (1 / scales.clamp(min=codebooks.SMALLEST))[:, None]).clamp_(-1, 1)
    codes = codebooks.nearest(shares.view(-1), levels)
    rest = flat[whole:]
    if not len(rest):
        return codes, scales
    # A last block that is not full is divided, and has a scale even if all of it is zero.
    last = rest.abs().max().clamp(min=codebooks.SMALLEST)
    rest_codes = codebooks.nearest((rest / last).clamp_(-1, 1), levels)
    return torch.cat([codes, rest_codes]), torch.cat([scales, last[None]])


def _state_of(held: Mapping[str, Tensor]) -> Mapping[str, object]:
    """What the tensor that is JSON says of the others."""
    raw = bytes(held[NF4.file_mark].view(-1).view(torch.uint8).tolist())
    try:
        state = parse(decode_text(raw, Place(NF4.file_mark)), Place(NF4.file_mark))
    except DataError as failure:
        raise CorruptError(f"{NF4.file_mark} is no JSON: {failure.received}", allowed="a JSON object") from None
    if not isinstance(state, dict):
        raise CorruptError(f"{NF4.file_mark} holds a JSON {type(state).__name__}", allowed="a JSON object")
    return state


def _from_file(held: Mapping[str, Tensor], state: Mapping[str, object], backend: Backend) -> NF4Packing:
    shape, block = state.get("shape"), next((each for each in _BLOCKS if each == state.get("blocksize")), None)
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise CorruptError(f"shape is {shape!r:.80}", allowed="two whole numbers")
    if state.get("quant_type") != "nf4" or block is None:
        raise CorruptError(
            f"quant_type is {state.get('quant_type')!r:.40} and blocksize {state.get('blocksize')!r:.40}",
            allowed=f"nf4 in blocks of {', '.join(map(str, _BLOCKS))}",
        )
    numbers = math.prod(shape)
    blocks = math.ceil(numbers / block)
    codes = _held(held, "weight", torch.uint8, math.ceil(numbers / 2))
    _require_levels(held, "weight.quant_map", codebooks.NF4)
    size = (shape[0], shape[1])
    if "weight.nested_absmax" not in held:
        scales = _held(held, "weight.absmax", torch.float32, blocks)
        return NF4Packing(size, codes, scales, None, None, None, block, backend)
    mean = state.get("nested_offset")
    if state.get("nested_blocksize") != SCALES or not isinstance(mean, float) or not math.isfinite(mean):
        raise CorruptError(
            f"nested_blocksize is {state.get('nested_blocksize')!r:.40} and nested_offset {mean!r:.40}",
            allowed=f"{SCALES}, and a number",
        )
    _require_levels(held, "weight.nested_quant_map", codebooks.dynamic_levels(signed=True))
    scale_codes = _held(held, "weight.absmax", torch.uint8, blocks)
    scale_scales = _held(held, "weight.nested_absmax", torch.float32, math.ceil(blocks / SCALES))
    return NF4Packing(size, codes, None, scale_codes, scale_scales, torch.tensor(mean), block, backend)


def _held(held: Mapping[str, Tensor], name: str, dtype: torch.dtype, numbers: int) -> Tensor:
    """A tensor of a file, flat, when it is what it has to be."""
    found = held.get(name)
    if found is None or found.dtype != dtype or found.numel() != numbers:
        what = "not there" if found is None else f"{found.numel()} numbers in {_name(found.dtype)}"
        raise CorruptError(f"{name} is {what}", allowed=f"{numbers} numbers in {_name(dtype)}")
    return found.reshape(-1)


def _require_levels(held: Mapping[str, Tensor], name: str, levels: tuple[float, ...]) -> None:
    found = _held(held, name, torch.float32, len(levels))
    if not torch.allclose(found, torch.tensor(levels), rtol=0, atol=1e-6):
        raise CorruptError(f"{name} holds other levels", allowed=f"the {len(levels)} levels that bitsandbytes writes")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
