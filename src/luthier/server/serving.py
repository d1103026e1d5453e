"""What the routes share: the model that is served, its engine's thread, its names, and a thread for words.

Templates, tokens and grammars are made in a thread of their own: they take milliseconds, in which neither the engine
nor other clients should wait. One thread: a chat template's process lives as long as the thread that started it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, final

from luthier.core.errors import RecipeError
from luthier.data.tokenizer import Tokenizer
from luthier.infer.grammars import Grammars
from luthier.recipes.opening.opened import Opened
from luthier.recipes.opening.results import result_of
from luthier.server.errors import DrainingError
from luthier.server.history import results_csv
from luthier.server.jobs import Job, Jobs
from luthier.server.metrics import Metrics
from luthier.server.names import Names
from luthier.server.pooling import Pooling
from luthier.server.settings import Settings
from luthier.server.store import Files
from luthier.server.worker import Worker
from luthier.store.runs import ADAPTER, RunDirectory

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
            folder = self.jobs.run_folder(job) / ADAPTER
            if job.state == "succeeded" and job.model == self.names.base and self.names.pool and folder.is_dir():
                self.names.pool.register(job.name, folder)
                self.names.add(job.name, job.name)

    def close(self) -> None:
        """End the threads and processes for words and fine-tunes."""
        self.jobs.close()
        self._words.shutdown(cancel_futures=True)

    def _serve_result(self, job: Job, run: Path) -> list[str]:
        """Serve what a job has made, and keep its losses as a file; in the thread of the jobs."""
        folder, _ = result_of(RunDirectory.open(run))
        table = self.files.add("step_metrics.csv", results_csv(run), purpose="fine-tune-results")

        async def register() -> None:
            pool = self.names.pool
            if pool is not None:
                await self.worker.do(lambda: pool.register(job.name, folder))
                self.names.add(job.name, job.name)

        try:
            asyncio.run_coroutine_threadsafe(register(), self.worker.loop).result()
        except DrainingError:
            # It is served when the server is started again.
            return [table.id]
        return [table.id]
