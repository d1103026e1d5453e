"""Divergences against brute force, and trl's on the same logits (tests/peers/trl_distillation.py made the file)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.maths.divergences import Comparison, divergences, kl

TOLD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "peers/trl_distillation.json").read_text("ascii"))


@pytest.mark.parametrize("case", TOLD["cases"], ids=lambda each: f"{each['kind']}-{each['temperature']}")
def test_they_are_trls(case: dict[str, Any]) -> None:
    """Breaks when teacher and student change places, or the middle of jsd is weighed the other way round."""
    student, teacher = (
        torch.log_softmax(torch.tensor(TOLD[who]) / case["temperature"], -1) for who in ("student", "teacher")
    )
    ours = divergences(student, teacher, Comparison(case["kind"], case["share"] or 0.5))
    assert ours.tolist() == pytest.approx(case["losses"], rel=1e-5, abs=1e-6)


def test_what_is_impossible_counts_nothing() -> None:
    """Breaks when 0 log 0 is NaN, or what only the other side thinks impossible is left out."""
    one, two = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(kl(one, two)) == pytest.approx(0.5 * math.log(2))
    assert math.isinf(float(kl(two, one)))
    assert float(kl(two, two)) == 0
