"""A tree that runs in parts gives the losses and gradients of the tree at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core import catalog
from luthier.data.forest import ROOT, Forest, Segment, Tree
from luthier.model.language_model import LanguageModel
from luthier.model.running.parts import can_split
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.pass_report import PassReport
from luthier.train.stepper import Stepper
from tests.forests import ARCHITECTURES, shake, zoo


def _segment(generator: np.random.Generator, count: int, parent: int = ROOT) -> Segment:
    tokens = generator.integers(0, 60, count).astype(np.int32)
    return Segment(tokens, generator.random(count).astype(np.float32), parent)


def _nested() -> Tree:
    generator = np.random.default_rng(3)
    shape = [(5, ROOT), (4, 0), (6, 0), (3, 2), (2, 0), (3, 1)]
    return Tree(tuple(_segment(generator, count, parent) for count, parent in shape), row=7)


def _gradients(architecture: str, adapter: str, micro_tokens: int) -> tuple[PassReport, dict[str, torch.Tensor]]:
    model = LanguageModel(zoo(architecture), source=architecture, digest="")
    torch.manual_seed(1)
    attachment = model.attach(catalog.load("adapters", adapter)().attach(model.sites))  # type: ignore[attr-defined]
    shake(attachment.named_parameters().values(), seed=2)
    stepper = Stepper(model, attachment, SFT(), AdamW(), micro_tokens=micro_tokens)
    report = stepper.forward_backward([_nested()])
    gradients = {name: p.grad.clone() for name, p in stepper.parameters.items() if p.grad is not None}
    return report, gradients


@pytest.mark.parametrize("adapter", ["full", "lora", "prefix_tuning"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_equal_the_whole(architecture: str, adapter: str) -> None:
    """Breaks when a branch's gradient into the root's keys, values or last state is lost, or a first label is."""
    whole, expected = _gradients(architecture, adapter, 1000)
    for micro_tokens in (7, 1):
        parts, found = _gradients(architecture, adapter, micro_tokens)
        assert parts.trained_tokens == whole.trained_tokens
        assert parts.tokens == whole.tokens
        assert parts.weight == pytest.approx(whole.weight, rel=1e-6)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            tolerance = 1e-5 * float(gradient.abs().max()) + 1e-9
            assert torch.allclose(found[name], gradient, rtol=0, atol=tolerance), name


def test_only_trees_with_one_branching_root_split() -> None:
    """Breaks when a plain row, or two roots, would be taken for a trunk with branches."""
    generator = np.random.default_rng(0)
    assert can_split(_nested())
    assert not can_split(Tree((_segment(generator, 9),)))
    assert not can_split(Tree((_segment(generator, 3), _segment(generator, 3))))
    assert Forest((_nested(),)).token_count == 23
