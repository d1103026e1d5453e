"""A run that was stopped, killed, or out of space goes on as if nothing had happened: the same bits, the same log."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.train.checkpointing import CheckpointKeeper
from luthier.train.result import save_result
from luthier.train.state import LoopState, Snapshot
from luthier.train.stepper import Stepper, StepReport
from tests.cli.commands import STEPS, events, forked, luthier, process, step_events, tree, wait_for_step

RESULT = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json")
LAST = f"checkpoints/step-{STEPS:06d}"


def same_run(folder: Path, unbroken: Path) -> None:
    """The result, the last state, the log and the answers of `folder` are those of a run that never stopped."""
    assert step_events(folder) == step_events(unbroken)
    assert len(step_events(folder)) == STEPS
    for name in (*RESULT, f"{LAST}/state.safetensors", "samples.jsonl", "worst_rows.json"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    told = [[event["loss"] for event in events(run) if event["kind"] == "evaluation"] for run in (folder, unbroken)]
    assert told[0] == told[1]
    numbers = [json.loads((run / LAST / "state.json").read_text("utf-8")) for run in (folder, unbroken)]
    for one in numbers:
        # Times, and the lengths of a log that holds times.
        for key in ("train_seconds", "events_bytes"):
            one["loop"].pop(key)
    assert numbers[0] == numbers[1]


def test_ctrl_c_saves_and_a_second_run_into_the_folder_is_refused_meanwhile(
    tmp_path: Path, recipe: Path, finished: Path
) -> None:
    folder = tmp_path / "run"
    with process("train", recipe, "--run", folder, "--json", pause=0.2) as child:
        wait_for_step(folder, 3, child)
        before = {name: data for name, data in tree(folder).items() if name in ("recipe.yaml", "run.json")}
        began = time.monotonic()
        for more in ((), ("--overwrite",)):
            told = luthier("train", recipe, "--run", folder, *more)
            told.must(77, "nothing was changed")
        luthier("resume", folder).must(77, f"is used by pid {child.pid}", "nothing was changed")
        assert time.monotonic() - began < 1
        assert {name: data for name, data in tree(folder).items() if name in before} == before
        assert luthier("run", "show", folder, "--json").json["state"] == "running"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert "stopped by SIGINT after step" in err and f"luthier resume {folder}" in err
    assert json.loads(out)["error"]["exit_code"] == 75 and out.count("\n") == 1
    assert "\x1b" not in err and "\r" not in err
    assert luthier("run", "show", folder, "--json").json["state"] == "stopped"
    step = step_events(folder)[-1]["step"]
    assert step < STEPS and (folder / "checkpoints" / f"step-{step:06d}").is_dir()
    line = luthier("resume", folder, "--json").must(0, f"going on after step {step}").json
    assert line["status"] == "finished" and line["steps"] == STEPS
    same_run(folder, finished)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, recipe: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    with forked("train", recipe, "--run", folder, out=tmp_path / "said", pause=0.1) as child:
        # Between two checkpoints, so that a killed run has to repeat a step.
        wait_for_step(folder, 3, child)
        child.kill()
        said = child.communicate()
    assert child.returncode == -signal.SIGKILL, said
    assert luthier("run", "show", folder, "--json").json["state"] == "interrupted"
    luthier("resume", folder, "--json").must(0)
    same_run(folder, finished)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_a_terminated_run_saves_the_step_it_is_in_and_goes_on_twice(
    tmp_path: Path, recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = tmp_path / "run", Stepper.optim_step
    done = 0

    def terminated(self: Stepper, *, factor: float = 1.0) -> StepReport:
        nonlocal done
        done += 1
        if done in (3, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, factor=factor)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Stepper, "optim_step", terminated)
    for command, step in (("train", recipe, "--run", folder), 3), (("resume", folder), 5):
        luthier(*command).must(75, f"stopped by SIGTERM after step {step} of {STEPS}", f"luthier resume {folder}")
        assert (folder / "checkpoints" / f"step-{step:06d}").is_dir()
        assert luthier("run", "show", folder, "--json").json["state"] == "stopped"
        assert signal.getsignal(signal.SIGTERM) is handler
    luthier("resume", folder, "--json").must(0)
    same_run(folder, finished)


def test_a_run_killed_between_its_last_checkpoint_and_its_end_only_finishes(
    tmp_path: Path, recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("luthier.recipes.ending.save_result", fail)
        assert luthier("train", recipe, "--run", folder).code == 130
    assert not (folder / "adapter").exists()
    luthier("generate", folder, "--prompt", "x").must(2, "has no result yet", f"luthier resume {folder}")
    luthier("resume", folder, "--json").must(0)
    same_run(folder, finished)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Snapshot], bool]], None]:
    """`full_disk(when)`: the kernel lets no file grow far while a snapshot is written for which `when` says so."""

    def patch(when: Callable[[Snapshot], bool]) -> None:
        write, pause = CheckpointKeeper._write, 0.01

        def written(self: CheckpointKeeper, snapshot: Snapshot, best: bool) -> None:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if when(snapshot) else soft, hard))
            try:
                write(self, snapshot, best)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(CheckpointKeeper, "_write", written)
        monkeypatch.setattr(CheckpointKeeper.__init__, "__kwdefaults__", {"first_pause": pause})

    return patch


def test_a_full_disk_stops_no_training_and_is_told(
    tmp_path: Path, recipe: Path, finished: Path, full_disk: Callable[[Callable[[Snapshot], bool]], None]
) -> None:
    """Breaks when a save that fails ends a run that could go on, or is not tried again."""
    folder, tries = tmp_path / "run", 0

    def full(snapshot: Snapshot) -> bool:
        nonlocal tries
        tries += snapshot.step == 4
        return snapshot.step == 4 and tries < 3

    full_disk(full)
    told = luthier("train", recipe, "--run", folder, "--json").must(0, "was not saved", "File too large", "tried again")
    assert told.json["status"] == "finished"
    same_run(folder, finished)
    assert {event["step"] for event in events(folder) if event["kind"] == "save_failed"} == {4}


def test_a_disk_that_stays_full_harms_no_checkpoint_and_the_run_goes_on_once_there_is_space(
    tmp_path: Path, recipe: Path, finished: Path, full_disk: Callable[[Callable[[Snapshot], bool]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Breaks when the end of a run does not insist on its last state, or an older checkpoint is touched."""
    folder = tmp_path / "run"
    with monkeypatch.context():
        full_disk(lambda snapshot: snapshot.step >= 6)
        told = luthier("train", recipe, "--run", folder)
    told.must(74, "error[disk-full]", ".tmp-", "File too large", "run the same command again")
    steps = [event["step"] for event in events(folder) if event["kind"] == "step"]
    assert steps[-1] == STEPS
    found = tree(folder / "checkpoints")
    assert "step-000004/state.safetensors" in found and not [name for name in found if name.startswith(".tmp")]
    assert luthier("run", "show", folder, "--json").json["state"] == "failed"
    monkeypatch.undo()
    luthier("resume", folder, "--json").must(0)
    same_run(folder, finished)


def test_a_flipped_bit_in_the_newest_checkpoint_costs_its_steps_and_nothing_else(
    tmp_path: Path, recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    save = CheckpointKeeper.save

    def interrupted(self: CheckpointKeeper, state: LoopState, *, best: bool) -> bool:
        taken = save(self, state, best=best)
        if state.step == 6:
            self.finish()
            raise KeyboardInterrupt
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "save", interrupted)
        assert luthier("train", recipe, "--run", folder).code == 130
    path = folder / "checkpoints" / "step-000006" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert luthier("resume", folder, "--dry-run").code == 0
    said = "going on after step 4", "note: checkpoint step-000006 is set aside"
    luthier("resume", folder, "--json").must(0, *said)
    same_run(folder, finished)
    assert "step-000006 is set aside" in str(luthier("run", "show", folder, "--json").json["notices"])


def test_a_finished_run_is_only_shown_again(finished: Path) -> None:
    before = {name: data for name, data in tree(finished).items() if name != "run.lock"}
    line = luthier("resume", finished, "--json").must(0).json
    assert line["status"] == "finished" and line["steps"] == STEPS
    assert {name: data for name, data in tree(finished).items() if name != "run.lock"} == before


def test_what_has_changed_since_is_named_and_refused(
    tmp_path: Path, recipe: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own = tmp_path / "run", Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    lines = own.read_text("utf-8")
    save = CheckpointKeeper.save

    def interrupted(self: CheckpointKeeper, state: LoopState, *, best: bool) -> bool:
        save(self, state, best=best)
        self.finish()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "save", interrupted)
        assert luthier("train", recipe, "--run", folder, "--set", f"data.train={own}").code == 130
    own.write_text(lines.replace("red", "gold"), encoding="utf-8")
    parts = "error[drift]", "cannot go on from step-000002 exactly", "data:", "--accept-drift"
    luthier("resume", folder).must(77, *parts)
    luthier("resume", folder, "--accept-drift", "--json").must(0)


@pytest.mark.parametrize("make", [False, True], ids=["missing", "no run"])
def test_a_folder_that_is_no_run_is_not_resumed(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "folder"
    if make:
        folder.mkdir()
    luthier("resume", folder).must(2, f"{folder} is no run", "luthier run list")
    assert list(tmp_path.iterdir()) == ([folder] if make else []) and tree(folder) == {}


def test_a_run_killed_after_its_patience_ran_out_does_no_further_step(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = ("evaluation.patience=1", "optimizer.learning_rate=1e-12", "evaluation.every=1", "checkpoint.every=1")
    sets = [part for item in knobs for part in ("--set", item)]
    whole = luthier("train", recipe, "--run", tmp_path / "whole", *sets, "--json").must(0).json
    assert whole["status"] == "early-stopped"

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("luthier.recipes.ending.save_result", fail)
        assert luthier("train", recipe, "--run", tmp_path / "run", *sets).code == 130
    line = luthier("resume", tmp_path / "run", "--json").must(0).json
    assert (line["status"], line["steps"], line["loss"]) == (whole["status"], whole["steps"], whole["loss"])
    assert step_events(tmp_path / "run") == step_events(tmp_path / "whole")


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_result_that_finds_no_space_is_written_by_resume(
    adapter: str, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def on_a_full_disk(*arguments: Any, **named: Any) -> Path:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
        try:
            return save_result(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr("luthier.recipes.ending.save_result", on_a_full_disk)
        told = luthier("train", recipe, "--run", folder, "--set", f"adapter.method={adapter}")
        told.must(74, "error[disk-full]", "File too large", "luthier resume")
    line = luthier("resume", folder, "--json").must(0).json
    assert line["steps"] == STEPS
    assert luthier("eval", folder, "--json").json["tuned"]["loss"] == pytest.approx(line["loss"]["eval"], abs=1e-6)
