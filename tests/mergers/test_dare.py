"""dare: what share is dropped, that the mean is kept, and that a mask belongs to seed, tensor, model and place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luthier.maths.numbered_draws import key_of, uniform
from tests.mergers_of import family, merge_whole, merger, part

SIZE = (200, 300)


def test_the_share_is_dropped_and_the_rest_is_larger_by_it() -> None:
    """Breaks when density is the share that goes, or what stays is not divided by it."""
    base = torch.zeros(SIZE)
    merged = merge_whole(merger("dare", density=0.3), part(torch.ones(SIZE), base=base))
    assert sorted(set(merged.unique().tolist())) == [0.0, pytest.approx(1 / 0.3)]
    assert float((merged != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(merged.mean()) == pytest.approx(1, abs=0.03)
    plain = merge_whole(merger("dare", density=0.3, rescale=False), part(torch.ones(SIZE), base=base))
    assert sorted(plain.unique().tolist()) == [0.0, 1.0]


@pytest.mark.parametrize("fuse", ["linear", "ties"])
def test_what_is_left_is_put_together_as_asked(fuse: str) -> None:
    """Breaks when the vote is taken over what was dropped too."""
    base, models = family(2)
    given = part(*models, base=base, weights=(1.0, 0.5))
    draws = [torch.from_numpy(uniform(key_of(5, given.key, number), 0, base.numel())) for number in range(2)]
    masks = [each.view_as(base) < 0.6 for each in draws]
    left = [weight * (model - base) * mask / 0.6 for weight, model, mask in zip((1.0, 0.5), models, masks, strict=True)]
    if fuse == "ties":
        elected = torch.where(left[0] + left[1] >= 0, 1.0, -1.0)
        left = [each * (each.sign() == elected) for each in left]
    merged = merge_whole(merger("dare", density=0.6, fuse=fuse, seed=5, scale=2.0), given)
    torch.testing.assert_close(merged, base + 2 * (left[0] + left[1]), rtol=1e-5, atol=1e-6)


def test_masks_differ_by_model_tensor_and_seed() -> None:
    """Breaks when two models lose the same numbers, which is what dropping is to avoid."""
    base, (one, _) = family(2)
    twice = part(one, one, base=base)
    first = merge_whole(merger("dare"), part(one, base=base))
    assert not torch.equal(merge_whole(merger("dare"), twice) - base, 2 * (first - base))
    assert not torch.equal(first, merge_whole(merger("dare", seed=1), part(one, base=base)))
    assert not torch.equal(first, merge_whole(merger("dare"), replace(part(one, base=base), key=8)))
    assert torch.equal(first, merge_whole(merger("dare"), part(one, base=base)))
