"""int4 in groups: the ends of a range are kept, and what has no even number of inputs is refused."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.kernels.torch_backend import TorchBackend
from luthier.quantizers.int4_group import Int4Group, Int4Packing


@pytest.mark.parametrize("columns", [32, 40])
def test_the_ends_of_each_group_are_exact_and_errors_half_a_step(columns: int) -> None:
    """Breaks when a group reaches into the next one, or what fills up the last changes its range."""
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)) + 3
    found = Int4Group(group=16).pack(weight, TorchBackend())
    assert isinstance(found, Int4Packing)
    back = found.dense(torch.float32)
    for index, start in enumerate(range(0, columns, 16)):
        own, values = weight[:, start : start + 16], back[:, start : start + 16]
        assert torch.equal(found.low[:, index], own.amin(1))
        torch.testing.assert_close(values.amax(1), own.amax(1))
        assert bool(((values - own).abs() <= found.steps[:, index, None] * 0.5001).all())


def test_what_two_codes_cannot_share_is_refused() -> None:
    """Breaks when a byte would hold codes of two rows."""
    for method, columns in ((Int4Group(), 33), (Int4Group(group=3), 30)):
        with pytest.raises(RecipeError, match="inputs in groups of"):
            method.pack(torch.randn(4, columns), TorchBackend())
