"""ties against a loop over single numbers, and its paper's example of signs."""

from __future__ import annotations

import pytest
import torch

from tests.mergers_of import family, merge_whole, merger, part


def by_hand(base: torch.Tensor, models: list[torch.Tensor], weights: tuple[float, ...], *, density: float,
            normalize: bool) -> torch.Tensor:  # fmt: skip
    """Trim by sorting, then each number on its own."""
    count = max(1, int(density * base.numel()))
    trimmed = []
    for model in models:
        change = (model - base).flatten()
        kept = torch.zeros_like(change)
        order = change.abs().argsort(descending=True)[:count]
        kept[order] = change[order]
        trimmed.append(kept)
    merged = base.flatten().clone()
    for place in range(len(merged)):
        said = [weight * float(kept[place]) for weight, kept in zip(weights, trimmed, strict=True)]
        sign = 1 if sum(said) >= 0 else -1
        agree = [(value, weight) for value, weight in zip(said, weights, strict=True) if value * sign > 0]
        divisor = sum(weight for _, weight in agree) if normalize else 1
        merged[place] += sum(value for value, _ in agree) / divisor if agree else 0
    return merged.view_as(base)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_it_is_trim_elect_merge_number_by_number(density: float, normalize: bool) -> None:
    """Breaks when a threshold is off by one, a trimmed number votes, or a mean counts those that did not agree."""
    base, models = family(3, seed=3)
    weights = (1.0, 0.5, 2.0)
    method = merger("ties", density=density, normalize=normalize)
    merged = merge_whole(method, part(*models, base=base, weights=weights))
    wanted = by_hand(base, models, weights, density=density, normalize=normalize)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)


def test_the_majority_by_size_wins_and_a_tie_is_positive() -> None:
    """Breaks when votes are counted by heads, or a tie leaves the base alone."""
    base = torch.zeros(1, 3)
    models = [torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[-1.0, -1.0, 2.0]]), torch.tensor([[-1.0, 0.0, 4.0]])]
    merged = merge_whole(merger("ties", density=1.0), part(*models, base=base))
    assert merged.tolist() == [[3.0, 1.0, 3.0]]


def test_equal_magnitudes_at_the_threshold_are_all_kept() -> None:
    """Breaks when which of equal numbers stays depends on the order of a sort."""
    model = torch.tensor([[1.0, -1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    merged = merge_whole(merger("ties", density=0.25), part(model, base=torch.zeros(1, 8)))
    assert merged.tolist() == [[1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
