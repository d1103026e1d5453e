"""Small runs of every trainable method, and whether a run that was broken off equals one that was not."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, final

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.model.tasks import CAUSAL
from luthier.objectives import Objective
from tests.cli.commands import chat, step_events, write_rows
from tests.faults.zygote import Child, zygote
from tests.tiny import tiny_folder

STEPS = 12
LONGEST = 120.0
"""Seconds after which a run of a second or two counts as hanging; generous, for a machine that is busy."""

FAMILIES = ("adapters", "objectives", "optimizers", "schedules")
MOST_COMBINATIONS = 48
LUTHIER = "tests.faults.zygote:luthier"
NO_FRESH_PROOF = "tests.faults.broken:proof_in_this_process"
"""Proves a result in the process itself: a proof in a fresh one takes longer than all the rest of a small run."""

_WORDS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
_TIMES = ("train_seconds", "events_bytes")
_LEFTOVER = re.compile(r"^\.(?:tmp|del|link|bad)-|^\..*\.tmp$")


@dataclass(frozen=True)
class Combination:
    """One method of each family."""

    adapter: str
    objective: str
    optimizer: str
    schedule: str

    def __str__(self) -> str:
        return "+".join((self.adapter, self.objective, self.optimizer, self.schedule))


def _of_decoders(family: str) -> list[str]:
    """The methods of a family, of objectives those that train the decoder and the rows of a campaign."""
    names = list(catalog.names(family))
    if family != "objectives":
        return names
    methods = {name: choose(family, Objective, name) for name in names}
    return [name for name, method in methods.items() if method.task(("one", "other")) == CAUSAL and _of_talks(method)]


def _of_talks(method: Objective) -> bool:
    return method.meanings is None or "conversation" in method.meanings


@dataclass(frozen=True)
class Unbroken:
    """A combination with its recipe and the run that nothing disturbed."""

    combination: Combination
    recipe: Path
    folder: Path
    interval: int
    seconds: float


@dataclass(frozen=True)
class Workshop:
    """The files that every run of a campaign uses, below one folder."""

    folder: Path
    model: Path
    rows: Path


def workshop(folder: Path) -> Workshop:
    """A tiny llama and a small data file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [chat(f"what colour has {n}", _WORDS[n % len(_WORDS)]) for n in range(32)]
    return Workshop(folder, tiny_folder("llama", folder), write_rows(folder / "rows.jsonl", rows))


def combinations(*, seed: int, most: int = MOST_COMBINATIONS) -> list[Combination]:
    """Every adapter with every objective, optimizer and schedule of the catalog, in a random order.

    When there are more than `most` combinations, so many that each method is in at least one of them.
    """
    dice = random.Random(seed)
    choices = [_of_decoders(family) for family in FAMILIES]
    every = [Combination(*names) for names in product(*choices)]
    dice.shuffle(every)
    if len(every) <= most:
        return every
    for names in choices:
        dice.shuffle(names)
    rounds = max(max(len(names) for names in choices), most)
    return [Combination(*(names[index % len(names)] for names in choices)) for index in range(rounds)]


def recipe_of(shop: Workshop, combination: Combination, *, interval: int, steps: int = STEPS) -> Path:
    """A recipe with evaluations, answers and checkpoints, and dropout where the method has it."""
    values = {
        "model": str(shop.model),
        "data": {"train": str(shop.rows)},
        "batch": {"rows": 4},
        "budget": {"steps": steps},
        "evaluation": {"fraction": 0.25, "every": 4, "prompts": 1, "max_new_tokens": 4},
        "checkpoint": {"every": interval},
        "precision": "float32",
        **{family[:-1]: _method(family, name) for family, name in zip(FAMILIES, _names(combination), strict=True)},
    }
    path = shop.folder / f"{combination}-{interval}-{steps}.yaml"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


@cache
def unbroken(shop: Workshop, combination: Combination, *, interval: int, steps: int = STEPS) -> Unbroken:
    """Train without disturbance, once. Raises RefusedCombinationError when the methods do not go together."""
    recipe = recipe_of(shop, combination, interval=interval, steps=steps)
    folder = shop.folder / "unbroken" / recipe.stem / "run"
    folder.parent.mkdir(parents=True, exist_ok=True)
    child = begin(recipe, folder, out=folder.parent / "out")
    code = child.reap(LONGEST)
    seconds = time.monotonic() - child.began
    said = (folder.parent / "out").read_text("utf-8", "replace")
    if code == 2:
        raise RefusedCombinationError(f"{combination}: {said.strip().splitlines()[-1]}")
    if code != 0:
        raise RuntimeError(f"{combination} does not train undisturbed (exit {code}): {said[-2000:]}")
    return Unbroken(combination, recipe, folder, interval, seconds)


class RefusedCombinationError(Exception):
    """The recipe says that these methods do not go together."""


def seconds_with_fresh_proof(unbroken: Unbroken) -> float:
    """How long the unbroken run takes when its result is proved in a fresh process, as it is for users."""
    folder = unbroken.folder.with_name("proved-apart")
    child = begin(unbroken.recipe, folder, out=folder.with_suffix(".out"), prepare=())
    code = child.reap(LONGEST)
    seconds = time.monotonic() - child.began
    if code != 0:
        raise RuntimeError(
            f"{unbroken.combination} with its proof apart: exit {code}; see {folder.with_suffix('.out')}"
        )
    shutil.rmtree(folder)
    return seconds


def begin(
    recipe: Path, folder: Path, *, out: Path, prepare: Sequence[str] = (NO_FRESH_PROOF,), gate: Path | None = None
) -> Child:
    """Start `luthier train RECIPE --run FOLDER`: the one command that begins a run and goes on with it."""
    return zygote().start(LUTHIER, "train", recipe, "--run", folder, out=out, prepare=prepare, gate=gate)


@final
class Bench:
    """Unbroken runs, made when first asked for, one combination after the other."""

    def __init__(self, folder: Path, seed: int, *, named: str = "") -> None:
        self.shop = workshop(folder)
        self.left = [each for each in combinations(seed=seed) if named in ("", each.adapter)]
        self.ready: list[Unbroken] = []
        self.refused: list[str] = []
        self.turn = 0

    @property
    def made(self) -> int:
        """How many combinations have been trained."""
        return len(self.ready)

    def next(self) -> Unbroken:
        """The next combination with its unbroken run; after the last one the first again."""
        while self.left:
            try:
                interval = 1 + len(self.ready) % 3
                self.ready.append(unbroken(self.shop, self.left.pop(), interval=interval))
            except RefusedCombinationError as refusal:
                self.refused.append(f"refused by the recipe: {refusal}")
                continue
            return self.ready[-1]
        self.turn += 1
        return self.ready[(self.turn - 1) % len(self.ready)]


def has_ended(code: int | None, said: str) -> bool:
    """Whether the same command says that there is nothing left to do: done now, or found finished and left alone."""
    return code == 0 or (code == 77 and "holds a run (finished); nothing was changed" in said)


def differences(folder: Path, like: Path) -> list[str]:
    """In what the finished run `folder` differs from the run `like`: result, last state, log, answers."""
    found = []
    for name in _result(like):
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif _comparable(path) != _comparable(like / name):
            found.append(f"{name} differs")
    steps, expected = step_events(folder), step_events(like)
    if [event["step"] for event in steps] != [event["step"] for event in expected]:
        found.append(f"the log has steps {[event['step'] for event in steps]}")
    elif steps != expected:
        found.append("the log has other numbers")
    found += [f"{name} is missing" for name in ("summary.json", "report.html") if not (folder / name).is_file()]
    if _evaluations(folder) != _evaluations(like):
        found.append("the evaluations differ")
    return found


def leftovers(folder: Path) -> list[str]:
    """What is being written or removed, or was set aside, below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if _LEFTOVER.match(path.name))


def events(folder: Path) -> list[dict[str, Any]]:
    """The log of a run as far as its lines are whole."""
    path = folder / "events.jsonl"
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def announced(folder: Path) -> int:
    """The newest step whose checkpoint the log announces; 0 when there is none."""
    return max((event["step"] for event in events(folder) if event["kind"] == "checkpoint"), default=0)


def last_step(folder: Path) -> int:
    """The newest step in the log; 0 when there is none."""
    return max((event["step"] for event in events(folder) if event["kind"] == "step"), default=0)


def _names(combination: Combination) -> tuple[str, str, str, str]:
    return (combination.adapter, combination.objective, combination.optimizer, combination.schedule)


def _method(family: str, name: str) -> dict[str, Any]:
    fields = catalog.load(family, name).model_fields
    chosen: dict[str, Any] = {"method": name}
    if "dropout" in fields:
        chosen["dropout"] = 0.1
    if "learning_rate" in fields:
        chosen["learning_rate"] = 0.01
    return chosen


def _result(like: Path) -> list[str]:
    """The files of a run that must not depend on what happened to it meanwhile."""
    places = [path for name in ("adapter", "model") for path in sorted((like / name).rglob("*")) if path.is_file()]
    last = (like / "checkpoints" / "last").resolve()
    places += [path for path in sorted(last.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    names = [str(path.relative_to(like.resolve() if last in path.parents else like)) for path in places]
    return [*names, "samples.jsonl", "worst_rows.json"]


def _comparable(path: Path) -> object:
    """The content of a file, without the times, lengths and identities in it that differ from run to run."""
    data = path.read_bytes()
    if path.name == "state.json":
        state = json.loads(data)
        for key in _TIMES:
            state["loop"].pop(key, None)
        return state
    if path.name == "manifest.json":
        manifest = json.loads(data)
        return sorted((name, str(entry)) for name, entry in manifest.get("files", {}).items())
    return data


def _evaluations(folder: Path) -> list[tuple[int, object]]:
    return [(event["step"], event["loss"]) for event in events(folder) if event["kind"] == "evaluation"]
