"""What a fine-tune's run says of itself, as OpenAI's events, checkpoints and result file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.recipes.opening.checkpoint_adapters import step_of_result
from luthier.recipes.opening.results import of_policy
from luthier.server.jobs import Job
from luthier.store.lines import JsonLines
from luthier.store.runs import RunDirectory, is_run

_WORDS: Final[Mapping[str, str]] = {
    "start": "The run has begun",
    "rehearsal": "The longest step was tried",
    "checkpoint": "Step {step}: the state was saved",
    "finish": "The run has ended and its result was proved",
}
_MEASURED: Final = ("step", "rollout", "evaluation")
_COLUMNS: Final = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_REWARDS: Final = ("train_mean_reward", "valid_mean_reward")


def events_of(job: Job, run: Path) -> list[dict[str, Any]]:
    """What happened in a job, the latest first."""
    made = [_event(job, 0, job.created_at, "Created fine-tuning job: " + job.id)]
    for place, said in enumerate(_records(run), 1):
        step, kind = said.get("step"), str(said.get("kind"))
        when = int(said.get("time", job.created_at))
        if kind == "step":
            data = {"step": step, "train_loss": said.get("loss")}
            made.append(_event(job, place, when, f"Step {step}: training loss={_shown(said.get('loss'))}", data))
        elif kind == "rollout":
            data = {"step": step, "train_mean_reward": said.get("reward")}
            told = f"Step {step}: mean reward={_shown(said.get('reward'))} of {said.get('answers')} answers"
            made.append(_event(job, place, when, told, data))
        elif kind == "evaluation" and "reward" in said:
            data = {"step": step, "valid_mean_reward": said.get("reward")}
            told = f"Step {step}: mean validation reward={_shown(said.get('reward'))}"
            made.append(_event(job, place, when, told, data))
        elif kind == "evaluation":
            data = {"step": step, "valid_loss": said.get("loss")}
            made.append(_event(job, place, when, f"Step {step}: validation loss={_shown(said.get('loss'))}", data))
        elif kind in _WORDS:
            made.append(_event(job, place, when, _WORDS[kind].format(step=step)))
    for place, (when, what) in enumerate(job.turns):
        made.append(_event(job, 10**8 + place, when, f"The job was {what}"))
    # Stable: what a second holds stays in its order.
    made.sort(key=lambda each: int(each["created_at"]))
    if job.finished_at is not None:
        words = {"succeeded": f"New fine-tuned model created: {job.name}", "cancelled": "The job was cancelled"}
        failed = str((job.error or {}).get("message", "The job has failed"))
        level = "error" if job.state == "failed" else "info"
        made.append(_event(job, 10**9, job.finished_at, words.get(job.state, failed), level=level))
    return made[::-1]


def name_at(job: Job, step: int) -> str:
    """What is served of a job's state at a step that is not its result."""
    return f"{job.name}:ckpt-step-{step}"


def checkpoints_of(job: Job, run: Path) -> list[dict[str, Any]]:
    """The states that a job's run holds, the latest first. They are served once the job has succeeded."""
    if not is_run(run):
        return []
    result = step_of_result(RunDirectory.open(run))
    losses: dict[int, dict[str, Any]] = {}
    for said in _records(run):
        if said.get("kind") in ("step", "evaluation") and isinstance(said.get("step"), int):
            name = "train_loss" if said["kind"] == "step" else "full_valid_loss"
            losses.setdefault(said["step"], {})[name] = said.get("loss")
    made = [
        {
            "id": f"ftckpt-{job.id.removeprefix('ftjob-')}-{step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": job.finished_at or job.created_at,
            "fine_tuned_model_checkpoint": job.name if step == result else name_at(job, step),
            "fine_tuning_job_id": job.id,
            "step_number": step,
            "metrics": {"step": step, **losses.get(step, {})},
        }
        for step in of_policy(RunDirectory.open(run)).checkpoints.steps()
    ]
    return sorted(made, key=lambda each: -int(str(each["step_number"])))


def results_csv(run: Path) -> bytes:
    """The losses of each step, in OpenAI's columns, and the rewards where answers were graded."""
    rows: dict[int, dict[str, Any]] = {}
    for said in _records(run):
        if said.get("kind") not in _MEASURED or not isinstance(said.get("step"), int):
            continue
        row, kind = rows.setdefault(said["step"], {}), str(said["kind"])
        if kind == "rollout" or (kind == "evaluation" and "reward" in said):
            row["train_mean_reward" if kind == "rollout" else "valid_mean_reward"] = said.get("reward")
        else:
            row["train_loss" if kind == "step" else "valid_loss"] = said.get("loss")
    text = io.StringIO()
    rewarded = any("train_mean_reward" in row for row in rows.values())
    writer = csv.DictWriter(text, [*_COLUMNS, *(_REWARDS if rewarded else ())])
    writer.writeheader()
    writer.writerows({"step": step, **rows[step]} for step in sorted(rows))
    return text.getvalue().encode()


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return list(JsonLines(path).read()) if path.is_file() else []


def _event(
    job: Job, place: int, when: int, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info"
) -> dict[str, Any]:
    return {
        "id": f"ftevent-{job.id.removeprefix('ftjob-')}-{place}",
        "object": "fine_tuning.job.event",
        "created_at": when,
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": None if data is None else dict(data),
    }


def _shown(loss: object) -> str:
    return f"{loss:.4f}" if isinstance(loss, float) else str(loss)
