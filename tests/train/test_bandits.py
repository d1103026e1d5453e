"""Problems whose best policy is known in closed form: what reinforcement learning comes to is compared with it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from luthier.adapters.full import Full
from luthier.data.forest import Ints
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Prompt
from luthier.data.sample import Sample
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Spoken
from luthier.objectives.grpo import GRPO
from luthier.objectives.ppo import PPO
from luthier.train.stepper import Stepper
from tests import rollouts

PROMPT = np.array([0, 1, 1, 0], np.int32)
"""Not one token alone: states after it and after an answer of the same token would be one and the same."""
WITHIN = 0.02


def bandit(arms: int) -> LanguageModel:
    """A model with so many tokens, each an arm."""
    attention.register()
    config = transformers.LlamaConfig(
        vocab_size=arms, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    module.set_attn_implementation(attention.NAME)
    return LanguageModel(module, source="bandit", digest="")


@torch.no_grad()
def policy(model: LanguageModel, arms: int, count: int) -> dict[tuple[int, ...], float]:
    """The probability of each answer of `count` tokens."""
    model.train(False)
    answers = list(itertools.product(range(arms), repeat=count))
    rows = torch.tensor([[*PROMPT, *answer] for answer in answers])
    before = len(PROMPT) - 1
    log_probs = torch.log_softmax(model.module(rows).logits.double(), -1)[:, before:-1]
    told = log_probs.gather(2, rows[:, before + 1 :, None])
    return dict(zip(answers, told.sum((1, 2)).exp().tolist(), strict=True))


class Arms:
    """Draws many answers to one prompt at once, from the table of all of them."""

    def __init__(self, model: LanguageModel, arms: int) -> None:
        self.model, self.arms = model, arms

    @torch.no_grad()
    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """Answers of the greatest length, since nothing stops them."""
        self.model.train(False)
        answers = list(itertools.product(range(self.arms), repeat=sampling.max_new_tokens))
        rows = torch.tensor([[*PROMPT, *answer] for answer in answers])
        before = len(PROMPT) - 1
        log_probs = torch.log_softmax(self.model.module(rows).logits.float(), -1)[:, before:-1]
        told = log_probs.gather(2, rows[:, before + 1 :, None])[:, :, 0]
        chances = told.sum(1).double().exp().numpy()
        drawn = np.random.default_rng(sampling.seed).choice(len(answers), len(prompts), p=chances / chances.sum())
        return [Spoken(np.array(answers[place], np.int32), told[place].tolist(), "length") for place in drawn]


def learn(
    objective: RolloutLearner, worth: dict[tuple[int, ...], float], *, arms: int, steps: int, rate: float, answers: int
) -> tuple[Stepper, LanguageModel]:
    """Train on one prompt, at a rate that falls to nothing."""
    model = bandit(arms)
    stepper = rollouts.stepper_for(objective, model=model, adapter=Full(), rate=rate, shaken=False)

    def value(sample: Sample) -> float:
        return worth[sample.tokens]

    plan: dict[str, Any] = {
        "prompts": 1, "answers": answers, "max_new_tokens": len(next(iter(worth))), "stop_ids": ()
    }  # fmt: skip
    source = rollouts.source_for(stepper, value, prompts=[Prompt(PROMPT)], plan=plan, speaker=Arms(model, arms))
    for step in range(steps):
        report = stepper.forward_backward(source.next_step())
        source.told(report)
        stepper.optim_step(factor=1 - step / steps)
    return stepper, model


THREE = {(0,): 1.0, (1,): 0.2, (2,): 0.7}
TWO_TOKENS = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): -0.5}


@pytest.mark.parametrize(
    ("worth", "arms"),
    [pytest.param(THREE, 3, marks=pytest.mark.slow, id="three arms"), pytest.param(TWO_TOKENS, 2, id="two tokens")],
)
def test_ppo_reaches_the_tilted_reference(worth: dict[tuple[int, ...], float], arms: int) -> None:
    """Breaks when the KL has the wrong sign or place, or credit goes to other tokens: pi* = ref exp(r / beta) / Z."""
    beta, count = 0.5, len(next(iter(worth)))
    reference = policy(bandit(arms), arms, count)
    tilted = {answer: chance * np.exp(worth[answer] / beta) for answer, chance in reference.items()}
    best = {answer: chance / sum(tilted.values()) for answer, chance in tilted.items()}
    objective = PPO(beta=beta, passes=2, value_factor=0.5, lam=1.0)
    _, model = learn(objective, worth, arms=arms, steps=100, rate=1e-2, answers=64)
    found = policy(model, arms, count)
    distance = sum(abs(found[answer] - best[answer]) for answer in best) / 2
    moved = sum(abs(reference[answer] - best[answer]) for answer in best) / 2
    assert moved > 0.1
    assert distance < WITHIN, (found, best)


def test_reinforce_finds_the_best_arm() -> None:
    """Breaks when plain policy gradients do not: PPO whose values are not learned, in one pass: ratios are 1."""
    objective = PPO(beta=0.0, value_factor=0.0, lam=1.0, passes=1)
    _, model = learn(objective, THREE, arms=3, steps=50, rate=1e-2, answers=16)
    assert policy(bandit(3), 3, 1)[(0,)] < 0.6
    assert policy(model, 3, 1)[(0,)] > 1 - WITHIN


@pytest.mark.parametrize(
    "preset", ["grpo", "rloo", *(pytest.param(each, marks=pytest.mark.slow) for each in ("dr_grpo", "dapo", "gspo"))]
)
def test_groups_find_the_best_arm(preset: Any) -> None:
    """Breaks when advantages are turned around, or what is sampled is not what is trained."""
    objective = GRPO(preset=preset, beta=0.0, longest=1)
    _, model = learn(objective, THREE, arms=3, steps=50, rate=1e-2, answers=16)
    assert policy(bandit(3), 3, 1)[(0,)] < 0.6
    assert policy(model, 3, 1)[(0,)] > 1 - WITHIN
