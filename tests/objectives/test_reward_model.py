"""Reward models: what is scored, and how near they come to the best that any could be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.core.errors import DataError
from luthier.data.forest import Forest
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.model.tasks import SCORES
from luthier.objectives.reward_model import RewardModel
from luthier.optimizers.adamw import AdamW
from luthier.train.stepper import Stepper
from tests import forests, task_models

PROMPT, ANSWER = 3, 6
WORTH = {7: 1.2, 11: -0.9, 19: 0.5, 23: -1.5}
"""What a token adds to the worth of an answer."""


def test_an_answer_is_scored_at_its_last_token_only() -> None:
    """Breaks when a score is taken at the prompt, or at every token."""
    for view in task_models.views_for(RewardModel()):
        (tree,) = RewardModel().trees(view)
        assert tree.weight == pytest.approx(1.0) and not tree.segments[0].weights.any()
        for leaf in tree.segments[1:]:
            assert np.flatnonzero(leaf.weights).tolist() == [len(leaf.tokens) - 1]
    model = task_models.language_model("llama", SCORES)
    forest = Forest((tree,))
    scores = model.token_outputs(forest).scores
    assert scores is not None and len(scores) == len(tree.segments) - 1
    with pytest.raises(DataError, match="no scores"):
        RewardModel().loss(forests.language_model("llama").token_outputs(forest), forest)


def worth(tokens: np.ndarray) -> float:
    return sum(WORTH.get(int(token), 0.0) for token in tokens)


def compared(count: int, *, seed: int) -> tuple[list[Rendered], float]:
    """Pairs drawn by Bradley-Terry from what answers are worth, and how often the better one was chosen."""
    rng = np.random.default_rng(seed)
    views, right = [], 0
    for row in range(count):
        prompt = rng.integers(30, 60, PROMPT)
        answers = [np.where(rng.random(ANSWER) < 0.5, rng.choice(list(WORTH), ANSWER), rng.integers(30, 60, ANSWER))
                   for _ in range(2)]  # fmt: skip
        gap = worth(answers[0]) - worth(answers[1])
        if rng.random() > 1 / (1 + math.exp(-gap)):
            answers.reverse()
        gap = worth(answers[0]) - worth(answers[1])
        right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        numbers = np.repeat(np.arange(3, dtype=np.uint8), [PROMPT, ANSWER, ANSWER])
        roles = [TOKEN_ROLES.index(name) for name in ("user", "assistant", "wrong")]
        tokens = np.concatenate([prompt, *answers]).astype(np.int32)
        weights = (numbers > 0).astype(np.float32)
        made = forests.view(row, tokens, weights=weights, roles=[roles[number] for number in numbers])
        views.append(Rendered(made.row, made.text, tokens, weights, made.roles, made.spans, answers=numbers))
    return views, right / count


def test_it_comes_near_to_the_best_that_any_could_be() -> None:
    """Breaks when scores do not follow worth: the best that can be told is what chance has not turned round."""
    method = RewardModel()
    model = task_models.language_model("llama", SCORES)
    torch.manual_seed(0)
    attachment = model.attach(LoRA(rank=32, targets="all-linear").attach(model.sites))
    stepper = Stepper(model, attachment, method, AdamW(learning_rate=7e-3))
    training, _ = compared(8192, seed=1)
    held_out, best = compared(600, seed=2)
    made = [tree for view in training for tree in method.trees(view)]
    for step in range(256):
        start = step * 64 % len(made)
        stepper.forward_backward(made[start : start + 64])
        stepper.optim_step(factor=1 - step / 256)
    found = stepper.evaluate([tree for view in held_out for tree in method.trees(view)])
    right, total = found.metrics["accuracy"]
    assert 0.7 < best < 0.95, "the task is neither trivial nor hopeless"
    assert right / total >= 0.95 * best
