"""The same command goes on with what it began; a wish to save is heard; another process is named at once."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.recipes.ending import SUMMARY
from luthier.train.stepper import Stepper, StepReport
from tests.cli.commands import STEPS, environ, events, forked, luthier, step_events, tree, wait_for_step
from tests.recipes.test_resume import same_run
from tests.tiny import CHAT_TEMPLATE

main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """`at_step(3, do)`: calls `do` in the middle of the third optimizer step of this process."""
    done, plain, wishes = 0, Stepper.optim_step, dict[int, Callable[[], None]]()

    def stepped(self: Stepper, *, factor: float = 1.0) -> StepReport:
        nonlocal done
        done += 1
        if done in wishes:
            wishes[done]()
        return plain(self, factor=factor)

    monkeypatch.setattr(Stepper, "optim_step", stepped)
    return wishes.__setitem__


def saved(folder: Path) -> list[int]:
    return [event["step"] for event in events(folder) if event["kind"] == "checkpoint"]


@main_thread
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_same_command_goes_on(
    name: str, tmp_path: Path, recipe: Path, finished: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    """Breaks when a run that was stopped has to be resumed with another command, or begins anew."""
    folder = tmp_path / "run"
    at_step(3, lambda: os.kill(os.getpid(), signal.Signals[name]))
    luthier("train", recipe, "--run", folder).must(75, f"stopped by {name} after step 3 of {STEPS}", "luthier resume")
    line = luthier("train", recipe, "--run", folder, "--json").must(0, "going on after step 3").json
    assert line["status"] == "finished"
    same_run(folder, finished)
    luthier("train", recipe, "--run", folder).must(77, "holds a run (finished)", "nothing was changed")


@main_thread
def test_another_recipe_does_not_go_on_with_a_run(
    tmp_path: Path, recipe: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    """Breaks when a changed recipe continues a run that began with other knobs."""
    folder = tmp_path / "run"
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    luthier("train", recipe, "--run", folder).must(75)
    before = tree(folder)
    told = luthier("train", recipe, "--run", folder, "--set", "adapter.rank=3")
    told.must(77, "holds a run (stopped)", f"luthier resume {folder}", "--overwrite")
    assert tree(folder) == before


@main_thread
def test_without_a_place_the_run_that_was_stopped_is_found(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch,
    at_step: Callable[[int, Callable[[], None]], None],
) -> None:  # fmt: skip
    """Breaks when the same command, without a run directory of its own, starts a second run beside the first."""
    monkeypatch.chdir(tmp_path)
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    luthier("train", recipe).must(75)
    (folder,) = (tmp_path / "runs").iterdir()
    luthier("train", recipe).must(0, "going on after step 3")
    assert list((tmp_path / "runs").iterdir()) == [folder]
    luthier("train", recipe, "--set", "budget.steps=2").must(0)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_died_before_its_recipe_was_written_is_begun_again(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a kill in the first moments of a run needs somebody to remove its folder."""
    folder = tmp_path / "run"

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("RunDirectory.write_recipe", "RunDirectory.write_environment", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(f"luthier.store.runs.{place}", die)
            assert luthier("train", recipe, "--run", folder).code == 130
        (folder / ".run.json.4711.tmp").write_text("{", "utf-8")
    luthier("train", recipe, "--run", folder).must(0)
    assert (folder / SUMMARY).is_file() and not list(folder.glob(".*.tmp"))


@main_thread
def test_a_wish_to_save_is_heard_after_the_step_at_hand(
    tmp_path: Path, recipe: Path, finished: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    """Breaks when `touch RUN/save` or SIGUSR1 does nothing, stops the run, or changes its bits."""
    folder = tmp_path / "run"
    at_step(1, lambda: (folder / "save").touch())
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    luthier("train", recipe, "--run", folder, "--set", "checkpoint.keep=9").must(0)
    assert {1, 5} <= set(saved(folder)) and not {1, 5} & set(saved(finished))
    assert not (folder / "save").exists()
    assert step_events(folder) == step_events(finished)
    for name in ("step-000001", "step-000005"):
        assert (folder / "checkpoints" / name / "manifest.json").is_file()


def test_a_second_start_is_refused_in_under_a_second_and_names_the_holder(
    tmp_path: Path, recipe: Path
) -> None:
    """Breaks when the lock is only looked at after the libraries have been imported."""
    folder = tmp_path / "run"
    with forked("train", recipe, "--run", folder, out=tmp_path / "said", pause=0.5) as child:
        wait_for_step(folder, 1, child)
        for command in (("train", recipe, "--run", folder), ("resume", folder)):
            began = time.monotonic()
            told = subprocess.run(
                [sys.executable, "-c", "from luthier.cli.main import main; main()", *map(str, command)],
                capture_output=True, text=True, env=environ(), check=False,
            )  # fmt: skip
            seconds = time.monotonic() - began
            assert told.returncode == 77 and f"is used by pid {child.pid} on " in told.stderr, told.stderr
            # Generous beside the second that is promised: the machine may be busy with other tests.
            assert seconds < 3
        assert "torch" not in _imported(command, environ())


def _imported(command: tuple[object, ...], environment: dict[str, str]) -> str:
    """What a refused command has imported."""
    code = (
        "import sys\nfrom luthier.cli.main import run\n"
        f"code = run({[str(part) for part in command]!r})\nprint([m for m in sys.modules if m == 'torch'], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "[] 77" in done.stdout, done
    return done.stdout


@main_thread
def test_a_run_goes_on_with_the_date_it_began_with(
    tmp_path: Path, recipe: Path, at_step: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a template that shows the date makes other tokens of the same rows on the next day."""
    folder, template = tmp_path / "run", tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}\n" + CHAT_TEMPLATE)
    again = ["train", recipe, "--run", folder, "--set", f"data.template={template}"]
    monkeypatch.setattr("luthier.recipes.schemas.files.datetime", day("2026-11-20"))
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    luthier(*again).must(75)
    monkeypatch.setattr("luthier.recipes.schemas.files.datetime", day("2026-11-21"))
    luthier(*again, "--json").must(0, "going on after step 3")
    assert "date: '2026-11-20'" in (folder / "recipe.yaml").read_text()
    luthier("eval", folder, "--verify").must(0)
    wrong = luthier("train", recipe, "--run", tmp_path / "other", "--set", "data.date=tomorrow")
    wrong.must(2, "data.date", "a day such as")


def day(text: str) -> types.SimpleNamespace:
    """A `datetime` module whose today is this day."""
    known = datetime.date.fromisoformat(text)
    fixed = type("date", (datetime.date,), {"today": classmethod(lambda cls: known)})
    return types.SimpleNamespace(date=fixed)
