"""Numbers that are not finite, put into a run at a random place and step, through the real recipe.

A loss, a gradient or an activation that is not finite must leave weights and optimizer as they were, to the bit, and
be an event that says what, where and which rows. A weight, a base weight or a part of the optimizer that is not finite
must never reach a checkpoint. After three bad steps in a row the run ends with 76 and its last finite checkpoint is
pinned; fewer do not end it. Whatever happens, every number in every checkpoint and in the result is finite.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.core.errors import CorruptError
from luthier.objectives import Objective
from luthier.store.manifest import verify
from luthier.train.loop import Loop
from luthier.train.source import DataSource
from luthier.train.stepper import Stepper, StepReport
from tests.cli.commands import Said
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.in_process import cache_in, luthier
from tests.faults.runs import Combination, Workshop, combinations, events, has_ended, recipe_of, workshop
from tests.faults.watch import HangError, alarmed

FAULT = "NaN and infinity in loss, gradient, activation, weight, base weight, optimizer state, evaluation"
PROMISE = "not applied, an event with its tensor and rows, never in a checkpoint; three in a row end with 76"
CONTROL = "a stepper that steps whatever the norm is"
STEPS, INTERVAL, MOST_BAD = 8, 2, 3
BIT_EQUAL: Final = ("loss", "gradient", "activation")

Kind = Literal["loss", "gradient", "activation", "weight", "base weight", "optimizer", "evaluation"]
KINDS: Final[tuple[Kind, ...]] = (
    "loss", "gradient", "activation", "weight", "base weight", "optimizer", "loss", "gradient", "activation",
    "evaluation",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is put where: a value, into something of a kind, from a step on, for a number of steps.

    `again` says whether a repetition of the step, as a diagnosis makes it, meets it again.
    """

    kind: Kind
    value: float
    first: int
    steps: int
    again: bool
    seed: int

    @property
    def endings(self) -> tuple[int, ...]:
        """How the run may end: 76 where three bad steps in a row fit in, or where what is bad stays bad.

        A base weight that goes bad in memory in the last two steps spoils no file: the result is the best state before,
        and proves with the base as it is on disk (0), or does not (78).
        """
        left = STEPS - self.first + 1
        if self.kind in ("weight", "base weight", "optimizer"):
            return (76,) if self.kind != "base weight" or left >= MOST_BAD else (0, 76, 78)
        return (76,) if min(self.steps, left) >= MOST_BAD and self.kind != "evaluation" else (0,)

    def is_at(self, step: int) -> bool:
        return self.first <= step < self.first + self.steps


@dataclass
class Seen:
    """What was seen of a run from within: digests of masters and optimizer before each step, and at the end."""

    before: dict[int, str] = field(default_factory=dict)
    hit: set[int] = field(default_factory=set)
    place: str = ""


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` runs of every trainable method in turn, one injection each."""
    return _campaign(count, seed, folder)


def control(*, seed: int, folder: Path) -> Campaign:
    """The same with bad steps applied."""
    with _applied_anyway():
        return _campaign(2, seed, folder / "control", kinds=("gradient",))


def _campaign(count: int, seed: int, folder: Path, *, kinds: tuple[Kind, ...] = KINDS) -> Campaign:
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL)
    endings: Counter[str] = Counter()
    shop = workshop(folder.resolve() / "bad-numbers")
    ready = _Ready(shop, seed)
    for trial in range(count):
        dice = random.Random(f"bad numbers {seed} {trial}")
        plan = Plan(
            kind=kinds[trial % len(kinds)],
            value=dice.choice((math.nan, math.inf, -math.inf)),
            first=dice.randrange(1, STEPS),
            steps=dice.choice((1, 1, 2, 2, MOST_BAD, STEPS)),
            again=dice.random() < 0.8,
            seed=dice.randrange(2**31),
        )
        combination, recipe, like = ready.next()
        place = shop.folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        try:
            with alarmed(120), cache_in(shop.folder / "cache"):
                verdict, detail = attempt(plan, recipe, place, like)
        except HangError as hang:
            verdict, detail = "hang", str(hang)
        except Exception as failure:  # noqa: BLE001 (whatever leaves a command is what is looked for)
            verdict, detail = "traceback", f"{type(failure).__name__}: {failure}"
        endings[detail] += verdict == CLEAN
        tally.count(verdict, f"trial {trial} of seed {seed} ({combination}, {plan}): {detail}")
    told = ", ".join(f"{number} {words}" for words, number in sorted(endings.items()) if number)
    tally.notes.append(f"{ready.made} combinations of methods: {told}")
    return tally.result()


class _Ready:
    """Combinations with their recipe and their undisturbed run, those that the recipe refuses left out."""

    def __init__(self, shop: Workshop, seed: int) -> None:
        self.shop = shop
        self.left = combinations(seed=seed)
        self.ready: list[tuple[Combination, Path, Path]] = []
        self.turn = 0

    @property
    def made(self) -> int:
        return len(self.ready)

    def next(self) -> tuple[Combination, Path, Path]:
        """The next new combination, every other time; else one that is there."""
        self.turn += 1
        while self.left and (self.turn % 2 or not self.ready):
            combination = self.left.pop()
            recipe = recipe_of(self.shop, combination, interval=INTERVAL, steps=STEPS)
            like = self.shop.folder / "undisturbed" / str(combination)
            with cache_in(self.shop.folder / "cache"):
                said = luthier("train", recipe, "--run", like, "--json", "--quiet")
            if said.code != 2:
                # An earlier campaign of this folder may have made it.
                assert has_ended(said.code, said.err), said.err
                self.ready.append((combination, recipe, like))
                return self.ready[-1]
        return self.ready[self.turn % len(self.ready)]


def attempt(plan: Plan, recipe: Path, place: Path, like: Path) -> tuple[str, str]:
    """One run with one injection; its verdict."""
    with injected(plan) as seen:
        said = luthier("train", recipe, "--run", place, "--json", "--quiet")
    if not seen.hit:
        return "not injected", "the plan met nothing"
    wrong = _wrong_numbers(place) or _wrong_ending(plan, said, place, seen, like) or _wrong_events(plan, place, seen)
    if not wrong and said.code == 76:
        wrong = _wrong_resumption(place)
    if wrong:
        return "wrong", f"{wrong} [{seen.place}]"
    if said.code:
        return CLEAN, f"stopped with {said.code}"
    return CLEAN, "went on to the end" if _bad_steps(place) else "without any effect"


# ------------------------------------------------------------------------------------------------- what is looked at


def _wrong_numbers(place: Path) -> str:
    """A number that is not finite in a checkpoint or in a result."""
    for path in sorted(place.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{path.relative_to(place)} holds {name} with a number that is not finite"
    return ""


def _wrong_ending(plan: Plan, said: Said, place: Path, seen: Seen, like: Path) -> str:
    if said.code == 0 and _same_result(place, like):
        # Nothing that was put in came through to any number.
        return ""
    if said.code not in plan.endings or "Traceback" in said.err:
        return f"exit {said.code}, not {plan.endings}: {said.err[-300:]}"
    if said.code == 0 and plan.kind == "base weight" and not _bad_steps(place):
        return "ended well without a word of it"
    if plan.kind in BIT_EQUAL:
        changed = [step for step in sorted(seen.hit) if seen.before.get(step + 1, "") not in ("", seen.before[step])]
        if changed:
            return f"steps {changed} have changed weights or optimizer"
    if said.code == 76:
        saved = sorted((place / "checkpoints").glob("step-*"))
        if "is finite and kept" in said.err:
            link = place / "checkpoints" / "finite"
            if not link.is_symlink() or link.resolve() not in [path.resolve() for path in saved]:
                return f"nothing is pinned: {said.err[-200:]}"
            try:
                verify(link.resolve())
            except CorruptError as error:
                return f"what is pinned is damaged: {error}"
        elif plan.first > INTERVAL + 1 and not saved:
            return "no checkpoint is left"
    return ""


def _wrong_events(plan: Plan, place: Path, seen: Seen) -> str:
    """What the log must say of each step that was hit."""
    said = events(place)
    if plan.kind == "evaluation":
        found = [event for event in said if event["kind"] == "evaluation" and event["step"] in seen.hit]
        return "" if found and all(_not_finite(event["loss"]) for event in found) else f"evaluations say {found}"
    if plan.kind not in BIT_EQUAL:
        return ""
    bad = {event["step"]: event for event in said if event["kind"] == "bad_step"}
    steps = {event["step"]: event for event in said if event["kind"] == "step"}
    for step in sorted(seen.hit):
        event = bad.get(step)
        if event is None:
            return f"step {step} has no bad_step event"
        expected = (plan.kind,) if plan.again else ("loss", "gradient")
        if event["what"] not in expected or not event["rows"] or not _not_finite(event["value"]):
            return f"step {step} is told as {event}"
        if plan.again and plan.kind != "loss" and not event["tensor"]:
            return f"step {step} names no tensor: {event}"
        logged = steps.get(step)
        if logged is not None:
            key = "grad_norm" if plan.kind == "gradient" else "loss"
            if not _not_finite(logged[key]):
                return f"step {step} is logged with {key} {logged[key]}"
    return ""


def _wrong_resumption(place: Path) -> str:
    """With the cause gone, the same run goes on to a good end."""
    said = luthier("resume", place, "--json")
    if said.code:
        return f"resume ends with {said.code}: {said.err[-300:]}"
    return _wrong_numbers(place)


def _same_result(place: Path, like: Path) -> bool:
    names = [path.relative_to(like) for kind in ("adapter", "model") for path in (like / kind).glob("*.safetensors")]
    same = [(place / name).is_file() and (place / name).read_bytes() == (like / name).read_bytes() for name in names]
    return bool(same) and all(same) and not _bad_steps(place)


def _bad_steps(place: Path) -> bool:
    """Whether the log tells of a number that is not finite."""
    said = events(place)
    return any(event["kind"] == "bad_step" or _not_finite(event.get("loss", 0.0)) for event in said)


def _not_finite(logged: object) -> bool:
    return logged in ("NaN", "Infinity", "-Infinity")


# ---------------------------------------------------------------------------------------------------- the injection


@contextlib.contextmanager
def injected(plan: Plan) -> Iterator[Seen]:
    """Within the block every run of this process meets the plan."""
    seen, injector = Seen(), _Injector(plan)
    injector.seen = seen
    with contextlib.ExitStack() as undo:
        undo.enter_context(_replaced(DataSource, "next_step", injector.next_step))
        undo.enter_context(_replaced(Stepper, "forward_backward", injector.forward_backward))
        undo.enter_context(_replaced(Stepper, "evaluate", injector.evaluate))
        undo.enter_context(_replaced(Loop, "run", injector.loop))
        try:
            yield seen
        finally:
            injector.unhook()


@contextlib.contextmanager
def _replaced(kind: type[Any], name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    plain = getattr(kind, name)
    setattr(kind, name, around(plain))
    try:
        yield
    finally:
        setattr(kind, name, plain)


class _Injector:
    """Counts steps and puts the value in where the plan says."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.dice = random.Random(plan.seed)
        self.seen = Seen()
        self.step = 0
        self.training = False
        self.first_pass = False
        self.stepper: Stepper | None = None
        self.hooks: list[Any] = []
        self.objective: Objective | None = None
        self.spoilt = False
        self.called: set[str] = set()
        self.chosen = ""

    # ------------------------------------------------------------------------------------------------ around the run

    def loop(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(loop: Loop, state: Any) -> Any:
            self.step = state.step
            self._hook(loop.stepper)
            try:
                return plain(loop, state)
            finally:
                self.seen.before.setdefault(self.step + 1, self._digest())
                self.unhook()

        return run

    def next_step(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def following(source: DataSource) -> Any:
            self.step += 1
            self.seen.before[self.step] = self._digest()
            if self.plan.kind in ("weight", "base weight", "optimizer") and self.step >= self.plan.first:
                self._spoil()
            return plain(source)

        return following

    def forward_backward(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def passed(stepper: Stepper, trees: Any) -> Any:
            self.training, self.first_pass = True, True
            report = plain(stepper, trees)
            once = self._due() and not self.plan.again
            # Still training: a diagnosis repeats the step before the next one begins.
            self.first_pass = False
            if once and self.plan.kind == "gradient":
                gradients = [master.grad for master in stepper.masters.values() if master.grad is not None]
                self._put(self.dice.choice(gradients))
                self._hit("a gradient, after the pass")
            if once and self.plan.kind == "loss":
                self._hit("the sum of losses, after the pass")
                return replace(report, loss_sum=self.plan.value)
            return report

        return passed

    def evaluate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def evaluated(stepper: Stepper, trees: Any) -> Any:
            self.training = False
            report = plain(stepper, trees)
            if self.plan.kind == "evaluation" and self.step >= self.plan.first and not self.seen.hit:
                self._hit("an evaluation")
                return replace(report, loss_sum=self.plan.value)
            return report

        return evaluated

    def unhook(self) -> None:
        """Leave nothing behind."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        if self.objective is not None and self.stepper is not None:
            self.stepper.objective = self.objective

    # ------------------------------------------------------------------------------------------------ into the model

    def _hook(self, stepper: Stepper) -> None:
        self.stepper = stepper
        kind = self.plan.kind
        if kind == "activation":
            for name, module in stepper.model.module.named_modules():
                if _is_leaf(name, module):
                    self.hooks.append(module.register_forward_hook(self._output(name)))
        elif kind == "gradient" and self.plan.again:
            name = self.dice.choice(sorted(stepper.parameters))
            self.hooks.append(stepper.parameters[name].register_hook(self._gradient(name)))
        elif kind == "loss" and self.plan.again:
            self.objective = stepper.objective
            stepper.objective = _Spoilt.around(stepper.objective, self._loss)

    def _output(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def change(_module: nn.Module, _given: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            if not self._due():
                # The evaluation before the first step shows which modules are called at all.
                self.called.add(name)
                return None
            self.chosen = self.chosen or self.dice.choice(sorted(self.called))
            if name != self.chosen:
                return None
            self._hit(f"the output of {name}")
            changed = output.clone()
            changed[..., 0] = self.plan.value
            return changed

        return change

    def _gradient(self, name: str) -> Callable[[Tensor], Tensor | None]:
        def change(gradient: Tensor) -> Tensor | None:
            if not self._due():
                return None
            self._hit(f"the gradient of {name}")
            changed = gradient.clone()
            self._put(changed)
            return changed

        return change

    def _loss(self, report: Any) -> Any:
        if not self._due():
            return report
        self._hit("the loss")
        return replace(report, sum=report.sum + self.plan.value)

    def _spoil(self) -> None:
        """Put the value into something that stays: once."""
        stepper = self.stepper
        if stepper is None or self.spoilt:
            return
        if self.plan.kind == "optimizer":
            kept = [
                (f"{name} {key}", value) for name, master in stepper.masters.items()
                for key, value in stepper.optimizer.state.get(master, {}).items()
                if isinstance(value, Tensor) and value.numel() > 1
            ]  # fmt: skip
            if not kept:
                # Before the first step an optimizer keeps nothing.
                return
            name, tensor = self.dice.choice(kept)
        elif self.plan.kind == "weight":
            name = self.dice.choice(sorted(stepper.masters))
            tensor = stepper.masters[name]
        else:
            trained = {id(parameter) for parameter in stepper.parameters.values()}
            base = [(n, p) for n, p in stepper.model.module.named_parameters() if id(p) not in trained]
            # Where all weights are trained, a base weight is a trained one.
            name, tensor = self.dice.choice(base or sorted(stepper.parameters.items()))
        self.spoilt = True
        with torch.no_grad():
            self._put(tensor.data)
        self._hit(name)

    def _put(self, tensor: Tensor) -> None:
        flat = tensor.view(-1)
        flat[self.dice.randrange(len(flat))] = self.plan.value

    def _hit(self, place: str) -> None:
        self.seen.hit.add(self.step)
        self.seen.place = place

    def _due(self) -> bool:
        return self.training and self.plan.is_at(self.step) and (self.first_pass or self.plan.again)

    def _digest(self) -> str:
        if self.stepper is None:
            return ""
        total = hashlib.sha256()
        for name, master in self.stepper.masters.items():
            total.update(_bytes(name, master))
            for key, value in sorted(self.stepper.optimizer.state.get(master, {}).items()):
                total.update(_bytes(key, torch.as_tensor(value)))
        for name, parameter in self.stepper.parameters.items():
            total.update(_bytes(name, parameter))
        return total.hexdigest()


class _Spoilt:
    """An objective around another."""

    def __init__(self, inner: Objective, change: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._change = change

    @classmethod
    def around(cls, inner: Objective, change: Callable[[Any], Any]) -> Any:
        return cls(inner, change)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def loss(self, outputs: Any, forest: Any) -> Any:
        return self._change(self._inner.loss(outputs, forest))


def _is_leaf(name: str, module: nn.Module) -> bool:
    """A module without modules of its own; the head is not called as one, and angles are no activations."""
    inner = not any(True for _ in module.children())
    return inner and "head" not in name and "rotary" not in name and "dropout" not in name


def _bytes(name: str, tensor: Tensor) -> bytes:
    return name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def _applied_anyway() -> Iterator[None]:
    """Broken: whatever the gradient is, it is applied."""

    def around(plain: Callable[..., StepReport]) -> Callable[..., StepReport]:
        def step(stepper: Stepper, *, factor: float = 1.0) -> StepReport:
            for group in stepper.optimizer.param_groups:
                group["lr"] = stepper.method.peak_learning_rate * factor
            with torch.no_grad():
                stepper.optimizer.step()
            stepper.zero_grad()
            return StepReport(1.0, True)

        return step

    with _replaced(Stepper, "optim_step", around):
        yield
