"""Bit-exact resume as a promise of every method: one unbroken run, and lives of it that end and are begun anew.

`assert_resumes` trains a few steps unbroken; trains them again while snapshots are written after some of them; and for
each of these makes everything anew (model, edits, optimizer, source, other random numbers), loads the snapshot, and
goes on. After each step every number must be the same to the bit: masters, rounded weights, the optimizer's tensors and
numbers, the random generators, losses, gradient norms, rates, and which rows were seen. One step has a gradient that is
not finite, so that a bad step is among what is resumed from.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.adapters import Adapter
from luthier.core.chosen import choose
from luthier.core.events import Event
from luthier.data.forest import Tree
from luthier.data.rollout_learner import RolloutLearner
from luthier.model.tasks import CAUSAL
from luthier.objectives import Objective, Vocabulary
from luthier.optimizers import Optimizer
from luthier.schedules import Schedule
from luthier.train.first_look import look
from luthier.train.loop import Cadence, Loop
from luthier.train.pass_report import PassReport
from luthier.train.signals import StopRequest
from luthier.train.source import Cursor, DataSource, Source
from luthier.train.state import LoopState, load_state, take_snapshot
from luthier.train.stepper import Stepper
from tests import forests, rollouts, task_models
from tests.tiny import VOCABULARY

STEPS = 7
ROWS_A_STEP = 2
VIEWS = forests.views(5, seed=2)
"""Three steps an epoch: 2, 2 and 1 row."""
BAD_STEP = 5
BREAKS = {"first step": 1, "mid epoch": 2, "epoch end": 3, "bad step": BAD_STEP}
FEW_BREAKS = {when: BREAKS[when] for when in ("mid epoch", "bad step")}
FORGETTABLE = ("optimizer", "random", "cursor", "bad_steps")
RATE = 1e-2
_TIMES = ("seconds", "sampling_seconds", "source_seconds", "time")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, and how many blocks are recomputed. Methods may be names, mappings of knobs, or objects.

    A step is made `at_once` where the optimizer steps in the backward pass: in one micro-batch, unclipped.
    """

    adapter: Any = "lora"
    objective: Any = "sft"
    optimizer: Any = "adamw"
    schedule: Any = "cosine"
    architecture: str = "llama"
    dtype: torch.dtype = torch.float32
    recomputed: int = 0
    at_once: bool = False


@dataclass
class Trace:
    """What a run was after each step, by step: digests of its state, what it logged, which rows it saw."""

    states: dict[int, dict[str, str]] = field(default_factory=dict)
    logged: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)

    def since(self, step: int) -> Trace:
        """What the run was after `step`, and everything behind it."""
        states = {number: state for number, state in self.states.items() if number >= step}
        return Trace(states, [event for event in self.logged if event["step"] > step], self.rows[step:])


class NotedSource(Source):
    """A source that remembers the rows of each step."""

    def __init__(self, inner: Source, rows: list[tuple[int, ...]]) -> None:
        self.inner = inner
        self.rows = rows

    def next_step(self) -> list[Tree]:
        trees = self.inner.next_step()
        self.rows.append(tuple(tree.row for tree in trees))
        return trees

    @property
    def cursor(self) -> Cursor:
        return self.inner.cursor

    def seek(self, cursor: Cursor) -> None:
        self.inner.seek(cursor)

    def held(self) -> Mapping[str, Any]:
        return self.inner.held()

    def hold(self, arrays: Mapping[str, Any]) -> None:
        self.inner.hold(arrays)

    def told(self, passed: PassReport) -> list[Event]:
        return self.inner.told(passed)


class Life:
    """One life of a run: everything in it is made anew. It is its own recorder and keeper."""

    def __init__(
        self, setup: Setup, *, seed: int, snapshots: Mapping[int, Path] | None = None, goes_on: bool = False
    ) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        objective = with_dropout("objectives", Objective, setup.objective)
        objective = objective.with_vocabulary(Vocabulary(VOCABULARY, mask_id=2))
        model = task_models.model_for(objective, architecture=setup.architecture, dtype=setup.dtype)
        # The weights an adapter begins with are the run's, not the life's: a resumed life draws others.
        adapter = with_dropout("adapters", Adapter, setup.adapter)
        size = int(model.config.get_text_config().hidden_size)
        attachment = model.attach([*adapter.attach(model.sites), *objective.own(size, model.device)])
        model.recompute(setup.recomputed)
        optimizer = choose("optimizers", Optimizer, _with(setup.optimizer, "learning_rate", RATE))
        cut = {"micro_tokens": 4096, "max_grad_norm": None} if setup.at_once else {"micro_tokens": 20}
        self.stepper = Stepper(model, attachment, objective, optimizer, **cut)  # type: ignore[arg-type]
        self.schedule = choose("schedules", Schedule, setup.schedule)
        self.trace = Trace()
        plain = model.task == CAUSAL and objective.meanings is None
        views = VIEWS if plain else task_models.views_for(objective, len(VIEWS), seed=2)
        lengths = forests.lengths(views)
        rows: Source = DataSource(views, objective, lengths=lengths, seed=3, rows=ROWS_A_STEP)
        if isinstance(objective, RolloutLearner):
            rows = rollouts.source_for(self.stepper, lambda sample: float(sample.tokens[0] % 5))
        self.source = NotedSource(rows, self.trace.rows)
        data = self.source.inner
        if not goes_on and isinstance(data, DataSource):
            # A life that goes on has what an earlier one found.
            adapter.settle(attachment.edits, lambda: look(self.stepper, data.first_rows(adapter.first_look)))
        self.held_out = [tree for view in views[:2] for tree in objective.trees(view)]
        if isinstance(objective, RolloutLearner):
            self.held_out = rollouts.random_trees(objective, 2)
        self.row_excess: dict[int, float] = {}
        self.snapshots = dict(snapshots or {})
        self.state = LoopState(total_steps=STEPS)

    def go(self) -> Trace:
        """Train to the end."""
        self._spoil_one_step()
        cadence = Cadence(evaluate_every=2, save_every=1)
        Loop(
            source=self.source, stepper=self.stepper, schedule=self.schedule, cadence=cadence, recorder=self,
            keeper=self, stop=StopRequest(), eval_trees=self.held_out,
        ).run(self.state)  # fmt: skip
        return self.trace

    # ------------------------------------------------------------------------------------- what a snapshot is, here

    def write_snapshot(self, folder: Path) -> None:
        """Everything a resumed run needs, in files."""
        folder.mkdir(parents=True)
        take_snapshot(self.state, self.stepper, self.row_excess, held=self.source.held()).write(folder)

    def load_snapshot(self, folder: Path) -> None:
        """Become what was saved there."""
        self.state, self.row_excess = load_state(folder, self.stepper, self.source)

    # ------------------------------------------------------------------------------------------ recorder and keeper

    def record(self, event: Event) -> None:
        if event.kind != "checkpoint":
            # As text, since a loss that is NaN does not equal itself.
            said = {key: repr(value) for key, value in event.as_dict().items() if key not in (*_TIMES, "step")}
            self.trace.logged.append({"step": event.step or 0, **said})

    def save(self, state: LoopState, *, best: bool) -> bool:
        self.trace.states[state.step] = digests(self)
        if state.step in self.snapshots:
            self.write_snapshot(self.snapshots[state.step])
        return True

    def poll(self) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        return []

    def abandon(self, *, at_once: bool) -> None:
        """Nothing is in flight."""

    def pin(self) -> str:
        return ""

    def _spoil_one_step(self) -> None:
        """The gradient of step `BAD_STEP` is not finite, whichever life makes that step."""
        plain = self.stepper.forward_backward
        if self.stepper.in_backward is not None:
            names = list(self.stepper.parameters)
            spoilt_one = self.stepper.parameters[names[len(names) // 2]]
            spoilt_one.register_hook(lambda grad: grad * math.nan if self.state.step + 1 == BAD_STEP else None)
            return

        def spoilt(trees: Any) -> Any:
            report = plain(trees)
            if self.state.step + 1 == BAD_STEP:
                gradients = (master.grad for master in self.stepper.masters.values())
                next(gradient for gradient in gradients if gradient is not None).view(-1)[0] = math.nan
            return report

        self.stepper.forward_backward = spoilt  # type: ignore[method-assign]


def with_dropout(family: str, base: type[Any], value: Any) -> Any:
    """The method, with its dropout on where it has one: what it draws must be resumed too."""
    made = choose(family, base, value)
    names = [name for name in type(made).model_fields if name.endswith("dropout")]
    return made if not names or isinstance(value, dict) else made.model_copy(update=dict.fromkeys(names, 0.3))


def digests(life: Life) -> dict[str, str]:
    """What the next step depends on, kind by kind."""
    stepper, kinds = life.stepper, dict[str, Any]()
    kinds["masters"] = sorted((name, _bits(tensor)) for name, tensor in stepper.masters.items())
    kinds["parameters"] = sorted((name, _bits(tensor)) for name, tensor in stepper.parameters.items())
    kinds["optimizer"] = [
        (name, key, _bits(value)) for name, master in stepper.masters.items()
        for key, value in sorted(stepper.optimizer.state.get(master, {}).items())
    ]  # fmt: skip
    kinds["groups"] = [
        (key, _bits(value)) for group in stepper.optimizer.param_groups
        for key, value in sorted(group.items()) if key not in ("params", "lr")
    ]  # fmt: skip
    # Python's and NumPy's global generators are drawn from by libraries at will. They are not restored, and each life
    # begins with others: a method that draws from them differs in its masters.
    kinds["random"] = _bits(torch.get_rng_state())
    loop = {key: value for key, value in asdict(life.state).items() if key != "train_seconds"}
    kinds["loop"] = [sorted(loop.items()), sorted(life.row_excess.items())]
    return {kind: hashlib.sha256(repr(value).encode()).hexdigest() for kind, value in kinds.items()}


def unbroken(setup: Setup) -> Trace:
    """A run that nothing happens to."""
    return Life(setup, seed=0).go()


def snapshots_of(setup: Setup, folder: Path, steps: Mapping[str, int] = BREAKS) -> tuple[Trace, dict[int, Path]]:
    """The same run again, saved after some steps."""
    places = {step: folder / f"step-{step}" for step in steps.values()}
    return Life(setup, seed=0, snapshots=places).go(), places


def resumed(setup: Setup, folder: Path, *, forget: str = "") -> Trace:
    """The rest of a run, by a life that knows nothing but the snapshot; `forget` leaves a part of it unread."""
    life = Life(setup, seed=99, goes_on=True)
    life.load_snapshot(folder)
    if forget == "optimizer":
        life.stepper.optimizer.state.clear()
    elif forget == "random":
        torch.manual_seed(5)
    elif forget == "cursor":
        life.state = replace(life.state, epoch=0, used=0)
    elif forget == "bad_steps":
        life.state = replace(life.state, bad_steps=0)
    elif forget:
        raise ValueError(forget)
    life.trace.states[life.state.step] = digests(life)
    return life.go()


def differences(found: Trace, expected: Trace) -> list[str]:
    """Where two traces part, the first differing step of each kind."""
    told = []
    if found.rows != expected.rows:
        told.append(f"rows {found.rows} instead of {expected.rows}")
    if sorted(found.states) != sorted(expected.states):
        told.append(f"steps {sorted(found.states)} instead of {sorted(expected.states)}")
    seen: set[str] = set()
    for step in sorted(set(found.states) & set(expected.states)):
        kinds = {kind for kind in expected.states[step] if found.states[step].get(kind) != expected.states[step][kind]}
        told += [f"{kind} after step {step}" for kind in sorted(kinds - seen)]
        seen |= kinds
    if found.logged != expected.logged:
        pairs = zip(found.logged, expected.logged, strict=False)
        told.append(f"logged {next((pair for pair in pairs if pair[0] != pair[1]), 'events are missing')}")
    return told


def assert_resumes(setup: Setup, folder: Path, *, breaks: Mapping[str, int] = BREAKS) -> None:
    """However a run with this setup is interrupted, going on gives the run that was not."""
    whole = unbroken(setup)
    assert len(whole.rows) == STEPS and sorted(whole.states) == list(range(1, STEPS + 1))
    assert any(event["kind"] == "'bad_step'" and event["step"] == BAD_STEP for event in whole.logged)
    trained = {whole.states[step]["masters"] for step in whole.states}
    # What steps in the backward pass has stepped some tensors before the bad number came.
    assert len(trained) == STEPS - (not setup.at_once), "each step but the bad one changes the weights"
    saved, places = snapshots_of(setup, folder, breaks)
    assert not (told := differences(saved, whole)), f"saving has changed the run: {told}"
    for when, step in breaks.items():
        found = resumed(setup, places[step])
        told = differences(found, whole.since(step))
        assert not told, f"resumed after the {when} (step {step}): {told}"


def _with(value: Any, knob: str, setting: Any) -> Any:
    """A method's mapping with a knob set, unless it is an object that has its own."""
    if isinstance(value, str):
        return {"method": value, knob: setting}
    return {knob: setting, **value} if isinstance(value, dict) else value


def _bits(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(raw).hexdigest()}"
    return repr(value)
