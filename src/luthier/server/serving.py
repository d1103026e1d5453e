"""What the routes share: the model that is served, its engine's thread, its names, and a thread for words.

Templates, tokens and grammars are made in a thread of their own: they take milliseconds, in which neither the engine
nor other clients should wait. One thread: a chat template's process lives as long as the thread that started it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, final

from luthier.core.errors import LuthierError, RecipeError
from luthier.data.tokenizer import Tokenizer
from luthier.infer.grammars import Grammars
from luthier.recipes.opening.checkpoint_adapters import earlier_steps, write_adapter_at
from luthier.recipes.opening.opened import Opened
from luthier.recipes.opening.results import result_of
from luthier.server.errors import DrainingError
from luthier.server.fingerprint import fingerprint
from luthier.server.history import name_at, results_csv
from luthier.server.jobs import Job, Jobs
from luthier.server.metrics import Metrics
from luthier.server.names import Names, Pool
from luthier.server.pooling import Pooling
from luthier.server.settings import Settings
from luthier.server.store import Files
from luthier.server.worker import Worker
from luthier.store.runs import ADAPTER, RunDirectory, is_run

_LOG = logging.getLogger("luthier.server")
T = TypeVar("T")


@final
class Serving:
    """Everything a route needs. `room` is how many tokens a prompt and its answer may be together.

    `drafts` is how many tokens a text is looked ahead where its request says nothing of it.
    """

    def __init__(
        self,
        opened: Opened,
        worker: Worker,
        names: Names,
        settings: Settings,
        *,
        room: int | None = None,
        pooling: Pooling | None = None,
        drafts: int = 0,
    ) -> None:
        self.opened = opened
        self.worker = worker
        self.names = names
        self.settings = settings
        self.room = room
        self.pooling = pooling
        self.drafts = drafts
        self.files = Files(settings.state / "files")
        self.jobs = Jobs(settings.state / "jobs", self._serve_result)
        self.metrics = Metrics()
        self.fingerprint = fingerprint(opened.model)
        self._grammars: Grammars | None = None
        self._words = ThreadPoolExecutor(1, thread_name_prefix="words")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model that is served."""
        return self.opened.tokenizer

    @property
    def grammars(self) -> Grammars:
        """Forms that texts can be bound to; in the thread for words."""
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, stops=frozenset(self.opened.stop_ids))
        return self._grammars

    def require_speech(self) -> None:
        """Raise RecipeError for a model that says no text."""
        if not self.opened.model.task.speaks:
            raise RecipeError(f"{self.names.base} is an encoder and says no text",
                              do="ask it for vectors: POST /v1/embeddings")  # fmt: skip

    async def in_words(self, work: Callable[[], T]) -> T:
        """Run something in the thread for words."""
        return await asyncio.get_running_loop().run_in_executor(self._words, work)

    def load_jobs(self) -> None:
        """Serve what earlier fine-tunes have made, and go on with those that were broken off. Before anything runs."""
        for job in self.jobs.load():
            if job.state == "succeeded" and job.model == self.names.base and self.names.pool is not None:
                places = {name: place for name, place in self._places(job).items() if place.is_dir()}
                self._register(places, self.names.pool)
                self._add(places)

    def _places(self, job: Job) -> dict[str, Path]:
        """Where the adapters of a job that has succeeded lie, by the names that they are served under."""
        run = self.jobs.run_folder(job)
        earlier = earlier_steps(RunDirectory.open(run)) if is_run(run) else []
        return {job.name: run / ADAPTER} | {name_at(job, step): run.parent / f"step-{step}" for step in earlier}

    def _register(self, places: Mapping[str, Path], pool: Pool) -> None:
        """Let the engine know adapters; in its thread, or before it runs."""
        for name, place in places.items():
            pool.register(name, place)

    def _add(self, places: Mapping[str, Path]) -> None:
        for name in places:
            self.names.add(name, name)

    def close(self) -> None:
        """End the threads and processes for words and fine-tunes."""
        self.jobs.close()
        self._words.shutdown(cancel_futures=True)

    def _serve_result(self, job: Job, run: Path) -> list[str]:
        """Serve what a job has made, and keep its losses as a file; in the thread of the jobs."""
        opened = RunDirectory.open(run)
        result_of(opened)
        table = self.files.add("step_metrics.csv", results_csv(run), purpose="fine-tune-results")
        places = self._places(job)
        for step in earlier_steps(opened):
            try:
                write_adapter_at(opened, step, places[name_at(job, step)])
            except LuthierError as failure:
                # The result is there all the same.
                _LOG.error("step %d of %s is not served: %s", step, job.id, failure)
                del places[name_at(job, step)]

        async def register() -> None:
            pool = self.names.pool
            if pool is not None:
                await self.worker.do(lambda: self._register(places, pool))
                self._add(places)

        try:
            asyncio.run_coroutine_threadsafe(register(), self.worker.loop).result()
        except DrainingError:
            # It is served when the server is started again.
            return [table.id]
        return [table.id]
