"""Fine-tunes: a queue, one child process of our own trainer at a time, and what became of each on disk.

Idea: a job is a folder with what was asked (`job.json`), a recipe, and the run that `luthier train` makes of it. The
server that comes up again goes on with what it had begun: the same recipe resumes its run. A job that is paused has its
trainer save after the step at hand and end; resumed, it waits for its turn again and goes on bit for bit.
"""

from __future__ import annotations

import json
import queue
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, final

import yaml

from luthier.core.child import WAIT_POLICY, start_child
from luthier.core.errors import LuthierError, RecipeError, StoppedError
from luthier.server.errors import NotServedError, without_folders
from luthier.store.files import read_json, write_json, write_text

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
OVER: Final = ("succeeded", "failed", "cancelled")
TRAINER: Final = "luthier.server.trainer"
MOST_QUEUED: Final = 64
END_SECONDS: Final = 20.0
"""How long a trainer may take to save when the server ends."""
STOPPED: Final = (StoppedError.exit_code, -signal.SIGTERM)
"""How a trainer ends that was asked to: with everything saved, or before it had anything to save."""


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """A fine-tune as it stands."""

    id: str
    model: str
    name: str
    created_at: int
    asked: Mapping[str, Any]
    state: State = "queued"
    finished_at: int | None = None
    trained_tokens: int | None = None
    error: Mapping[str, Any] | None = None
    results: tuple[str, ...] = field(default=())
    turns: tuple[tuple[int, str], ...] = field(default=())
    """When it was paused and resumed."""


@final
class Jobs:
    """The fine-tunes below a folder. `on_result` serves what a job has made; it is called from the jobs' thread."""

    def __init__(self, folder: Path, on_result: Callable[[Job, Path], list[str]]) -> None:
        self.folder = folder
        self._on_result = on_result
        self._jobs: dict[str, Job] = {}
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._child: tuple[str, subprocess.Popen[bytes]] | None = None
        self._lock = threading.RLock()
        self._ending = False
        self._thread: threading.Thread | None = None

    def load(self) -> list[Job]:
        """The jobs that are on disk; those that were under way are queued again."""
        for path in sorted(self.folder.glob("ftjob-*/job.json")):
            said = read_json(path)
            turns = tuple((int(when), str(what)) for when, what in said.get("turns", ()))
            job = Job(**{**said, "results": tuple(said.get("results", ())), "turns": turns})
            self._jobs[job.id] = job
        unfinished = [job for job in self.all()[::-1] if job.state not in (*OVER, "paused")]
        for job in unfinished:
            self._enqueue(self._set(job, state="queued"))
        return self.all()

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (-job.created_at, job.id))

    def get(self, name: str) -> Job:
        """A job by its id. Raises NotServedError."""
        job = self._jobs.get(name)
        if job is None:
            raise NotServedError(f"no job is called {name!r:.80}", do="GET /v1/fine_tuning/jobs lists them")
        return job

    def run_folder(self, job: Job) -> Path:
        """The run of a job, which may not be there yet."""
        return self.folder / job.id / "run"

    def create(self, model: str, name: str, asked: Mapping[str, Any], recipe: Mapping[str, Any]) -> Job:
        """Take a job. Raises RecipeError when too many wait."""
        if sum(job.state not in OVER for job in self.all()) >= MOST_QUEUED:
            raise RecipeError(f"{MOST_QUEUED} fine-tunes wait already", do="wait, or cancel some")
        tail = secrets.token_hex(8)
        job = Job(id=f"ftjob-{tail}", model=model, name=f"{name}:{tail[:8]}", created_at=int(time.time()), asked=asked)
        place = self.folder / job.id
        place.mkdir(parents=True)
        values = {**recipe, "run": str(self.run_folder(job).absolute())}
        write_text(place / "recipe.yaml", yaml.safe_dump(values, sort_keys=False))
        self._enqueue(self._set(job, state="queued"))
        return job

    def cancel(self, name: str) -> Job:
        """Stop a job; what its run has saved stays. Raises RecipeError for one that is over."""
        with self._lock:
            job = self.get(name)
            if job.state in OVER:
                raise RecipeError(f"the job {name} is over: {job.state}", allowed="jobs that are queued or run")
            job = self._set(job, state="cancelled", finished_at=int(time.time()))
            if self._child is not None and self._child[0] == name:
                self._child[1].terminate()
        return job

    def pause(self, name: str) -> Job:
        """Let a job rest: its trainer saves after the step at hand and ends. Raises RecipeError for one that rests or
        is over."""
        with self._lock:
            job = self.get(name)
            if job.state not in ("queued", "running"):
                raise RecipeError(f"the job {name} is {job.state}", allowed="jobs that are queued or run")
            # A trainer that ends since an earlier pause is not asked twice: that would break off its saving.
            running = job.state == "running"
            job = self._set(job, state="paused", turns=(*job.turns, (int(time.time()), "paused")))
            if running and self._child is not None:
                self._child[1].terminate()
        return job

    def resume(self, name: str) -> Job:
        """Let a job that rests wait for its turn again. Raises RecipeError for any other."""
        with self._lock:
            job = self.get(name)
            if job.state != "paused":
                raise RecipeError(f"the job {name} is {job.state}", allowed="jobs that are paused")
            job = self._set(job, state="queued", turns=(*job.turns, (int(time.time()), "resumed")))
            self._enqueue(job)
        return job

    def close(self) -> None:
        """End the trainer at work; it saves first."""
        with self._lock:
            self._ending = True
            if self._child is not None:
                self._child[1].terminate()
        self._queue.put("")
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        if self._child is not None:
            self._child[1].kill()

    def _set(self, job: Job, **changes: Any) -> Job:
        with self._lock:
            changed = replace(job, **changes)
            self._jobs[job.id] = changed
            write_json(self.folder / job.id / "job.json", asdict(changed))
        return changed

    def _enqueue(self, job: Job) -> None:
        self._queue.put(job.id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fine-tunes", daemon=True)
            self._thread.start()

    # ------------------------------------------------------------------------------------------- on the jobs' thread

    def _work(self) -> None:
        while name := self._queue.get():
            if not self._ending and self.get(name).state == "queued":
                self._train(name)

    def _train(self, name: str) -> None:
        place = self.folder / name
        with (place / "log.txt").open("ab") as log:
            with self._lock:
                job = self.get(name)
                if job.state != "queued":
                    return
                job = self._set(job, state="running")
                # A server's threads sleep while they wait; those of a trainer are faster when they do not.
                recipe = str(place / "recipe.yaml")
                child = start_child(TRAINER, [recipe], stderr=log.fileno(), without=(WAIT_POLICY,))
                self._child = (name, child)
            said = b"" if child.stdout is None else child.stdout.read()
            code = child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        with self._lock:
            self._child = None
            job = self.get(name)
            # One that was paused, and perhaps resumed since, may have come to its end all the same.
            rests = job.state in ("paused", "queued") and code in STOPPED
            if self._ending or rests or job.state == "cancelled":
                return
        self._end(job, code, _plain(said))

    def _end(self, job: Job, code: int, said: Mapping[str, Any]) -> None:
        if code != 0:
            told = said.get("error") or {"code": "unexpected", "received": f"the trainer ended with {code}", "do": ""}
            self._failed(job, told["code"], f"{told['received']}; {told['do']}")
            return
        try:
            results = self._on_result(job, self.run_folder(job))
        except LuthierError as failure:
            self._failed(job, failure.code, failure.told())
            return
        tokens = said.get("tokens", {}).get("trained")
        self._set(job, state="succeeded", finished_at=int(time.time()), trained_tokens=tokens, results=tuple(results))

    def _failed(self, job: Job, code: str, message: str) -> None:
        error = {"code": code, "message": without_folders(message), "param": None}
        self._set(job, state="failed", finished_at=int(time.time()), error=error)


def _plain(said: bytes) -> dict[str, Any]:
    """The last line of what a trainer said."""
    lines = said.splitlines()
    try:
        return dict(json.loads(lines[-1])) if lines else {}
    except ValueError:
        return {}
