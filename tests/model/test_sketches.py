"""Sketches: what they say of two tensors is what a comparison of the tensors themselves says."""

from __future__ import annotations

import pytest
import torch

from luthier.model.comparing.sketches import Sketch, sketched


def _sketch(tensor: torch.Tensor) -> Sketch:
    return sketched([("w", tensor)])["w"]


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.3])
def test_the_distance_of_sketches_is_that_of_the_tensors(share: float) -> None:
    """Breaks when signs repeat in a pattern, or a bucket is left out: the estimate then misses by more than half."""
    draws = torch.Generator().manual_seed(0)
    tensor = torch.randn(300, 1000, generator=draws)
    other = tensor + share * torch.randn(300, 1000, generator=draws)
    truth = float((other - tensor).norm() / tensor.norm())
    assert _sketch(tensor).apart(_sketch(other)) == pytest.approx(truth, rel=0.5)
    assert _sketch(tensor).norm == pytest.approx(float(tensor.double().norm()), rel=1e-6)
    assert _sketch(tensor).apart(_sketch(tensor.clone())) == 0


def test_what_happened_to_a_tensor_is_told() -> None:
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    held = _sketch(tensor)
    assert held.difference(_sketch(2 * tensor)) == "is 2 times what it was"
    assert held.difference(_sketch(torch.zeros(40, 30))) == "is 0 times what it was"
    assert held.difference(_sketch(tensor.t())) == "has shape [30, 40], not [40, 30]"
    assert "differs by about" in held.difference(_sketch(tensor.roll(1, 0)))
    assert held.apart(_sketch(tensor.roll(1, 0))) > 1 and held.apart(_sketch(tensor.t())) == float("inf")
    empty = _sketch(torch.zeros(3))
    assert empty.apart(_sketch(torch.zeros(3))) == 0 and empty.apart(_sketch(torch.ones(3))) == float("inf")
