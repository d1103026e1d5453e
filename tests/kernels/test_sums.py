"""Sums in slices are the sums."""

from __future__ import annotations

import pytest
import torch

from luthier.kernels import sums
from luthier.kernels.sums import add_to


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_add_up_to_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the last slice, which is shorter, is left out, or the scale is."""
    monkeypatch.setattr(sums, "SLICE", 8)
    total, part = torch.randn(5, 7), torch.randn(5, 7).to(dtype)
    expected = total + 0.3 * part.float()
    assert add_to(total, part, scale=0.3) is total
    torch.testing.assert_close(total, expected)
    turned = torch.randn(7, 5).t()
    torch.testing.assert_close(add_to(turned.clone(), part.t().contiguous().t()), turned + part.float())
