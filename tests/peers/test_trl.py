"""trl as the oracle of preference losses: the same log-probabilities, the same loss, to 1e-6.

What trl says of them is in trl_preferences.json; trl_preferences.py made it with trl's own trainers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.forest import Forest, Segment, Tree
from luthier.maths.preferences import log_odds, pair_losses
from luthier.model.running.outputs import TokenOutputs
from luthier.objectives import Objective
from luthier.objectives.dpo import DPO
from luthier.objectives.kto import BAD, GOOD, KTO
from luthier.objectives.orpo import ORPO
from luthier.objectives.reward_model import RewardModel
from luthier.objectives.simpo import SimPO

TOLD: dict[str, Any] = json.loads(Path(__file__).with_suffix("").with_name("trl_preferences.json").read_text("ascii"))
SIZES: list[list[int]] = TOLD["sizes"]
EXACT = 1e-6


def leaf(count: int, share: float, reference: list[float], **more: float) -> Segment:
    notes: Any = {"reference": np.array(reference[:count], np.float32)}
    notes.update({name: np.full(count, value, np.float32) for name, value in more.items()})
    return Segment(np.arange(count, dtype=np.int32), np.full(count, share / count, np.float32), 0, notes=notes)


def pairs(margins: list[float] | None = None) -> tuple[Forest, torch.Tensor]:
    """The pairs as trees that bear the reference's log-probabilities, and the policy's in the order of tokens."""
    prompt = Segment(np.arange(3, dtype=np.int32), np.zeros(3, np.float32))
    trees, said = [], []
    for row, sizes in enumerate(SIZES):
        leaves = []
        for side, count in enumerate(sizes):
            place = row + side * len(SIZES)
            score = {} if margins is None else {"return": margins[row] * (1 - side)}
            leaves.append(leaf(count, 0.5, TOLD["reference"][place], **score))
            said += TOLD["policy"][place][:count]
        trees.append(Tree((prompt, *leaves), row=row))
    return Forest(tuple(trees)), torch.tensor(said)


def outputs(forest: Forest, said: torch.Tensor, **more: Any) -> TokenOutputs:
    layout = forest.layout
    notes = {name: torch.from_numpy(values) for name, values in layout.notes.items()}
    parts = (layout.labels, layout.weights, layout.rows, layout.trees)
    labels, weights, rows, trees = map(torch.from_numpy, parts)
    return TokenOutputs(said, labels, weights, rows, trees, notes=notes, **more)


def mean(method: Objective, forest: Forest, said: torch.Tensor) -> float:
    report = method.loss(outputs(forest, said), forest)
    assert report.tree_losses is not None and float(report.tree_losses.sum()) == pytest.approx(float(report.sum))
    return float(report.sum) / report.weight


@pytest.mark.parametrize("case", TOLD["dpo"], ids=lambda case: f"{case['shape']}-{case['beta']}")
def test_dpo_is_trls(case: dict[str, Any]) -> None:
    """Breaks when log-probabilities are averaged, or for ipo not averaged, or a sign or a factor is another."""
    forest, said = pairs()
    method = DPO(beta=case["beta"], shape=case["shape"])
    report = method.loss(outputs(forest, said), forest)
    assert float(report.sum) / report.weight == pytest.approx(case["loss"], rel=EXACT, abs=EXACT)
    for ours, theirs in (
        ("accuracy", "accuracies"), ("margin", "margins"), ("chosen_reward", "chosen"), ("rejected_reward", "rejected")
    ):  # fmt: skip
        total, weight = report.metrics[ours]
        assert total / weight == pytest.approx(case["metrics"][f"rewards/{theirs}"], rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("case", TOLD["cpo"], ids=lambda case: f"{case['shape']}-{case['beta']}")
def test_smoothing_and_simpo_are_trls(case: dict[str, Any]) -> None:
    """Breaks when SimPO's margin is scaled by beta, or smoothing keeps the sign of a difference."""
    forest, said = pairs()
    if case["shape"] == "simpo":
        method = SimPO(beta=case["beta"], gamma=case["gamma"])
        assert mean(method, forest, said) == pytest.approx(np.mean(case["losses"]), rel=EXACT, abs=EXACT)
    else:
        policy = torch.tensor(TOLD["policy"]).sum(1)
        ours = pair_losses(policy[:4] - policy[4:], kind="sigmoid", beta=case["beta"], flipped=case["label_smoothing"])
        assert ours.tolist() == pytest.approx(case["losses"], rel=EXACT, abs=EXACT)


def test_orpo_is_trls() -> None:
    """Breaks when odds are those of a sum, or underflow."""
    policy = torch.tensor(TOLD["policy"]).sum(1) / torch.tensor([*zip(*SIZES, strict=True)]).flatten()
    odds = log_odds(policy)
    ours = TOLD["orpo"]["odds"] * pair_losses(odds[:4] - odds[4:], kind="sigmoid")
    assert ours.tolist() == pytest.approx(TOLD["orpo"]["losses"], rel=EXACT, abs=EXACT)
    forest, said = pairs()
    whole = np.mean(TOLD["orpo"]["losses"]) - float(policy[:4].mean())
    assert mean(ORPO(odds=TOLD["orpo"]["odds"]), forest, said) == pytest.approx(whole, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("case", TOLD["kto"], ids=["kl-above-0", "kl-below-0"])
def test_kto_is_trls(case: dict[str, Any]) -> None:
    """Breaks when the point of reference may be below 0, or bad answers are weighed as good ones."""
    method = KTO(beta=case["beta"], bad=case["bad"])
    prompt = Segment(np.arange(3, dtype=np.int32), np.zeros(3, np.float32))
    sizes = [pair[0] for pair in SIZES] + [pair[1] for pair in SIZES]
    trees, said = [], []
    for row, (count, good) in enumerate(zip(sizes, case["labels"], strict=True)):
        mark = {"return": GOOD if good else BAD}
        trees.append(Tree((prompt, leaf(count, 1.0, TOLD["reference"][row], **mark)), row=row))
        said += TOLD["policy"][row][:count]
    forest = Forest(tuple(method.informed(trees, case["kl"])))
    assert mean(method, forest, torch.tensor(said)) == pytest.approx(case["loss"], rel=EXACT, abs=EXACT)


def test_a_reward_model_is_trls() -> None:
    """Breaks when the margin has the wrong sign, or centring takes the mean of the two scores."""
    case = TOLD["reward_model"]
    forest, _ = pairs(case["margin"])
    ends = []
    for row in range(len(SIZES)):
        ends += [case["scores"][row], case["scores"][row + 4]]
    marked = tuple(
        Tree((tree.segments[0], *(_at_end(each) for each in tree.segments[1:])), row=tree.row) for tree in forest.trees
    )
    forest = Forest(marked)
    method = RewardModel(scores="margin", centring=case["centring"])
    report = method.loss(outputs(forest, torch.zeros(8), scores=torch.tensor(ends)), forest)
    assert float(report.sum) / report.weight == pytest.approx(case["loss"], rel=EXACT, abs=EXACT)


def _at_end(leaf: Segment) -> Segment:
    weights = np.zeros_like(leaf.weights)
    weights[-1] = 0.5
    return Segment(leaf.tokens, weights, 0, labels=np.zeros_like(leaf.tokens), notes=leaf.notes)
