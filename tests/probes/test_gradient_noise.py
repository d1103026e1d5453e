"""Gradient noise: gradients of known noise, and what is advised of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from luthier.model.comparing.pair import Gradients
from luthier.probes import Report
from luthier.probes.gradient_noise import GradientNoise
from tests.pairs import lora_pair


def told(step_rows: float, *, mean: float = 0.1, rows: int = 4) -> Report:
    """What is said of gradients with |G|^2 = 2000 mean^2 and tr(Sigma) = 2000."""

    def each(count: int) -> Iterator[Tensor]:
        draws = torch.Generator().manual_seed(0)
        yield from (mean + torch.randn(2000, generator=draws) / rows**0.5 for _ in range(count))

    pair, _ = lora_pair("llama")
    source = Gradients(each, rows=rows, step_rows=step_rows, row_tokens=50.0)
    return GradientNoise(micro_batches=100).of(replace(pair, gradients=source))


@pytest.mark.parametrize(("step_rows", "words"), [(10.0, "Larger steps would pay"), (100.0, "balanced"),
                                                  (1000.0, "larger than pays")])  # fmt: skip
def test_the_advice_follows_the_scale(step_rows: float, words: str) -> None:
    """Breaks when the scale is off by the rows of a micro-batch, or the advice is the wrong way round."""
    report = told(step_rows)
    assert float(report.numbers["noise_scale_rows"] or 0) == pytest.approx(100.0, rel=0.2)
    assert float(report.numbers["noise_scale_tokens"] or 0) == pytest.approx(5000.0, rel=0.2)
    assert words in report.verdict[1]


def test_gradients_without_a_signal_have_no_scale() -> None:
    """Breaks when noise alone gives a number."""
    report = told(10.0, mean=0.0)
    assert report.numbers["noise_scale_rows"] is None and "noise drowns" in report.verdict[0]
