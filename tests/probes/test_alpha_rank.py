"""Alpha and rank: each choice beside the run's own, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from luthier.probes.alpha_rank import AlphaRank
from tests.pairs import lora_pair


def rows_of(**settings: Any) -> dict[Any, list[Any]]:
    pair, _ = lora_pair("llama")
    report = AlphaRank().of(replace(pair, settings=settings))
    return {(row[1], row[2], row[3]): list(row[4:]) for row in report.tables[0].rows}


def test_choices_are_told_by_their_size_beside_the_run() -> None:
    """Breaks when a scale or a power of the rank is wrong."""
    rows = rows_of(rank=16, alpha=8.0, rslora=False)
    assert rows[16, 8.0, "no"] == [1.0] * 4
    # Scale, random B, first SGD step, first Adam step.
    assert rows[16, 32.0, "no"] == pytest.approx([4.0, 4.0, 16.0, 4.0])
    assert rows[64, 8.0, "no"] == pytest.approx([0.25, 0.5, 0.25, 1.0])
    assert rows[64, 128.0, "no"] == pytest.approx([4.0, 8.0, 64.0, 16.0])
    assert rows[16, 8.0, "yes"] == pytest.approx([4.0, 4.0, 16.0, 4.0])
    assert rows[16, 2.0, "yes"] == pytest.approx([1.0] * 4)
    assert rows[64, 2.0, "yes"] == pytest.approx([0.5, 1.0, 1.0, 2.0])


def test_an_rslora_run_is_compared_as_one() -> None:
    """Breaks when alpha of an rsLoRA run is divided by its rank."""
    rows = rows_of(rank=16, alpha=8.0, rslora=True)
    assert rows[64, 8.0, "yes"] == pytest.approx([0.5, 1.0, 1.0, 2.0])
    assert rows[16, 32.0, "no"] == pytest.approx([1.0] * 4)


def test_curves_meet_at_the_run_and_part_as_the_theorem_says() -> None:
    """Breaks when a curve does not pass through the run, or rsLoRA's is not flat after a first SGD step."""
    pair, _ = lora_pair("llama")
    for rslora in (False, True):
        report = AlphaRank().of(replace(pair, settings={"rank": 16, "alpha": 8.0, "rslora": rslora}))
        sgd = report.curves[1].lines
        for name in ("LoRA, alpha fixed", "rsLoRA, alpha fixed"):
            assert dict(sgd[name])[16.0] == pytest.approx(1.0)
        assert dict(sgd["rsLoRA, alpha fixed"])[512.0] == pytest.approx(1.0)
        assert dict(sgd["LoRA, alpha fixed"])[512.0] == pytest.approx(1 / 32)
