"""An engine somewhere else, without HTTP: a twin of the model that is trained, which gets weights and keeps them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from luthier.core.waiting import Waits
from luthier.data.forest import Ints
from luthier.data.rollout_learner import RolloutLearner
from luthier.model.speaker import Sampling, Spoken
from luthier.train.stepper import Stepper
from tests import rollouts

Weights = Mapping[str, NDArray[Any]]


class Elsewhere:
    """Hands weights over to its twin. `before` is called, in the thread that waits, before anything is said."""

    def __init__(self, stepper: Stepper, objective: RolloutLearner) -> None:
        self.own = stepper.masters
        self.twin = rollouts.stepper_for(objective)
        self.waits = Waits("it")
        self.before: Callable[[PinnedTwin], None] = lambda pinned: None
        self.pins: list[PinnedTwin] = []
        self.closed = False
        self.lock = threading.Lock()

    def pinned(self, sampling: Sampling, weights: Weights | None = None) -> PinnedTwin:
        own = {name: each.detach().numpy().copy() for name, each in self.own.items()}
        self.pins.append(PinnedTwin(self, own if weights is None else weights))
        return self.pins[-1]

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        return self.pinned(sampling).speak(prompts, sampling)

    def told(self) -> Mapping[str, Any]:
        return {}

    def end(self) -> None:
        self.waits.end()

    def close(self) -> None:
        self.closed = True


class PinnedTwin:
    """What the twin says with some weights."""

    def __init__(self, place: Elsewhere, weights: Weights) -> None:
        self.place = place
        self.weights = weights
        self.lost = False
        self.thread = ""
        self.asked = 0

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        self.thread = threading.current_thread().name
        self.place.before(self)
        self.asked += 1
        with self.place.lock, torch.no_grad():
            for name, each in self.place.twin.masters.items():
                each.copy_(torch.from_numpy(self.weights[name].copy()))
            return rollouts.FakeSpeaker(self.place.twin.model).speak(prompts, sampling)
