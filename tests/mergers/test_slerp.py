"""slerp against what is known of it: its ends, orthonormal vectors, unit vectors, and a straight line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.mergers import Merger, Part
from tests.mergers_of import family, merge_whole, merger, part


def told(method: Merger, given: Part) -> dict[str, object]:
    return method.told(given.weights, [method.look(given, ())])


@pytest.mark.parametrize("of", ["weights", "changes"])
def test_the_ends_are_the_models_bit_for_bit(of: str) -> None:
    """Breaks when a weight of 0 or 1 is computed with rather than obeyed; -0.0 and the last bit would change."""
    base, (one, other) = family(2)
    one[0, 0] = -0.0
    for t, end in ((0.0, one), (1.0, other)):
        merged = merge_whole(merger("slerp", t=t, of=of), part(one, other, base=base))
        assert torch.equal(merged.view(torch.int32), end.view(torch.int32))


def test_half_way_between_orthonormal_vectors_is_their_sum_by_the_root_of_two() -> None:
    """Breaks when the middle is that of a line."""
    one, other = torch.eye(6)[:2]
    torch.testing.assert_close(merge_whole(merger("slerp"), part(one, other))[0], (one + other) / math.sqrt(2))


@pytest.mark.parametrize("t", [0.1, 0.25, 0.5, 0.9])
def test_unit_vectors_stay_on_the_sphere_and_the_angle_is_cut_evenly(t: float) -> None:
    """Breaks when the angle is not that of the whole flattened tensor."""
    one, other = (vector / vector.norm() for vector in torch.randn(2, 4, 5, generator=torch.manual_seed(0)))
    merged = merge_whole(merger("slerp", t=t), part(one, other))
    assert float(merged.norm()) == pytest.approx(1, abs=1e-6)
    whole, own = (math.acos(float((one * each).sum())) for each in (other, merged))
    assert own == pytest.approx(t * whole, rel=1e-4)


def test_it_is_the_formula_on_tensors_that_are_not_normalised() -> None:
    """Breaks when the result is normalised, or the weights are those of the unit vectors' sum."""
    one, other = torch.randn(2, 8, 8, generator=torch.manual_seed(1)) * torch.tensor([1.0, 5.0])[:, None, None]
    a, b = (each.double().numpy().ravel() for each in (one, other))
    omega = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    wanted = (np.sin(0.7 * omega) * a + np.sin(0.3 * omega) * b) / np.sin(omega)
    given = part(one, other)
    np.testing.assert_allclose(merge_whole(merger("slerp", t=0.3), given).numpy().ravel(), wanted, rtol=2e-5, atol=1e-6)
    said = told(merger("slerp", t=0.3), given)
    assert said["angle_degrees"] == pytest.approx(math.degrees(omega), rel=1e-6) and said["lerp"] is False


def test_a_straight_line_is_told_and_changes_are_turned_although_weights_are_parallel() -> None:
    """Breaks when slerp is lerp and nobody hears of it."""
    base, _ = family(0)
    moved = [base + 1e-3 * torch.randn(12, 10, generator=torch.manual_seed(seed)) for seed in (1, 2)]
    given = part(*moved, base=base)
    assert told(merger("slerp"), given)["lerp"] is True
    torch.testing.assert_close(merge_whole(merger("slerp"), given), (moved[0] + moved[1]) / 2)
    turned = merger("slerp", of="changes")
    assert told(turned, given)["lerp"] is False
    ends = [each - base for each in moved]
    omega = torch.arccos((ends[0] * ends[1]).sum() / ends[0].norm() / ends[1].norm())
    wanted = base + (ends[0] + ends[1]) * torch.sin(omega / 2) / torch.sin(omega)
    torch.testing.assert_close(merge_whole(turned, given), wanted, rtol=1e-5, atol=1e-6)


def test_zero_and_opposite_vectors_are_no_division_by_zero() -> None:
    """Breaks when an angle of 180 degrees or no direction at all gives NaN."""
    one = torch.randn(3, 4)
    for other in (-one, torch.zeros(3, 4)):
        assert bool(merge_whole(merger("slerp", t=0.25), part(one, other)).isfinite().all())


def test_two_models_exactly() -> None:
    """Breaks when a third model is left out without a word."""
    with pytest.raises(RecipeError, match="slerp was given 3 models; exactly 2"):
        merger("slerp").require(3, base=True)
    with pytest.raises(RecipeError, match="no base"):
        merge_whole(merger("slerp", of="changes"), part(*family(2)[1]))
