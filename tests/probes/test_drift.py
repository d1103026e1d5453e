"""Drift: norms and angles against ones that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from luthier.probes.drift import Drift
from tests.pairs import full_pair, lora_pair


def test_a_matrix_that_grew_did_not_turn_and_one_that_turned_did() -> None:
    """Breaks when the angle is that of the change, or the norm is taken of the wrong matrix."""
    pair, _ = full_pair("llama")
    across = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    first = pair.changes[1]
    base = first.base()
    across = across[: base.shape[0], : base.shape[1]]
    across = across - (across * base).sum() / base.square().sum() * base
    grown = replace(first, name="grown", tuned=lambda: 1.1 * base)
    turned = replace(first, name="turned", tuned=lambda: base + across * base.norm() / across.norm())
    report = Drift().of(replace(pair, changes=(grown, turned)))
    rows = {row[0]: list(row[1:]) for row in report.tables[0].rows}
    assert rows["grown"] == [pytest.approx(0.1, rel=1e-4), pytest.approx(0.0, abs=1e-2)]
    assert rows["turned"] == [pytest.approx(1.0, rel=1e-4), pytest.approx(45.0, rel=1e-3)]
    assert "turned" in report.verdict[0] and math.isclose(float(report.numbers["largest_angle_degrees"] or 0), 45.0,
                                                           rel_tol=1e-3)  # fmt: skip


def test_matrices_that_stood_still_are_named() -> None:
    """Breaks when a layer that was frozen by mistake is not told."""
    pair, _ = lora_pair("llama")
    still = replace(pair.changes[0], factors=tuple(0 * each for each in pair.changes[0].factors or ()))  # type: ignore[arg-type]
    report = Drift().of(replace(pair, changes=(still, *pair.changes[1:])))
    assert report.numbers["changed_matrices"] == len(pair.changes) - 1
    assert any("did not move at all" in sentence and still.name in sentence for sentence in report.verdict)
