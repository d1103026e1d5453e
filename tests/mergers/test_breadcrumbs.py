"""breadcrumbs against sorting."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import RecipeError
from tests.mergers_of import family, merge_whole, merger, part


@pytest.mark.parametrize("fuse", ["linear", "ties"])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.1), (0.2, 0.0), (1.0, 0.0)])
def test_both_ends_are_cut_off(density: float, gamma: float, fuse: str) -> None:
    """Breaks when a count is off by one at either end."""
    base, models = family(2, seed=5)
    size = base.numel()
    crumbs = []
    for model in models:
        change = (model - base).flatten()
        order = change.abs().argsort(descending=True)[int(gamma * size) :][: int(density * size)]
        kept = torch.zeros_like(change)
        kept[order] = change[order]
        crumbs.append(kept.view_as(base))
    if fuse == "ties":
        elected = torch.where(crumbs[0] + crumbs[1] >= 0, 1.0, -1.0)
        own = [crumb.sign() == elected for crumb in crumbs]
        count = (own[0].float() + own[1].float()).clamp(min=1)
        wanted = base + sum(torch.where(mask, crumb, 0.0) for mask, crumb in zip(own, crumbs, strict=True)) / count
    else:
        wanted = base + crumbs[0] + crumbs[1]
    knobs = {"density": density, "gamma": gamma, "fuse": fuse, "normalize": fuse == "ties"}
    merged = merge_whole(merger("breadcrumbs", **knobs), part(*models, base=base))
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)


def test_more_than_all_is_told() -> None:
    """Breaks when the two shares may overlap."""
    with pytest.raises(RecipeError, match=r"density is 0.9 and gamma 0.2"):
        merger("breadcrumbs", density=0.9, gamma=0.2)
