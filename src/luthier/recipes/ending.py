"""The ending of a run: take the best state, save it whole, let a fresh process prove it, and tell.

Each part can be done again by the same command when it was interrupted, and only the last one says `finished`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import GateError
from luthier.core.events import Event, Recorder, plain
from luthier.recipes.bench import Bench
from luthier.recipes.control_tokens import save_stops
from luthier.recipes.lessons import lessons
from luthier.recipes.opening import purpose, quantized
from luthier.recipes.proving import verify
from luthier.recipes.proving.claims import claims_of
from luthier.recipes.sizing import accounts
from luthier.store.files import write_json, write_text
from luthier.store.report import write_report
from luthier.store.report_files import read_run
from luthier.store.runs import RunDirectory
from luthier.train.checkpointing import CheckpointKeeper
from luthier.train.result import release, save_result
from luthier.train.state import LoopState

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A run whose steps are done. `start_digest` is of the trained parameters before any step."""

    bench: Bench
    run: RunDirectory
    recorder: Recorder
    keeper: CheckpointKeeper
    state: LoopState
    status: str
    start_digest: str


def finish(ending: Ending) -> dict[str, Any]:
    """End a run; its summary.

    Raises NumericError or GateError when what was trained cannot be a result, or its files do not prove to be one.
    """
    save(ending)
    release(ending.bench.model, ending.bench.stepper)
    return conclude(ending)


def save(ending: Ending) -> None:
    """Take the best state and save it whole. Raises NumericError or GateError for what cannot be a result."""
    loss = ending.keeper.restore_best(ending.state)
    try:
        _save(ending.bench, ending.run, ending.keeper, ending.state, loss, ending.start_digest)
    except GateError as error:
        if learned := _learned(ending.run):
            # Why nothing was trained is known here: no answer was better than another.
            raise GateError(f"{error.received}; {learned[0]}", allowed=error.allowed, where=error.where) from error
        raise


def conclude(ending: Ending) -> dict[str, Any]:
    """Let a fresh process prove what was saved, and tell; the summary. The model is needed no more."""
    bench, run, state = ending.bench, ending.run, ending.state
    proof = verify.proved(run)
    more = [*run.checkpoints.notices, *_learned(run)]
    summary = accounts.summary(bench.plan, run.folder, state, status=ending.status, proof=proof, more=more)
    write_json(run.folder / SUMMARY, plain(summary))
    worst = accounts.worst_rows(ending.keeper.row_excess, bench.data, bench.tokenizer)
    write_text(run.folder / "worst_rows.json", json.dumps(plain(worst), ensure_ascii=False, indent=1))
    ending.recorder.record(Event("finish", summary, step=state.step))
    write_report(run.folder)
    run.write_status("finished", values=summary)
    return summary


def _learned(run: RunDirectory) -> list[str]:
    """What the rollouts of a run say, if it had any."""
    told = read_run(run.folder)
    return lessons(told.of_kind("rollout"), told.of_kind("evaluation"))


def _save(
    bench: Bench,
    run: RunDirectory,
    keeper: CheckpointKeeper,
    state: LoopState,
    loss: float | None,
    start_digest: str,
) -> None:
    """The result with all that goes with it: its tokenizer, its template, where it stops, and what the run claims."""
    recipe, data, model = bench.recipe, bench.data, bench.model
    extras = {
        "run": run.folder.name,
        "stop_ids": sorted(data.store.stop_ids),
        "template": recipe.data.template,
        "precision": str(model.dtype).removeprefix("torch."),
        "base_seed": recipe.seed,
        quantized.KEY: recipe.quantizer.as_recipe(),
        purpose.KEY: purpose.as_kept(model.task),
    }
    claims = claims_of(bench, run, state, eval_loss=loss, start_digest=start_digest, made_with=keeper.facts)

    def beside(folder: Path) -> None:
        bench.tokenizer.save(folder, chat_template=data.renderer.template.source or None)
        if data.store.stop_ids and model.task.speaks:
            save_stops(folder, model, bench.tokenizer, data.store.stop_ids)

    save_result(run.folder, model, bench.attachment, recipe.adapter, extras, claims=claims, beside=beside)
