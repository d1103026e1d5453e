"""Attention: patterns against the zoo's own, entropies against closed forms, changes of a planted head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.probes import attention as module
from luthier.probes.attention import Attention, patterns
from tests import forests
from tests.pairs import IDS, full_pair, lora_pair
from tests.tiny import LAYERS


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_patterns_are_distributions_over_what_was_seen(kind: str) -> None:
    """Breaks when another attention runs than the one that is shown, or a later token is seen."""
    model = forests.language_model(kind)
    found = patterns(model, IDS[0])
    assert len(found) == LAYERS and all(layer.shape == (4, 10, 10) for layer in found)
    for layer in found:
        assert torch.allclose(layer.sum(-1), torch.ones(4, 10), atol=1e-5)
        assert float(layer.triu(1).abs().max()) == 0.0


def test_what_an_adapter_changes_is_seen() -> None:
    """Breaks when the adapter is off while the tuned model is looked at."""
    pair, model = lora_pair("llama", std=0.5)
    tuned = patterns(model, IDS[0])
    with model.without_attachments():
        base = patterns(model, IDS[0])
    report = Attention(texts=1).of(pair)
    moved = torch.stack([(new - old).abs().sum(-1)[:, 1:].mean(1) / 2 for new, old in zip(tuned, base, strict=True)])
    assert float(report.numbers["largest_change"] or 0) == pytest.approx(float(moved.max()), rel=1e-4)
    assert moved.argmax() == int(report.numbers["layer"] or 0) * 4 + int(report.numbers["head"] or 0)


def test_a_head_that_looks_everywhere_has_an_entropy_of_one() -> None:
    """Breaks when rows are not measured by what they could have been."""
    even = torch.tril(torch.ones(1, 6, 6))
    even = even / even.sum(-1, keepdim=True)
    assert float(module._entropies([even])[0]) == pytest.approx(1.0)
    first = torch.zeros(1, 6, 6)
    first[:, :, 0] = 1.0
    assert float(module._entropies([first])[0]) == pytest.approx(0.0, abs=1e-6)


def test_models_that_are_equal_look_alike() -> None:
    """Breaks when noise is told as a change."""
    pair, _ = full_pair("gpt2", std=0.0)
    report = Attention(texts=2, tokens=8).of(pair)
    assert report.numbers["largest_change"] == 0.0 and "no attention has changed" in report.verdict[0]
    assert all(np.isfinite(value) for grid in report.grids for row in grid.values for value in row if value is not None)
