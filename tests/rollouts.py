"""Rollouts without an engine: a speaker that asks the zoo's model, and groups of random answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from luthier.adapters import Adapter
from luthier.adapters.lora import LoRA
from luthier.core.events import Event
from luthier.data.forest import Forest, Ints, Note, Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Answer, Group, Prompt, noting
from luthier.data.sample import Sample
from luthier.model.language_model import LanguageModel
from luthier.model.running.outputs import TokenOutputs
from luthier.model.speaker import Sampling, Spoken
from luthier.optimizers.adamw import AdamW
from luthier.rewards import Score
from luthier.train.recall import recall
from luthier.train.rolling import Plan
from luthier.train.rollouts import RolloutSource
from luthier.train.scoring import Scored
from luthier.train.stepper import Stepper
from tests import forests


class FakeSpeaker:
    """Samples by the zoo's own forward pass of whole rows, and remembers what it was asked for."""

    def __init__(self, model: LanguageModel, *, off: float = 0.0) -> None:
        self.model = model
        self.off = off
        self.asked: list[Sampling] = []

    @torch.no_grad()
    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One after the other; each draws with numbers of its own."""
        self.asked.append(sampling)
        self.model.train(False)
        return [self._one(ids, sampling, place) for place, ids in enumerate(prompts)]

    def _one(self, ids: Ints, sampling: Sampling, place: int) -> Spoken:
        rng = np.random.default_rng([sampling.seed, place])
        said: list[int] = []
        told: list[float] = []
        while len(said) < sampling.max_new_tokens and not (said and said[-1] in sampling.stop_ids):
            row = torch.from_numpy(np.concatenate([ids, np.array(said, np.int32)]).astype(np.int64))
            logits = self.model.module(row[None]).logits[0, -1].float() / sampling.temperature
            log_probs = torch.log_softmax(logits, -1)
            token = int(np.searchsorted(np.cumsum(log_probs.exp().double().numpy()), rng.random()))
            said.append(min(token, len(log_probs) - 1))
            told.append(float(log_probs[said[-1]]) + self.off)
        ended = "stop" if said[-1] in sampling.stop_ids else "length"
        return Spoken(np.array(said, np.int32), told, ended)


def random_group(rng: np.random.Generator, *, answers: int = 3, row: int = 0, foreign: bool = True) -> Group:
    """Answers that nobody sampled; of some, tokens in the middle are somebody else's."""
    made = []
    for number in range(answers):
        size = int(rng.integers(2, 7))
        own = np.ones(size, dtype=np.bool_)
        if foreign and size > 3 and number % 2:
            own[1:3] = False
        told = np.where(own, -rng.exponential(2.0, size), 0).astype(np.float32)
        made.append(Answer(forests.tokens(rng, size), own, told, reward=float(rng.normal())))
    return Group(forests.tokens(rng, int(rng.integers(2, 6))), tuple(made), row=row)


def random_trees(objective: RolloutLearner, count: int = 5, *, seed: int = 3, foreign: bool = True) -> list[Tree]:
    """The trees of random groups, with all notes that the objective wants, found by nobody."""
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, answers=2 + row % 3, row=row, foreign=foreign) for row in range(count)]
    wanted: list[Note] = sorted({*objective.recalled, *(["reference"] if objective.reference else [])})
    trees = [objective.grow(group) for group in groups]
    for note in wanted:
        trees = [
            noting(tree, note, [_random(rng, note, leaf.weighted) for leaf in tree.segments[1:]]) for tree in trees
        ]
    return objective.credited(groups, trees, leash=objective.leash)[0]


def _random(rng: np.random.Generator, note: Note, weighted: np.ndarray) -> np.ndarray:
    found = rng.normal(size=int(weighted.sum()))
    return found if note == "value" else -np.abs(found) - 1


def outputs_of(tree: Tree, log_probs: Sequence[float], **more: Any) -> tuple[TokenOutputs, Forest]:
    """What a model would give for a tree that said these log-probabilities."""
    forest = Forest((tree,))
    layout = forest.layout
    said = torch.tensor(log_probs, requires_grad=True)
    return TokenOutputs(
        said, torch.from_numpy(layout.labels), torch.from_numpy(layout.weights), torch.from_numpy(layout.rows),
        torch.from_numpy(layout.trees), notes={name: torch.from_numpy(each) for name, each in layout.notes.items()},
        **more,
    ), forest  # fmt: skip


def stepper_for(
    objective: RolloutLearner,
    *,
    architecture: str = "llama",
    rate: float = 1e-2,
    micro_tokens: int = 4096,
    adapter: Adapter | None = None,
    shaken: bool = True,
    model: LanguageModel | None = None,
) -> Stepper:
    """A tiny model that trains with an objective."""
    model = model or forests.language_model(architecture)
    torch.manual_seed(1)
    size = int(model.config.get_text_config().hidden_size)
    edits = [*(adapter or LoRA()).attach(model.sites), *objective.own(size, model.device)]
    attachment = model.attach(edits)
    if shaken:
        forests.shake(attachment.named_parameters().values(), seed=2)
    return Stepper(model, attachment, objective, AdamW(learning_rate=rate), micro_tokens=micro_tokens)


def scorer(worth: Callable[[Sample], float | None]) -> Callable[[Sequence[Sample]], Scored]:
    """Scores by a function; None leaves an answer out."""

    def score(samples: Sequence[Sample]) -> Scored:
        values = [worth(sample) for sample in samples]
        return Scored(tuple(None if value is None else Score(value, {"worth": value}) for value in values))

    return score


def source_for(
    stepper: Stepper,
    worth: Callable[[Sample], float | None],
    *,
    prompts: Sequence[Prompt] | None = None,
    plan: Mapping[str, Any] | None = None,
    off: float = 0.0,
    speaker: Any = None,
) -> RolloutSource:
    """A source of rollouts of a tiny model."""
    rng = np.random.default_rng(5)
    objective = stepper.objective.learner
    assert objective is not None
    made = prompts or [Prompt(forests.tokens(rng, 3 + row % 3), row=row) for row in range(5)]
    made_plan = Plan(prompts=2, answers=4, max_new_tokens=5, stop_ids=(1, 2, 3))
    return RolloutSource(
        made, objective, speaker or FakeSpeaker(stepper.model, off=off), scorer(worth),
        recall=lambda trees, wanted: recall(stepper, trees, wanted),
        decode=lambda ids: " ".join(map(str, ids.tolist())), plan=replace(made_plan, **(plan or {})), seed=7,
    )  # fmt: skip


def of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    """The events of one kind."""
    return [event for event in events if event.kind == kind]
