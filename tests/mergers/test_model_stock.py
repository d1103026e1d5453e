"""model_stock against its equation, and its limits: parallel, orthogonal and opposite changes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.mergers_of import family, merge_whole, merger, part


def test_it_is_the_equation() -> None:
    """Breaks when the cosine is that of weights rather than changes, or a pair is left out."""
    base, models = family(3)
    models = [model + 0.1 for model in models]
    changes = [(model - base).double().flatten() for model in models]
    cosines = [float(torch.cosine_similarity(changes[i], changes[j], dim=0)) for i, j in ((0, 1), (0, 2), (1, 2))]
    cos = sum(cosines) / 3
    t = 3 * cos / (2 * cos + 1)
    given = part(*models, base=base)
    wanted = t * sum(models) / 3 + (1 - t) * base
    torch.testing.assert_close(merge_whole(merger("model_stock"), given), wanted, rtol=1e-5, atol=1e-6)
    said = merger("model_stock").told(given.weights, [merger("model_stock").look(given, ())])
    assert said["t"] == pytest.approx(t) and said["angle_degrees"] == pytest.approx(math.degrees(math.acos(cos)))


def test_parallel_changes_give_the_mean_and_unlike_ones_the_base() -> None:
    """Breaks when a negative cosine moves away from all models."""
    base = torch.zeros(1, 2)
    along, across = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.equal(merge_whole(merger("model_stock"), part(along, along, base=base)), along)
    for other in (across, -along, across - along):
        assert torch.equal(merge_whole(merger("model_stock"), part(along, other, base=base)), base)
