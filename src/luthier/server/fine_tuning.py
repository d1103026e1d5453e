"""/v1/fine_tuning/jobs: OpenAI's fine-tunes by our own trainer; the result is at once a model name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.optimizers import Optimizer
from luthier.server.answers import ERRORS, CheckpointList, EventList, JobList, TuningJob
from luthier.server.bodies import Body
from luthier.server.history import checkpoints_of, events_of
from luthier.server.jobs import Job
from luthier.server.serving import Serving
from luthier.server.tuning_methods import Hyper, TuningMethod, Way, way_of

T = TypeVar("T")
Id = Annotated[str, Path(max_length=64)]
Most = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=128)]


class JobBody(Body):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(max_length=512)
    training_file: str = Field(max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    hyperparameters: Hyper | None = None
    method: TuningMethod | None = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    metadata: dict[str, str] | None = Field(None, max_length=16)
    integrations: None = None

    @property
    def type(self) -> str:
        """The method's name."""
        return self.method.type if self.method is not None else "supervised"

    @property
    def told(self) -> dict[str, Any]:
        """What of the method is told again besides its hyperparameters."""
        chosen = self.method.given.get(self.type) if self.method is not None else None
        return chosen.model_dump(exclude={"hyperparameters"}) if chosen is not None else {}

    def way(self) -> tuple[Way, Hyper]:
        """The method and its hyperparameters, wherever they stand. Raises RecipeError for what is not done here."""
        return way_of(self.method, self.hyperparameters)


def routes(serving: Serving) -> APIRouter:
    """The routes of fine-tunes."""
    router = APIRouter(tags=["fine-tuning"], prefix="/v1/fine_tuning/jobs")
    jobs = serving.jobs

    @router.post("", response_model=TuningJob, responses=ERRORS)
    async def create_fine_tuning_job(body: JobBody) -> Response:
        """Train an adapter on an uploaded file."""
        recipe = recipe_of(serving, body)
        asked = {"training_file": body.training_file, "validation_file": body.validation_file, "type": body.type,
                 "hyperparameters": body.way()[1].model_dump(), "seed": body.seed or 0,
                 "metadata": body.metadata, "method": body.told}  # fmt: skip
        name = f"ft:{serving.names.base}:{body.suffix or 'luthier'}"
        job = await asyncio.to_thread(jobs.create, serving.names.base, name, asked, recipe)
        return JSONResponse(plain(job))

    @router.get("", response_model=JobList, responses=ERRORS)
    async def list_fine_tuning_jobs(after: After = None, limit: Most = 20) -> Response:
        """The fine-tunes, the newest first."""
        return JSONResponse(_page([plain(job) for job in jobs.all()], after, limit))

    @router.get("/{job_id}", response_model=TuningJob, responses=ERRORS)
    async def retrieve_fine_tuning_job(job_id: Id) -> Response:
        """How a fine-tune stands."""
        return JSONResponse(plain(jobs.get(job_id)))

    @router.post("/{job_id}/cancel", response_model=TuningJob, responses=ERRORS)
    async def cancel_fine_tuning_job(job_id: Id) -> Response:
        """Stop a fine-tune."""
        return JSONResponse(plain(await asyncio.to_thread(jobs.cancel, job_id)))

    @router.post("/{job_id}/pause", response_model=TuningJob, responses=ERRORS)
    async def pause_fine_tuning_job(job_id: Id) -> Response:
        """Let a fine-tune rest after the step at hand, with everything saved."""
        return JSONResponse(plain(await asyncio.to_thread(jobs.pause, job_id)))

    @router.post("/{job_id}/resume", response_model=TuningJob, responses=ERRORS)
    async def resume_fine_tuning_job(job_id: Id) -> Response:
        """Go on with a fine-tune that rests, exactly where it was."""
        return JSONResponse(plain(await asyncio.to_thread(jobs.resume, job_id)))

    @router.get("/{job_id}/events", response_model=EventList, responses=ERRORS)
    async def list_fine_tuning_events(job_id: Id, after: After = None, limit: Most = 20) -> Response:
        """What happened, the latest first."""
        job = jobs.get(job_id)
        return JSONResponse(_page(await asyncio.to_thread(events_of, job, jobs.run_folder(job)), after, limit))

    @router.get("/{job_id}/checkpoints", response_model=CheckpointList, responses=ERRORS)
    async def list_fine_tuning_job_checkpoints(job_id: Id, after: After = None, limit: Most = 10) -> Response:
        """The states that were saved, the latest first; each is served under its name once the job has succeeded."""
        job = jobs.get(job_id)
        return JSONResponse(_page(await asyncio.to_thread(checkpoints_of, job, jobs.run_folder(job)), after, limit))

    return router


def recipe_of(serving: Serving, body: JobBody) -> dict[str, Any]:
    """The recipe of a job. Raises what is wrong with the model or the files it names."""
    if body.model != serving.names.base:
        serving.names.engine_name(body.model)
        raise RecipeError(f"model is {body.model!r:.80}", allowed=f"the base, {serving.names.base}",
                          do="train on the base; an adapter is not gone on with")  # fmt: skip
    if not serving.opened.model.task.speaks:
        raise RecipeError(f"{serving.names.base} is an encoder", do="train it with: luthier train")
    way, hyper = body.way()
    source = serving.opened.model.source
    data: dict[str, Any] = {"train": str(serving.files.path(body.training_file).absolute())}
    if body.validation_file is not None:
        data["evaluation"] = str(serving.files.path(body.validation_file).absolute())
    recipe: dict[str, Any] = {
        "model": str(FilePath(source).absolute()) if FilePath(source).exists() else source,
        "data": data,
        "adapter": {"method": "lora"},
        "budget": {"epochs": 3 if hyper.n_epochs == "auto" else hyper.n_epochs},
        "seed": body.seed or 0,
    }
    recipe |= way.recipe(hyper, body.method, (serving.names.base, recipe["model"]))
    if body.validation_file is None:
        recipe["evaluation"] = {**recipe.get("evaluation", {}), "fraction": 0.0}
    if hyper.learning_rate_multiplier != "auto":
        rate = choose("optimizers", Optimizer, "adamw").as_recipe()["learning_rate"]
        recipe["optimizer"] = {"method": "adamw", "learning_rate": rate * hyper.learning_rate_multiplier}
    return recipe


def plain(job: Job) -> dict[str, Any]:
    """A job as the API tells it."""
    hyper, kind = job.asked["hyperparameters"], job.asked.get("type", "supervised")
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "status": job.state,
        "model": job.model,
        "fine_tuned_model": job.name if job.state == "succeeded" else None,
        "training_file": job.asked["training_file"],
        "validation_file": job.asked["validation_file"],
        "trained_tokens": job.trained_tokens,
        "error": dict(job.error) if job.error is not None else None,
        "hyperparameters": hyper,
        "result_files": list(job.results),
        "seed": job.asked["seed"],
        "organization_id": "luthier",
        "metadata": job.asked["metadata"],
        "method": {"type": kind, kind: {**job.asked.get("method", {}), "hyperparameters": hyper}},
    }


def _page(items: Sequence[Mapping[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    names = [each["id"] for each in items]
    start = names.index(after) + 1 if after in names else 0
    return {"object": "list", "data": list(items[start : start + limit]), "has_more": start + limit < len(items)}
