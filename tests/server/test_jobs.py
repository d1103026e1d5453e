"""The queue of fine-tunes: pause and resume, with a trainer that only counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luthier.core.errors import RecipeError
from luthier.server import jobs as module
from luthier.server.history import events_of
from luthier.server.jobs import Job, Jobs
from tests.server.stand_in_trainer import STEPS


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setattr(module, "TRAINER", "tests.server.stand_in_trainer")
    made = Jobs(tmp_path, lambda _job, _run: [])
    yield made
    made.close()


def create(jobs: Jobs) -> Job:
    return jobs.create("base", "ft:base", {"training_file": "f", "hyperparameters": {}}, {"model": "base"})


def until(true: Callable[[], bool]) -> None:
    latest = time.monotonic() + 20
    while not true():
        assert time.monotonic() < latest
        time.sleep(0.01)


def steps(jobs: Jobs, job: Job) -> list[str]:
    path = jobs.folder / job.id / "steps"
    return path.read_text().split() if path.is_file() else []


def state(jobs: Jobs, job: Job) -> str:
    return jobs.get(job.id).state


def ended(jobs: Jobs) -> bool:
    """Whether no trainer is at work."""
    return jobs._child is None


def test_a_job_rests_and_goes_on_where_it_was(jobs: Jobs) -> None:
    job = create(jobs)
    until(lambda: len(steps(jobs, job)) > 2)
    assert jobs.pause(job.id).state == "paused"
    with pytest.raises(RecipeError, match="is paused"):
        jobs.pause(job.id)
    until(lambda: ended(jobs))
    before = steps(jobs, job)
    time.sleep(0.1)
    assert steps(jobs, job) == before and len(before) < STEPS and state(jobs, job) == "paused"
    assert jobs.resume(job.id).state in ("queued", "running")
    until(lambda: state(jobs, job) == "succeeded")
    assert steps(jobs, job) == [str(each) for each in range(STEPS)], "no step is done twice, and none is left out"
    words = [each["message"] for each in events_of(jobs.get(job.id), jobs.run_folder(job))]
    assert words[1:3] == ["The job was resumed", "The job was paused"] and words[-1].startswith("Created")
    for call in (jobs.pause, jobs.resume):
        with pytest.raises(RecipeError, match="is succeeded"):
            call(job.id)


def test_others_run_while_one_rests_and_one_that_waits_can_rest_too(jobs: Jobs) -> None:
    first, second = create(jobs), create(jobs)
    until(lambda: len(steps(jobs, first)) > 0)
    jobs.pause(second.id)
    jobs.pause(first.id)
    third = create(jobs)
    until(lambda: state(jobs, third) == "succeeded")
    assert (state(jobs, first), state(jobs, second), steps(jobs, second)) == ("paused", "paused", [])
    assert jobs.cancel(second.id).state == "cancelled"
    with pytest.raises(RecipeError, match="is cancelled"):
        jobs.resume(second.id)
    jobs.resume(first.id)
    until(lambda: state(jobs, first) == "succeeded")


def test_what_is_resumed_before_its_trainer_has_ended(jobs: Jobs) -> None:
    """Breaks when the end of the paused trainer is taken for the end of the job, or it is asked to end twice."""
    job = create(jobs)
    until(lambda: len(steps(jobs, job)) > 0)
    for _ in range(3):
        jobs.pause(job.id)
        jobs.resume(job.id)
    until(lambda: state(jobs, job) == "succeeded")
    assert steps(jobs, job) == [str(each) for each in range(STEPS)]


def test_one_that_fails_while_it_is_paused_has_failed(jobs: Jobs) -> None:
    job = create(jobs)
    until(lambda: len(steps(jobs, job)) > 0)
    (jobs.folder / job.id / "fail").touch()
    until(lambda: state(jobs, job) == "failed")
    assert (jobs.get(job.id).error or {})["code"] == "data"


def test_a_server_that_comes_up_again_lets_it_rest(jobs: Jobs) -> None:
    job = create(jobs)
    until(lambda: len(steps(jobs, job)) > 0)
    jobs.pause(job.id)
    until(lambda: ended(jobs))
    again = Jobs(jobs.folder, lambda _job, _run: [])
    try:
        again.load()
        time.sleep(0.1)
        assert state(again, job) == "paused" and ended(again)
        again.resume(job.id)
        until(lambda: state(again, job) == "succeeded")
        assert steps(again, job) == [str(each) for each in range(STEPS)]
    finally:
        again.close()
