"""Intruder dimensions of whole models against a brute-force count, with their control."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.model.comparing.pair import Pair
from luthier.probes.intruder_dimensions import IntruderDimensions
from tests.pairs import full_pair, lora_pair


def brute(pair: Pair, k: int, epsilon: float) -> int:
    """The definition, matrix by matrix: leading left vectors of the tuned matrix that no left vector of the base is."""
    count = 0
    for change in pair.changes:
        if change.linear:
            old = torch.linalg.svd(change.base(), full_matrices=False)[0]
            new = torch.linalg.svd(change.base() + change.delta(), full_matrices=False)[0][:, :k]
            count += int(((old.t() @ new).abs().max(0).values < epsilon).sum())
    return count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [lora_pair, full_pair])
def test_counts_are_those_of_the_definition(make: object, kind: str) -> None:
    """Breaks when a matrix is left out, a head or an embedding is counted, or a threshold means another count."""
    pair, _ = make(kind)  # type: ignore[operator]
    for epsilon in (0.4, 0.5, 0.7):
        report = IntruderDimensions(k=6, epsilon=epsilon, controls=0).of(pair)
        assert report.numbers["intruders"] == brute(pair, 6, epsilon)
        rows = {row[0]: row[1] for row in report.tables[0].rows}
        assert rows[epsilon] == report.numbers["intruders"] and rows[0.9] == brute(pair, 6, 0.9)
        assert report.numbers["random_change"] is None


def test_a_strong_random_change_is_no_more_than_its_control() -> None:
    """Breaks when the control is weaker than the change, so that any change looks learned."""
    pair, _ = lora_pair("llama", std=1.0)
    report = IntruderDimensions(controls=3).of(pair)
    own, random = float(report.numbers["intruders"] or 0), float(report.numbers["random_change"] or 0)
    assert own > 20 and random == pytest.approx(own, rel=0.25)
    assert any("explains the count" in sentence for sentence in report.verdict)


def test_a_small_change_has_none_and_says_why() -> None:
    """Breaks when a change that cannot show any is told as a good sign."""
    pair, _ = lora_pair("llama", std=0.01)
    report = IntruderDimensions().of(pair)
    assert report.numbers["intruders"] == 0 and "too small" in report.verdict[1]


def test_base_decompositions_are_kept_and_change_nothing(tmp_path: Path) -> None:
    """Breaks when a kept decomposition is not found, or gives another count."""
    pair, _ = lora_pair("llama", folder=tmp_path)
    first = IntruderDimensions().of(pair)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == sum(change.linear for change in pair.changes)
    assert IntruderDimensions().of(pair).as_dict() == first.as_dict()


def test_one_side_is_enough_where_it_is_asked_for() -> None:
    """Breaks when the verdict tells of left vectors and counts right ones."""
    pair, _ = lora_pair("llama")
    both = IntruderDimensions(controls=0).of(pair)
    right = IntruderDimensions(side="right", controls=0).of(pair)
    assert right.numbers["intruders"] == both.numbers["intruders_right"]
    assert "right directions" in right.verdict[0] and len(right.curves) == 1
