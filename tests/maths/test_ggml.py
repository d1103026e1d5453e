"""Number formats of GGUF: the bytes of the format's own package where it can write them, its numbers always."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.core.errors import NumericError
from luthier.maths.ggml import BY_CODE, FORMATS, Format, error_bound, pack, unpack

ROWS, COLUMNS = 24, 512
every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=lambda kind: kind.name)


def numbers(how: str) -> Tensor:
    torch.manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS)
    return {
        "weights": normal * 0.02,
        "outliers": normal**5,
        "positive": normal.abs() + 3,
        "zeros and tiny": torch.cat([torch.zeros(ROWS // 2, COLUMNS), normal[: ROWS // 2] * 1e-6]),
    }[how]


HOWS = ("weights", "outliers", "positive", "zeros and tiny")


@every_format
@pytest.mark.parametrize("how", HOWS)
def test_blocks_are_those_of_the_formats_own_package(kind: Format, how: str) -> None:
    """Breaks when a nibble, a scale or a run of a block stands elsewhere than readers look for it."""
    gguf = pytest.importorskip("gguf")
    values = numbers(how)
    code = gguf.GGMLQuantizationType(kind.code)
    assert code.name == kind.name and gguf.GGML_QUANT_SIZES[code] == (kind.block, kind.bytes)
    held = pack(values, kind)
    assert len(held) == ROWS * kind.row_bytes(COLUMNS)
    theirs = gguf.dequantize(np.frombuffer(held, np.uint8).reshape(ROWS, -1), code)
    np.testing.assert_array_equal(unpack(held, kind).numpy(), theirs.reshape(-1))
    if kind.name not in ("Q4_K", "Q6_K"):
        assert gguf.quantize(values.numpy(), code).tobytes() == held
    else:
        # The day the package can, ours may be compared with its own.
        with pytest.raises(NotImplementedError):
            gguf.quantize(values.numpy(), code)


@every_format
@pytest.mark.parametrize("how", HOWS)
def test_errors_are_within_the_bound(kind: Format, how: str) -> None:
    """Breaks when a scale is wrong by one step in twenty or more, in any block."""
    values = numbers(how)
    error = (unpack(pack(values, kind), kind) - values.reshape(-1)).abs()
    assert bool((error <= error_bound(values, kind)).all())


def test_a_wrong_scale_is_out_of_bounds() -> None:
    """The bound is one that can fail: codes of Q8_0 under a scale of another block."""
    values = torch.cat([numbers("weights")[0, :32], numbers("weights")[0, 32:64] * 3])
    held = bytearray(pack(values, FORMATS["Q8_0"]))
    held[:2], held[34:36] = held[34:36], held[:2]
    error = (unpack(bytes(held), FORMATS["Q8_0"]) - values).abs()
    assert not bool((error <= error_bound(values, FORMATS["Q8_0"])).all())


def test_more_bits_are_nearer_and_the_search_earns_its_time() -> None:
    """Q4_K and Q6_K have no closed form: they must beat the formats below them on weights as they are."""
    values = numbers("weights")
    errors = {kind.name: float((unpack(pack(values, kind), kind) - values.reshape(-1)).square().mean())
              for kind in FORMATS.values()}  # fmt: skip
    assert errors["Q4_0"] > 1.3 * errors["Q4_K"] > 10 * errors["Q6_K"] > errors["Q8_0"] > errors["BF16"]
    # Sixteen even levels over a normal distribution of 32 cannot do better than this by much.
    assert errors["Q4_K"] ** 0.5 < 0.08 * float(values.std())


def test_what_a_format_can_hold_exactly_it_holds_exactly() -> None:
    """Numbers that were read from a file become the same numbers when they are written again."""
    for kind in FORMATS.values():
        once = unpack(pack(numbers("weights"), kind), kind)
        again = unpack(pack(once, kind), kind)
        if kind.name in ("Q4_K", "Q6_K"):
            # Scales are searched anew, and a few blocks find others; hardly anything is lost twice.
            lost = (once - numbers("weights").reshape(-1)).square().mean()
            assert float((again - once).square().mean()) < 0.1 * float(lost)
        else:
            torch.testing.assert_close(again, once, rtol=1e-3, atol=0)


def test_half_precision_is_rounded_once() -> None:
    values = torch.randn(1, 64).bfloat16()
    for name in ("BF16", "F32"):
        assert torch.equal(unpack(pack(values, FORMATS[name]), FORMATS[name]).reshape(1, 64), values.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_format
def test_numbers_that_are_not_finite_are_refused(kind: Format, bad: float) -> None:
    values = torch.zeros(256)
    values[17] = bad
    with pytest.raises(NumericError, match="1 of 256 numbers are not finite"):
        pack(values, kind)


def test_numbers_that_are_too_large_are_refused() -> None:
    for name in ("F16", "Q8_0", "Q4_0"):
        with pytest.raises(NumericError, match="at most 65504"):
            pack(torch.full((32,), 1e8), FORMATS[name])
    assert torch.equal(unpack(pack(torch.full((32,), 1e8), FORMATS["BF16"]), FORMATS["BF16"]),
                       torch.full((32,), 1e8).bfloat16().float())  # fmt: skip


def test_codes_are_unique() -> None:
    assert len(BY_CODE) == len(FORMATS)
