"""Damaged files: whatever happens to a file of a run, it is found before it is used, or the result is the same.

Each trial damages one file (or a whole checkpoint) of a copy of a run and does what a user would do next: resume,
generate, evaluate. It passes when that is refused with the file named, when an older checkpoint is taken and said to
be, or when every number that comes out is the same as without the damage. Most trials are at the level of the stores,
which are fast; the others go through the command line, in this process.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from luthier.core.errors import CorruptError, LuthierError, StorageError
from luthier.store import manifest
from luthier.store.checkpoints import CheckpointStore
from tests.cli.commands import Said, chat, step_events, write_rows
from tests.faults.campaign import Campaign, Tally
from tests.faults.damage import SINGLE, WHOLE
from tests.faults.in_process import cache_in, luthier
from tests.faults.watch import HangError, alarmed
from tests.tiny import tiny_folder

FAULT = "flipped bits, cut, swapped, zeroed, linked and missing files"
PROMISE = "found before use with the file named, an older checkpoint taken and told, or the same result to the bit"
CONTROL = "a manifest that compares sizes, not digests"
PASSES = ("found", "fell back", "harmless")
STEPS = (10, 20, 30)
RUN_STEPS, STOPPED_AT = 8, 6
PROMPT = ("--prompt", "what colour has 3", "--max-new-tokens", 6, "--json")
_REFUSALS = (2, 65, 69, 71, 74, 75, 76, 77, 78)

Verdict = tuple[str, str]


@dataclass(frozen=True)
class Scene:
    """What is damaged and what is done next. `share` is how often, beside the others of its level."""

    name: str
    share: int
    trial: Callable[[Path, random.Random], Verdict]


def run(count: int, *, seed: int, folder: Path, commands: int | None = None) -> Campaign:
    """`count` damages, most of them to stores; `commands` of them, a quarter, are met by a command of the user."""
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL, passes=PASSES)
    # The resolved path: what a run remembers of its files is absolute.
    own = folder.resolve() / "flips"
    met = count // 4 if commands is None else commands
    stores, whole = scenes(own)
    _trials(stores, count - met, seed, own, tally)
    _trials(whole, met, seed, own, tally)
    tally.notes.append(f"{met} through resume, generate and eval")
    return tally.result()


def control(*, seed: int, folder: Path) -> Campaign:
    """The stores alone, where damage that keeps the length of a file meets no digest."""
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL, passes=PASSES)
    own = folder.resolve() / "flips-control"
    with _sizes_only():
        _trials([Scene("checkpoints", 1, _checkpoints(own))], 150, seed, own, tally)
    return tally.result()


def scenes(folder: Path) -> tuple[list[Scene], list[Scene]]:
    """Every kind of file that a later command may use: looked at by its store, and by whole commands."""
    home = _Home(folder)
    stores = [Scene("checkpoints", 9, _checkpoints(folder)), Scene("tokens", 1, home.tokens)]
    return stores, [
        Scene("resume: a checkpoint", 7, home.resume_with_damaged("checkpoints/step-*/*")),
        Scene("generate: adapter", 9, home.generate_with_damaged("adapter")),
        Scene("resume: recipe.yaml", 3, home.resume_with_damaged("recipe.yaml")),
        Scene("resume: tokens", 3, home.resume_with_damaged_tokens),
        Scene("generate: model", 8, home.generate_with_damaged("model")),
        Scene("resume: run.json", 2, home.resume_with_damaged("run.json")),
        Scene("resume: the log", 3, home.resume_with_damaged("events.jsonl")),
        Scene("resume: links", 2, home.resume_with_damaged_links),
        Scene("eval: adapter", 3, home.eval_with_damaged("adapter")),
        Scene("eval --verify: recipe.yaml", 2, home.eval_with_damaged("recipe.yaml", "--verify")),
    ]


def _trials(made: list[Scene], count: int, seed: int, folder: Path, tally: Tally) -> None:
    # Each in turn first, so that a small count has some of everything.
    order = random.Random(seed).choices(made, [scene.share for scene in made], k=count)
    for trial, scene in enumerate([*made, *order][:count]):
        place = folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        dice = random.Random(f"{seed} {trial}")
        try:
            with alarmed(120):
                verdict, detail = scene.trial(place, dice)
        except HangError as hang:
            verdict, detail = "hang", str(hang)
        except Exception as failure:  # noqa: BLE001 (whatever else leaves is what is looked for)
            verdict, detail = "traceback", f"{type(failure).__name__}: {failure}"
        tally.count(verdict, f"trial {trial} of seed {seed} ({scene.name}): {detail}")
    shutil.rmtree(folder / "trial", ignore_errors=True)


def _damaged(path: Path, dice: random.Random) -> str:
    """Damage a file in one of the ways that can be done to it; what was done."""
    while not (done := dice.choice(SINGLE)(path, dice)):
        pass
    return f"{path.parent.name}/{path.name}: {done}"


# ------------------------------------------------------------------------------------------------ the store of states


def _checkpoints(folder: Path) -> Callable[[Path, random.Random], Verdict]:
    """Three checkpoints, one damage, and the first thing that a resumed run does."""
    good = folder / "good" / "checkpoints"
    if not good.exists():
        good.parent.mkdir(parents=True, exist_ok=True)
        store = CheckpointStore(good, run="r")
        for step in STEPS:
            store.save(step, _state(step), {"facts": {"torch": "2"}}, best=step == STEPS[0])
    contents = {step: _content(good / f"step-{step:06d}") for step in STEPS}

    def trial(place: Path, dice: random.Random) -> Verdict:
        copy = place / "checkpoints"
        shutil.copytree(good, copy, symlinks=True)
        # Mostly the newest: damage to an older one is met by nobody as long as that one is whole.
        step = dice.choices(STEPS, weights=(1, 1, 10))[0]
        target = copy / f"step-{step:06d}"
        done = ""
        if dice.random() < 0.15:
            while not (done := dice.choice(WHOLE)(target, dice)):
                pass
        else:
            done = _damaged(target / dice.choice(sorted(path.name for path in target.iterdir())), dice)
        return _recovered(copy, contents, f"{target.name}: {done}")

    return trial


def _recovered(copy: Path, contents: dict[int, dict[str, bytes]], done: str) -> Verdict:
    store = CheckpointStore(copy, run="r")
    try:
        place = store.recover()
    except (CorruptError, StorageError) as error:
        named = any(f"step-{step:06d}" in str(error) for step in contents)
        return ("found", "") if named else ("unnamed", f"{done}; {error}")
    told = "; ".join(store.notices)
    if place is None:
        return "lost", f"{done}; no checkpoint is left, and no error"
    step = int(place.name.removeprefix("step-"))
    if _content(place) != contents[step]:
        return "missed", f"{done}; {place.name} was taken"
    if step == max(contents):
        return "harmless", ""
    newer = [f"step-{number:06d}" for number in contents if number > step]
    # A folder that is gone as a whole leaves nothing to be found.
    silent = [name for name in newer if name not in told and "gone as a whole" not in done]
    return ("silent", f"{done}; {silent} passed over without a word") if silent else ("fell back", "")


def _state(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        dice = random.Random(step)
        (folder / "state.safetensors").write_bytes(dice.randbytes(3000))
        (folder / "state.json").write_text(json.dumps({"loop": {"step": step}, "random": dice.random()}))
        (folder / "empty").write_bytes(b"")

    return write


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextlib.contextmanager
def _sizes_only() -> Iterator[None]:
    """Broken: the length of a file is all that is looked at."""
    measure, compare = manifest._measure, manifest._compare
    manifest._measure = lambda path: manifest.Entry(path.stat().st_size, "")
    manifest._compare = lambda path, expected, whole: compare(path, expected, whole=False)
    try:
        yield
    finally:
        manifest._measure, manifest._compare = measure, compare


# ------------------------------------------------------------------------------------------------------- whole runs


class _Home:
    """A model, a data file, a stopped run, and finished ones, made when first asked for. Trials work on copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "home"
        self.tokenizer: Any = None

    # --------------------------------------------------------------------------------------------------------- made

    @cache  # noqa: B019 (one home lives as long as its campaign)
    def recipe(self, adapter: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        asked = [chat(f"what colour has {n}", ["red", "blue"][n % 2]) for n in range(24)]
        rows = write_rows(self.folder / "rows.jsonl", asked)
        values = {
            "model": str(tiny_folder("llama", self.folder)), "data": {"train": str(rows)}, "adapter": adapter,
            "optimizer": {"method": "adamw", "learning_rate": 0.01}, "batch": {"rows": 4},
            "budget": {"steps": RUN_STEPS}, "checkpoint": {"every": 2}, "precision": "float32",
            "evaluation": {"fraction": 0.25, "every": 4, "prompts": 0},
        }  # fmt: skip
        path = self.folder / f"{adapter}.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    @cache  # noqa: B019
    def finished(self, adapter: str) -> Path:
        """A run that ended well."""
        folder = self.folder / "finished" / adapter
        with cache_in(self.folder / "cache"):
            luthier("train", self.recipe(adapter), "--run", folder, "--json", "--quiet").must(0)
        return folder

    @cache  # noqa: B019
    def stopped(self) -> Path:
        """A run that was stopped by a signal, with three checkpoints."""
        from luthier.train.stepper import Stepper

        folder = self.folder / "stopped" / "lora"
        plain, done = Stepper.optim_step, [0]

        def terminated(stepper: Any, *, factor: float = 1.0) -> Any:
            done[0] += 1
            if done[0] == STOPPED_AT:
                signal.raise_signal(signal.SIGTERM)
            return plain(stepper, factor=factor)

        Stepper.optim_step = terminated  # type: ignore[method-assign]
        try:
            with cache_in(self.folder / "cache"):
                luthier("train", self.recipe("lora"), "--run", folder, "--json", "--quiet").must(75)
        finally:
            Stepper.optim_step = plain  # type: ignore[method-assign]
        return folder

    @cache  # noqa: B019
    def said(self, command: str, adapter: str, options: tuple[str, ...]) -> Any:
        """What generate or eval says of the undamaged run."""
        with cache_in(self.folder / "cache"):
            return self._comparable(self._ask(command, self.finished(adapter), options).must(0))

    # ------------------------------------------------------------------------------------------------------- trials

    def resume_with_damaged(self, pattern: str) -> Callable[[Path, random.Random], Verdict]:
        """Damage a file of the stopped run and resume it."""

        def trial(place: Path, dice: random.Random) -> Verdict:
            run = Path(shutil.copytree(self.stopped(), place / "lora", symlinks=True))
            files = [path for path in sorted(run.glob(pattern)) if path.is_file() and not path.parent.is_symlink()]
            path = dice.choice(files)
            return self._resumed(run, path, _damaged(path, dice))

        return trial

    def resume_with_damaged_links(self, place: Path, dice: random.Random) -> Verdict:
        """Let `best` or `last` point somewhere else."""
        run = Path(shutil.copytree(self.stopped(), place / "lora", symlinks=True))
        path = run / "checkpoints" / dice.choice(("best", "last"))
        steps = sorted(each.name for each in path.parent.glob("step-*"))
        target = dice.choice([*steps, "nowhere", "/etc", str(path.parent / steps[0]), ".."])
        path.unlink()
        path.symlink_to(target)
        return self._resumed(run, path, f"{path.name} points to {target}")

    def resume_with_damaged_tokens(self, place: Path, dice: random.Random) -> Verdict:
        """Damage a file of the token cache and resume a run that uses it."""
        run = Path(shutil.copytree(self.stopped(), place / "lora", symlinks=True))
        own = Path(shutil.copytree(self.folder / "cache", place / "cache"))
        path = dice.choice([each for each in sorted(own.rglob("*")) if each.is_file()])
        return self._resumed(run, path, _damaged(path, dice), cache=own)

    def tokens(self, place: Path, dice: random.Random) -> Verdict:
        """Damage a file of the token cache and prepare the same data again."""
        self.stopped()
        own = Path(shutil.copytree(self.folder / "cache", place / "cache"))
        path = dice.choice([each for each in sorted(own.rglob("*")) if each.is_file()])
        done = _damaged(path, dice)
        with cache_in(own):
            try:
                found = self._prepared()
            except LuthierError as error:
                named = path.name in str(error) or "token cache" in str(error)
                return ("found", "") if named else ("unnamed", f"{done}; {error}")
        return ("harmless", "") if found == self._expected_tokens() else ("missed", done)

    def generate_with_damaged(self, result: str) -> Callable[[Path, random.Random], Verdict]:
        """Damage a file of the result and ask the run something."""
        adapter = "lora" if result == "adapter" else "full"

        def trial(place: Path, dice: random.Random) -> Verdict:
            return self._used("generate", adapter, result, place, dice)

        return trial

    def eval_with_damaged(self, name: str, *options: str) -> Callable[[Path, random.Random], Verdict]:
        """Damage a file that evaluating the run depends on."""

        def trial(place: Path, dice: random.Random) -> Verdict:
            return self._used("eval", "lora", name, place, dice, options)

        return trial

    # ------------------------------------------------------------------------------------------------------ verdicts

    def _used(
        self,
        command: str,
        adapter: str,
        result: str,
        place: Path,
        dice: random.Random,
        options: tuple[str, ...] = (),
    ) -> Verdict:
        expected = self.said(command, adapter, options)
        run = Path(shutil.copytree(self.finished(adapter), place / adapter, symlinks=True))
        files = [run / result] if (run / result).is_file() else sorted((run / result).rglob("*"))
        path = dice.choice([each for each in files if each.is_file()])
        done = _damaged(path, dice)
        with cache_in(self.folder / "cache"):
            said = self._ask(command, run, options)
        if said.code:
            return self._refused(said, path, done)
        return ("harmless", "") if self._comparable(said) == expected else ("missed", f"{command} after {done}")

    def _resumed(self, run: Path, path: Path, done: str, *, cache: Path | None = None) -> Verdict:
        whole = self.finished("lora")
        with cache_in(cache or self.folder / "cache"):
            said = luthier("resume", run, "--json")
        if said.code:
            return self._refused(said, path, done)
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json"):
            if (run / name).read_bytes() != (whole / name).read_bytes():
                return "missed", f"resume after {done}: another {name}"
        if path.name != "events.jsonl" and step_events(run) != step_events(whole):
            return "missed", f"resume after {done}: another log"
        if "checkpoints/step-" not in str(path) or path.parent.name != f"step-{STOPPED_AT:06d}":
            return "harmless", ""
        return ("fell back", "") if path.parent.name in said.err else ("silent", f"resume after {done}: not a word")

    def _refused(self, said: Said, path: Path, done: str) -> Verdict:
        """An error must be one of ours, and lead to the file: by its name, its folder's, or what it is."""
        if said.code not in _REFUSALS or "Traceback" in said.err:
            return "traceback", f"{done}; exit {said.code}: {said.err[-300:]}"
        # An altered recipe is refused by what it says now: a model that is not there, a key that is not known, drift.
        names = (path.name, path.parent.name)
        if path.name == "recipe.yaml" or any(name in said.err for name in names):
            return "found", ""
        return "unnamed", f"{done}; {said.err[-300:]}"

    def _ask(self, command: str, run: Path, options: tuple[str, ...]) -> Said:
        return luthier(command, run, *(PROMPT if command == "generate" else ("--json",)), *options)

    def _comparable(self, said: Said) -> Any:
        """What was said, without places and times."""
        return {key: value for key, value in said.json.items() if key not in ("run", "result", "proof", "seconds")}

    def _prepared(self) -> dict[str, bytes]:
        from luthier.data.prepare import prepare
        from luthier.data.tokenizer import Tokenizer
        from luthier.recipes.bench import reading_of
        from luthier.recipes.schemas.files import load_recipe

        recipe = load_recipe(self.recipe("lora")).recipe
        self.tokenizer = self.tokenizer or Tokenizer.load(recipe.model)
        data = prepare(recipe.data.train, self.tokenizer, reading_of(recipe), fraction=0.25, context_tokens=256)
        arrays = ("tokens", "weights", "roles", "spans", "rows", "offsets")
        found = {name: getattr(data.store, name).tobytes() for name in arrays}
        split = data.train.indices.tolist(), data.held_out.indices.tolist()
        return {**found, "about": repr((data.store.counts, sorted(data.store.stop_ids), split)).encode()}

    @cache  # noqa: B019
    def _expected_tokens(self) -> dict[str, bytes]:
        with cache_in(self.folder / "untouched"):
            return self._prepared()
