"""Fine-tune: a base model, a data file and an adapter become a better model, with the proof that it is better.

Read top to bottom: lay out the bench (data, base, adapter: bench.py), rehearse the largest micro-batch, train, and end
with a result that a fresh process has proved (ending.py). `start` begins a run, `resume` goes on with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from luthier.core.errors import StoppedError
from luthier.core.events import Event, Recorder, Several
from luthier.core.knobs import validate
from luthier.data.reading.rows import write_rejects
from luthier.infer.engine import Engine
from luthier.infer.wire import UnavailableError
from luthier.kernels import pool
from luthier.recipes.bench import Bench, lay_out
from luthier.recipes.ending import SUMMARY, Ending, finish
from luthier.recipes.first_look import settle
from luthier.recipes.opening.results import started_in
from luthier.recipes.remembered import remember
from luthier.recipes.samples import Samples
from luthier.recipes.schemas.files import begin_run, dated, place_of, unfinished
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.sizing import accounts
from luthier.recipes.sizing.memory import certain_to_fit, require_disk
from luthier.store.runs import RunDirectory
from luthier.train.checkpointing import CheckpointKeeper
from luthier.train.diagnosis import find_bad_number
from luthier.train.loop import Cadence, Loop, Stop
from luthier.train.rehearsal import rehearse
from luthier.train.signals import StopRequest, stop_on_signals
from luthier.train.state import LoopState

if TYPE_CHECKING:
    from luthier.train.rollouts import RolloutSource

Result = TypeVar("Result")


@dataclass(frozen=True)
class RunResult:
    """A run that has ended, and what it says of itself."""

    path: Path
    summary: dict[str, Any]

    def line(self) -> dict[str, Any]:
        """The one line that `luthier train --json` ends with."""
        loss = {key: self.summary["loss"][key] for key in ("first", "last", "eval")}
        keys = ("run", "status", "steps", "tokens", "tokens_per_second", "peak_memory_bytes")
        return {**{key: self.summary[key] for key in keys}, "loss": loss}


def start(recipe: FinetuneRecipe, *, recorder: Recorder, overwrite: bool = False) -> RunResult:
    """Run a recipe in a new run directory, which is only made once model and data have proved usable.

    A run that this very recipe began and did not finish is gone on with instead. Raises StoppedError when a signal
    asked it to stop; what was done is then saved.
    """
    with stop_on_signals() as stop:
        begun = None if overwrite else unfinished(recipe)
        if begun is not None:
            return _resume(begun, stop, recorder=recorder)
        recipe = dated(recipe)
        RunDirectory.require_free(place_of(recipe), overwrite=overwrite)
        bench = lay_out(recipe)
        require_disk(bench.plan["disk"], place_of(recipe))
        with begin_run(recipe, overwrite=overwrite) as run:
            return told(run, stop, lambda: _train(bench, run, stop, recorder, resuming=False))


def finetune(recipe: FinetuneRecipe, run: RunDirectory, *, recorder: Recorder) -> RunResult:
    """Run a recipe in a fresh run directory whose lock is held."""
    with stop_on_signals() as stop:
        return told(run, stop, lambda: _train(lay_out(dated(recipe)), run, stop, recorder, resuming=False))


def resume(run: RunDirectory, *, recorder: Recorder, accept_drift: bool = False) -> RunResult:
    """Go on with a run from its last good checkpoint, exactly as if it had never stopped."""
    with stop_on_signals() as stop:
        return _resume(run, stop, recorder=recorder, accept_drift=accept_drift)


def _resume(run: RunDirectory, stop: StopRequest, *, recorder: Recorder, accept_drift: bool = False) -> RunResult:
    with run.lock():
        if run.status().state == "finished":
            return RunResult(run.folder, run.read_json(SUMMARY))
        values = run.read_recipe()
        recipe = validate(kind_of_recipe(values), values)
        place = started_in(run)

        def train() -> RunResult:
            bench = lay_out(recipe, place)
            return _train(bench, run, stop, recorder, resuming=True, accept_drift=accept_drift)

        return told(run, stop, train)


def told(run: RunDirectory, stop: StopRequest, train: Callable[[], Result]) -> Result:
    """Train, and let the run directory say how it ended, whatever way it ends."""
    stop.resumes_with(f"luthier resume {run.folder}")
    run.write_status("running")
    try:
        return train()
    except StoppedError as stopped:
        run.write_status("stopped", reason=stopped.received)
        raise
    except UnavailableError as away:
        run.write_status("stopped", reason=away.received)
        raise StoppedError(
            f"{away.received}; what was done is saved", do=f"when it is there again: luthier resume {run.folder}"
        ) from away
    except (Exception, KeyboardInterrupt) as error:
        # Not swallowed: only written down on its way out.
        run.write_status("failed", reason=str(error) or type(error).__name__)
        raise


def _train(
    bench: Bench,
    run: RunDirectory,
    stop: StopRequest,
    recorder: Recorder,
    *,
    resuming: bool,
    accept_drift: bool = False,
) -> RunResult:
    work = set_up(
        bench, run, stop, recorder, resuming=resuming, accept_drift=accept_drift,
        wants_save=lambda: run.wants_save() or stop.take_save(),
    )  # fmt: skip
    state = work.state
    rollouts = _rollouts(bench)
    if rollouts is not None:
        rollouts.bind(work.recorder.record, lambda: stop.error() if stop else None)
    _rehearse(bench, state, work.recorder)
    settle(bench, state, work.recorder)
    remember(bench, run, state, work.recorder)
    try:
        with stop.patient():
            status = work.loop.run(state)
    except UnavailableError as away:
        raise StoppedError(
            f"{away.received}; stopped after step {state.step} of {state.total_steps}, and everything is saved",
            do=f"when the engine is there again: luthier resume {run.folder}",
        ) from away
    finally:
        if rollouts is not None:
            rollouts.close()
    _tell_recordings(bench, state, work.recorder)
    if bench.pooled:
        # The process that proves the result needs memory too.
        pool.release()
    if status == "stopped":
        raise StoppedError(
            f"stopped by {stop.reason} after step {state.step} of {state.total_steps}; everything is saved",
            do=f"luthier resume {run.folder}",
        )
    return RunResult(run.folder, finish(work.ending(status)))


def _rollouts(bench: Bench) -> RolloutSource | None:
    """The source of a run that makes its own rows."""
    if not isinstance(bench.recipe, ReinforceRecipe):
        return None
    from luthier.train.rollouts import RolloutSource

    return bench.source if isinstance(bench.source, RolloutSource) else None


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run that is ready for its first step, or for the next one."""

    bench: Bench
    run: RunDirectory
    loop: Loop
    state: LoopState
    keeper: CheckpointKeeper
    recorder: Recorder
    start_digest: str

    def ending(self, status: str) -> Ending:
        """What there is to end, when its steps are done."""
        return Ending(
            bench=self.bench, run=self.run, recorder=self.recorder, keeper=self.keeper, state=self.state,
            status=status, start_digest=self.start_digest,
        )  # fmt: skip


def set_up(
    bench: Bench,
    run: RunDirectory,
    stop: Stop,
    recorder: Recorder,
    *,
    resuming: bool,
    wants_save: Callable[[], bool],
    accept_drift: bool = False,
    more_facts: Mapping[str, Any] | None = None,
) -> Work:
    """The loop of a run with everything it needs; its state is that of the newest checkpoint when it is resumed."""
    recipe, data, model = bench.recipe, bench.data, bench.model
    start_digest = bench.attachment.trained_digest()
    facts = {**accounts.facts(recipe, data, model, bench.tokenizer), **(more_facts or {})}
    if teacher := bench.stepper.batcher.reference.digest:
        facts["teacher"] = teacher
    keeper = CheckpointKeeper(run, bench.stepper, keep=recipe.checkpoint.keep, facts=facts, source=bench.source)
    state = keeper.recover(accept_drift=accept_drift) if resuming else LoopState()
    state.total_steps = bench.plan["steps"]
    if data.report.rejects:
        write_rejects(run.folder / "rejects.jsonl", data.report.rejects)
    run.write_plan(bench.plan)
    everyone = Several([run, recorder])
    notices = [*bench.plan["notices"], *run.checkpoints.notices]
    started = {**bench.plan, "notices": notices, "run": str(run.folder), "resumed_at": state.step}
    everyone.record(Event("start", started, step=state.step))
    loop = Loop(
        source=bench.source,
        stepper=bench.stepper,
        schedule=recipe.schedule,
        cadence=_cadence(recipe),
        recorder=everyone,
        keeper=keeper,
        stop=stop,
        eval_trees=accounts.held_out_trees(recipe, data) if bench.rewarded is None else (),
        evaluate=bench.rewarded,
        sample=_sampler(bench, run),
        wants_save=wants_save,
        diagnose=partial(find_bad_number, bench.stepper),
    )
    return Work(
        bench=bench, run=run, loop=loop, state=state, keeper=keeper, recorder=everyone, start_digest=start_digest
    )


def _rehearse(bench: Bench, state: LoopState, recorder: Recorder) -> None:
    """The largest micro-batch first: what does not fit shows now, and is cut smaller for the whole run."""
    if state.step >= state.total_steps or certain_to_fit(bench.plan["memory"], bench.model.device):
        return
    rehearsal = rehearse(bench.stepper, bench.planned, state.total_steps)
    for split in rehearsal.splits:
        recorder.record(Event("micro_batch_split", asdict(split), step=state.step))
        state.micro_tokens = split.to_tokens
    values = {"tokens": rehearsal.tokens, "rows": rehearsal.rows, "seconds": rehearsal.seconds}
    recorder.record(Event("rehearsal", values, step=state.step))


def _tell_recordings(bench: Bench, state: LoopState, recorder: Recorder) -> None:
    """For which sizes passes were recorded, and why not for others."""
    if bench.graphs is not None and bench.graphs.played:
        recorder.record(Event("recordings", bench.graphs.told(), step=state.step))


def _cadence(recipe: FinetuneRecipe) -> Cadence:
    evaluation = recipe.evaluation
    return Cadence(
        evaluate_every=evaluation.every,
        sample_every=evaluation.every,
        save_every=recipe.checkpoint.every,
        patience=evaluation.patience,
        minutes=recipe.budget.minutes or 0.0,
        max_bad_steps=recipe.max_bad_steps,
    )


def _sampler(bench: Bench, run: RunDirectory) -> Callable[[int], None] | None:
    evaluation = bench.recipe.evaluation
    if evaluation.prompts == 0 or not bench.model.task.speaks:
        # What classifies or fills in says nothing that could be looked at.
        return None
    speaker = Engine(bench.model, decode=bench.tokenizer.decode)
    samples = Samples(
        run,
        bench.model,
        speaker,
        bench.tokenizer,
        bench.data,
        count=evaluation.prompts,
        max_new_tokens=evaluation.max_new_tokens,
    )

    def ask(step: int) -> None:
        with bench.model.only(bench.attachment.name):
            samples.ask(step)

    return ask
