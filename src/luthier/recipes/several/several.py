"""Several adapters, one base: each trained on its own rows, all of them in one pass over the base for each step.

Read top to bottom: lay out a bench for each adapter on one model, give each a run of its own below the run, let their
loops go side by side, each step of all by one pass, and end each with a result that a fresh process has proved. What
lies in the folder of an adapter is a run like any other: its recipe could be trained alone, and to the rounding of
float32 would come out the same.
A killed run goes on from the newest step of which every adapter has a checkpoint, so that micro-batches are cut again
as they were, and bits are the same.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from luthier.core.errors import LuthierError, StoppedError
from luthier.core.events import Event, Recorder, Several, plain
from luthier.core.paths import run_folder
from luthier.data.forest import Tree
from luthier.kernels import pool
from luthier.recipes.bench import Bench, lay_out
from luthier.recipes.ending import SUMMARY, conclude, save
from luthier.recipes.finetune import Work, set_up, told
from luthier.recipes.opening.results import started_in
from luthier.recipes.schemas.files import begin_run
from luthier.recipes.schemas.several import SeveralRecipe, several_of
from luthier.recipes.several.told import Relay, plan_of, step_of, summary_of
from luthier.recipes.sizing.memory import certain_to_fit, require_disk
from luthier.store.environment import receipt
from luthier.store.files import write_json
from luthier.store.runs import RunDirectory, is_begun
from luthier.train.loop import drive
from luthier.train.pass_report import PassReport
from luthier.train.rehearsal import rehearse_together
from luthier.train.result import release
from luthier.train.signals import StopRequest, stop_on_signals

ENDED: Final = "ended.json"
"""Which adapters have made their last step, and after how many."""


@dataclass(frozen=True)
class SeveralResult:
    """A run of several adapters that has ended, and what it says of itself."""

    path: Path
    summary: dict[str, Any]

    def line(self) -> dict[str, Any]:
        """The one line that `luthier train --json` ends with."""
        keys = ("run", "status", "steps", "tokens", "tokens_per_second", "peak_memory_bytes", "adapters")
        return {key: self.summary[key] for key in keys}


def start_several(recipe: SeveralRecipe, *, recorder: Recorder, overwrite: bool = False) -> SeveralResult:
    """Run a recipe in a new run directory; one that this very recipe began there and did not finish is gone on with."""
    with stop_on_signals() as stop:
        if not overwrite and recipe.run and (begun := _unfinished(recipe, Path(recipe.run))) is not None:
            return _resume(begun, stop, recorder)
        recipe = recipe.dated()
        name = f"{recipe.first.model.rstrip('/').rpartition('/')[2]}-several"
        folder = Path(recipe.run) if recipe.run else run_folder(name, today=datetime.date.today())
        RunDirectory.require_free(folder, overwrite=overwrite)
        benches = lay_out_several(recipe)
        for bench in benches.values():
            require_disk(bench.plan["disk"], folder)
        with RunDirectory.begin(folder, overwrite=overwrite) as run:
            more = {"torch_threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
            run.write_environment(receipt(sys.argv, more=more))
            run.write_recipe({**recipe.as_written(), "run": str(folder)})
            return told(run, stop, lambda: _train(recipe, benches, run, stop, recorder, resuming=False))


def resume_several(run: RunDirectory, *, recorder: Recorder, accept_drift: bool = False) -> SeveralResult:
    """Go on with a run of several adapters, exactly as if it had never stopped."""
    with stop_on_signals() as stop:
        return _resume(run, stop, recorder, accept_drift=accept_drift)


def lay_out_several(
    recipe: SeveralRecipe, folder: Path | None = None, *, without: Sequence[str] = ()
) -> dict[str, Bench]:
    """A bench for each adapter but those `without`, all on one model."""
    benches: dict[str, Bench] = {}
    for name, own in recipe.adapters.items():
        if name not in without:
            benches[name] = lay_out(own, folder, name=name, beside=list(benches.values()))
    return benches


def _unfinished(recipe: SeveralRecipe, place: Path) -> RunDirectory | None:
    if is_begun(place) and (run := RunDirectory.open(place)).status().state != "finished":
        written = {key: value for key, value in run.read_recipe().items() if key != "run"}
        days = {own.get("data", {}).get("date") for own in written.get("adapters", {}).values()}
        day = days.pop() if len(days) == 1 else None
        return run if written == recipe.dated(day).as_written() else None
    return None


def _resume(
    run: RunDirectory, stop: StopRequest, recorder: Recorder, *, accept_drift: bool = False
) -> SeveralResult:
    with run.lock():
        if run.status().state == "finished":
            return SeveralResult(run.folder, run.read_json(SUMMARY))
        recipe, place = several_of(run.read_recipe()), started_in(run)
        done = [name for name in recipe.adapters if _is_finished(run.folder / name)]

        def train() -> SeveralResult:
            benches = lay_out_several(recipe, place, without=done)
            return _train(recipe, benches, run, stop, recorder, resuming=True, accept_drift=accept_drift)

        return told(run, stop, train)


def _train(
    recipe: SeveralRecipe,
    benches: Mapping[str, Bench],
    run: RunDirectory,
    stop: StopRequest,
    recorder: Recorder,
    *,
    resuming: bool,
    accept_drift: bool = False,
) -> SeveralResult:
    everyone = Several([run, recorder])
    turn = Turn(run, stop, recipe)
    with ExitStack() as held:
        runs = {name: held.enter_context(_own_run(recipe, run, name)) for name in benches}
        ended = _agree(run, runs) if resuming else {}
        works: dict[str, Work] = {}
        # Those that are over first: the random numbers are those of the adapters that go on.
        for name in sorted(benches, key=lambda each: each not in ended):
            works[name] = set_up(
                benches[name], runs[name], turn, Relay(everyone, name), resuming=resuming, accept_drift=accept_drift,
                wants_save=turn.saves, more_facts={"together": sorted(recipe.adapters)},
            )  # fmt: skip
            runs[name].write_status("running")
        plan = plan_of(recipe, works)
        run.write_plan(plan)
        everyone.record(Event("start", {**plan, "run": str(run.folder)}))
        with _all_told(runs):
            statuses = _steps(works, ended, run, stop, turn, everyone)
            summaries = _end(works, statuses, run)
    for name in recipe.adapters:
        summaries.setdefault(name, RunDirectory.open(run.folder / name).read_json(SUMMARY))
    summary = summary_of(run.folder, recipe, summaries)
    write_json(run.folder / SUMMARY, plain(summary))
    everyone.record(Event("finish", summary, step=summary["steps"]))
    run.write_status("finished", values=summary)
    return SeveralResult(run.folder, summary)


def _steps(
    works: Mapping[str, Work],
    ended: dict[str, Any],
    run: RunDirectory,
    stop: StopRequest,
    turn: Turn,
    recorder: Recorder,
) -> dict[str, str]:
    """All steps that are left; how each adapter has ended."""
    going = {name: work for name, work in works.items() if name not in ended}
    statuses = {name: str(values["status"]) for name, values in ended.items() if name in works}
    if not going:
        return statuses
    batcher = next(iter(works.values())).bench.stepper.batcher
    _rehearse(going, recorder)

    def forward_backward(trees: Mapping[str, Sequence[Tree]]) -> Mapping[str, PassReport]:
        passes, event = step_of(batcher, trees, 1 + max(going[name].state.step for name in trees))
        recorder.record(event)
        return passes

    def over(name: str, status: str) -> None:
        if status != "stopped":
            ended[name] = {"step": going[name].state.step, "status": status}
            write_json(run.folder / ENDED, ended)

    with stop.patient():
        statuses |= drive(
            {name: work.loop.steps(work.state) for name, work in going.items()},
            forward_backward,
            before=lambda: turn.begin({name: work for name, work in going.items() if name not in ended}),
            ended=over,
        )
    if any(work.bench.pooled for work in works.values()):
        # The processes that prove the results need memory too.
        pool.release()
    if "stopped" in statuses.values():
        step = max(work.state.step for work in works.values())
        raise StoppedError(
            f"stopped by {stop.reason} after step {step}; everything is saved", do=f"luthier resume {run.folder}"
        )
    return statuses


def _rehearse(going: Mapping[str, Work], recorder: Recorder) -> None:
    """The largest micro-batches of all first, as a single run has it."""
    benches = [work.bench for work in going.values()]
    if all(certain_to_fit(bench.plan["memory"], bench.model.device, among=len(benches)) for bench in benches):
        return
    rehearsal = rehearse_together({
        name: (work.bench.stepper, work.bench.planned, work.state.total_steps) for name, work in going.items()
    })  # fmt: skip
    for split in rehearsal.splits:
        recorder.record(Event("micro_batch_split", asdict(split)))
        for work in going.values():
            work.state.micro_tokens = split.to_tokens
    values = {"tokens": rehearsal.tokens, "rows": rehearsal.rows, "seconds": rehearsal.seconds}
    recorder.record(Event("rehearsal", values))


def _end(works: Mapping[str, Work], statuses: Mapping[str, str], run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Save what every adapter has become, then prove each. An adapter that cannot be a result keeps none from it."""
    failures: dict[str, LuthierError] = {}
    endings = {name: work.ending(statuses[name]) for name, work in works.items()}
    summaries: dict[str, dict[str, Any]] = {}
    for name, ending in endings.items():
        try:
            save(ending)
        except LuthierError as error:
            failures[name] = error
    for ending in endings.values():
        release(ending.bench.model, ending.bench.stepper)
    for name, ending in endings.items():
        if name not in failures:
            try:
                summaries[name] = conclude(ending)
            except StoppedError:
                raise
            except LuthierError as error:
                failures[name] = error
    for name, failure in failures.items():
        works[name].run.write_status("failed", reason=str(failure))
    for name, failure in failures.items():
        raise type(failure)(
            f"{name}: {failure.received}", allowed=failure.allowed, where=failure.where,
            do=failure.do or f"luthier resume {run.folder} ends it again; the others are in their folders there",
        ) from failure  # fmt: skip
    return summaries


@final
class Turn:
    """One step of all adapters: whether to stop and whether to save is asked once, so that all do the same."""

    def __init__(self, run: RunDirectory, stop: StopRequest, recipe: SeveralRecipe) -> None:
        self._run, self._stop, self._recipe = run, stop, recipe
        self._stops = self._saves = False

    def begin(self, going: Mapping[str, Work]) -> None:
        """Ask, for the step that comes."""
        self._stops = bool(self._stop)
        asked = self._run.wants_save() or self._stop.take_save()
        # Who is better than ever at an evaluation is saved, and then so is everybody.
        evaluated = [self._recipe.adapters[name].evaluation.every for name in going]
        steps = [work.state.step + 1 for work in going.values()]
        due = any(every and step % every == 0 for every, step in zip(evaluated, steps, strict=True))
        self._saves = asked or due or self._stops

    def saves(self) -> bool:
        """Whether the state is saved after this step."""
        return self._saves

    def __bool__(self) -> bool:
        return self._stops


@contextmanager
def _own_run(recipe: SeveralRecipe, run: RunDirectory, name: str) -> Iterator[RunDirectory]:
    """The run of one adapter, in the folder of its name: begun, or gone on with."""
    folder = run.folder / name
    if is_begun(folder):
        own = RunDirectory.open(folder)
        with own.lock():
            yield own
        return
    with begin_run(recipe.adapters[name].model_copy(update={"run": str(folder)})) as own:
        yield own


@contextmanager
def _all_told(runs: Mapping[str, RunDirectory]) -> Iterator[None]:
    """Whatever ends the block before its time is told by the run of every adapter that is at work."""
    try:
        yield
    except BaseException as error:
        for own in runs.values():
            if own.status().state == "running":
                if isinstance(error, StoppedError):
                    own.write_status("stopped", reason=error.received)
                else:
                    own.write_status("failed", reason=str(error) or type(error).__name__)
        raise


def _agree(run: RunDirectory, runs: Mapping[str, RunDirectory]) -> dict[str, Any]:
    """Take all adapters back to the newest step that each of them has, or has ended before; who had ended by then.

    Nothing is lost by it but steps that are made again.
    """
    ended = run.read_json(ENDED) if (run.folder / ENDED).is_file() else {}
    steps: dict[str, set[int]] = {}
    for name, own in runs.items():
        own.checkpoints.recover()
        steps[name] = set(own.checkpoints.valid_steps())

    def has(name: str, step: int) -> bool:
        last = int(ended[name]["step"]) if name in ended else None
        return step in steps[name] or (last is not None and last <= step and last in steps[name])

    known = sorted(set().union(*steps.values()), reverse=True)
    common = next((step for step in known if all(has(name, step) for name in runs)), 0)
    for own in runs.values():
        own.checkpoints.cut(common)
    kept = {name: values for name, values in ended.items() if int(values["step"]) <= common}
    write_json(run.folder / ENDED, kept)
    return kept


def _is_finished(folder: Path) -> bool:
    return is_begun(folder) and RunDirectory.open(folder).status().state == "finished"
