"""Singular values before, after and of the change, against whole decompositions."""

from __future__ import annotations

import pytest
import torch

from luthier.probes.spectrum import SingularValues
from tests.pairs import full_pair, lora_pair


@pytest.mark.parametrize("make", [lora_pair, full_pair])
def test_values_are_those_of_the_matrices(make: object) -> None:
    """Breaks when base, tuned and change are mixed up, or the strongest matrix is not the first."""
    pair, _ = make("llama")  # type: ignore[operator]
    report = SingularValues(count=3, shown=2).of(pair)
    known = {change.name: change for change in pair.changes}
    ratios = []
    for name, *values in report.tables[0].rows:
        change = known[str(name)]
        base, delta = change.base(), change.delta()
        wanted = [float(torch.linalg.svdvals(each)[0]) for each in (base, base + delta, delta)]
        assert values == [pytest.approx(each, rel=1e-4) for each in (*wanted, wanted[2] / wanted[0])]
        ratios.append(values[3])
    assert ratios == sorted(ratios, reverse=True) and report.numbers["largest_ratio"] == ratios[0]
    assert len(report.curves) == 2 and set(report.curves[0].lines) == {"base", "tuned", "change"}
