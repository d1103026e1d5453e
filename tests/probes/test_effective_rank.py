"""Effective rank of changes whose rank is known, low-rank and whole alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luthier.probes.effective_rank import EffectiveRank
from tests.pairs import lora_pair


def test_a_change_has_the_rank_it_uses_and_not_the_one_it_may_have() -> None:
    """Breaks when rank that is allowed counts as used, or factors and their product disagree."""
    pair, _ = lora_pair("llama")
    change = next(change for change in pair.changes if change.shape == (32, 32))
    left, right = (torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(n)))[0] for n in (0, 1))
    sizes = torch.tensor([1.0, 1.0, 0.0, 0.0])
    low = replace(change, factors=(right.t(), left * sizes))
    whole = replace(change, factors=None, tuned=lambda: low.base() + low.delta())
    for one, allowed in ((low, 4), (whole, 32)):
        numbers = EffectiveRank().of(replace(pair, changes=(one,))).numbers
        assert numbers["effective_rank"] == pytest.approx(2.0, abs=1e-2)
        assert numbers["stable_rank"] == pytest.approx(2.0, abs=1e-3)
        assert numbers["rank_allowed"] == allowed
    row = EffectiveRank().of(replace(pair, changes=(low,))).tables[0].rows[0]
    assert row[4] == 2


def test_a_rank_that_is_too_large_and_one_that_is_used_up_are_told() -> None:
    """Breaks when the advice is the same whatever was found."""
    pair, _ = lora_pair("llama")
    assert "uses all it has" in EffectiveRank().of(pair).verdict[0] or "of the 4" in EffectiveRank().of(pair).verdict[0]
    thin = [replace(one, factors=(one.factors[0], one.factors[1] * torch.tensor([1.0, 0, 0, 0])))
            for one in pair.changes if one.factors is not None]  # fmt: skip
    assert "A rank of 1 would have room" in EffectiveRank().of(replace(pair, changes=tuple(thin))).verdict[0]
