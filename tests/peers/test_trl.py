"""trl as the oracle of losses: the same log-probabilities, the same loss, to 1e-6.

What trl says of them is in files beside this one, each made by a script of its name with trl's own trainers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rollouts import Answer, Group, noting
from luthier.maths.preferences import log_odds, pair_losses
from luthier.model.running.outputs import TokenOutputs
from luthier.objectives import Objective
from luthier.objectives.dpo import DPO
from luthier.objectives.grpo import GRPO
from luthier.objectives.kto import BAD, GOOD, KTO
from luthier.objectives.orpo import ORPO
from luthier.objectives.reward_model import RewardModel
from luthier.objectives.simpo import SimPO

TOLD: dict[str, Any] = json.loads(Path(__file__).with_name("trl_preferences.json").read_text("ascii"))
POLICIES: dict[str, Any] = json.loads(Path(__file__).with_name("trl_policies.json").read_text("ascii"))
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


def groups(objective: GRPO) -> tuple[Forest, torch.Tensor]:
    """The groups as trees with all that was told of their tokens, and the policy's log-probabilities in their order."""
    made, trees, said, row = [], [], [], 0
    for sizes, rewards in zip(POLICIES["groups"], POLICIES["rewards"], strict=True):
        places = range(row, row := row + len(sizes))
        cut = {
            name: [np.array(POLICIES[name][at][:count], np.float32) for at, count in zip(places, sizes, strict=True)]
            for name in ("new", "old", "reference", "sampled")
        }
        answers = tuple(
            Answer(np.arange(count, dtype=np.int32), np.ones(count, np.bool_), sampled, reward)
            for count, sampled, reward in zip(sizes, cut["sampled"], rewards, strict=True)
        )
        made.append(Group(np.arange(3, dtype=np.int32), answers))
        tree = objective.grow(made[-1])
        trees.append(noting(noting(tree, "old", cut["old"]), "reference", cut["reference"]))
        said += [float(one) for each in cut["new"] for one in each]
    credited, _ = objective.credited(made, trees, leash=0.0)
    return Forest(tuple(credited)), torch.tensor(said, requires_grad=True)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "corrected"])
def test_the_kin_of_grpo_are_trls(name: Any) -> None:
    """Breaks when a weight, a ratio, a band or an advantage is another, also where the loss alone would not show it."""
    corrected = {"preset": "grpo", "correction": POLICIES["correction"]}
    objective = GRPO(**(corrected if name == "corrected" else {"preset": name}), longest=POLICIES["longest"])
    forest, said = groups(objective)
    report = objective.loss(outputs(forest, said), forest)
    loss = report.sum / report.weight
    (gradient,) = torch.autograd.grad(loss, said)
    sizes = [count for group in POLICIES["groups"] for count in group]
    theirs = POLICIES[name]
    expected = [one for row, count in zip(theirs["gradient"], sizes, strict=True) for one in row[:count]]
    assert float(loss.detach()) == pytest.approx(theirs["loss"], rel=EXACT, abs=EXACT)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5, abs=EXACT)
    assert any(expected)
