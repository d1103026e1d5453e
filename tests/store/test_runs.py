"""A run directory: one process at a time, nothing overwritten, a log that survives anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from luthier.core.errors import CorruptError, RefusedError, RunLockedError, StorageError
from luthier.core.events import Event
from luthier.store.environment import git_state, receipt
from luthier.store.lines import JsonLines
from luthier.store.listing import list_runs, summary
from luthier.store.lock import Holder, holder
from luthier.store.runs import RunDirectory, is_run
from tests.store.made import created


def test_a_run_is_created_opened_and_told(tmp_path: Path) -> None:
    run = created(tmp_path / "runs/a")
    assert is_run(run.folder) and run.status().state == "new"
    recipe = {"model": "seedling", "adapter": {"method": "lora", "rank": 4}, "optimizer": {"learning_rate": 1e-5}}
    run.write_recipe(recipe)
    run.write_plan({"steps": 3})
    run.write_environment(receipt(["luthier", "train", "my file.yaml"], more={"torch_threads": 1}))
    with run.lock():
        run.write_status("running")
        run.record(Event("evaluation", {"loss": 2.0}, step=0))
        run.record(Event("step", {"loss": float("nan")}, step=1))
        run.record(Event("evaluation", {"loss": 1.0}, step=1))
        run.record_sample({"step": 1, "text": "é\ud800"})
        assert run.status().state == "running"
    assert run.status().state == "interrupted"
    run.write_status("finished", values={"eval_loss": 1.0})
    again = RunDirectory.open(run.folder)
    assert again.run_id == run.run_id
    assert again.read_recipe() == recipe
    assert again.status().values == {"eval_loss": 1.0}
    assert again.read_json("environment.json")["command"] == "luthier train 'my file.yaml'"
    assert [event["kind"] for event in again.events.read()] == ["evaluation", "step", "evaluation"]
    row = summary(run.folder)
    assert (row.state, row.model, row.adapter, row.step) == ("finished", "seedling", "lora", 1)
    assert (row.loss_before, row.loss_after) == (2.0, 1.0)
    assert row.loss != row.loss


def test_progress_that_comes_late_does_not_bring_a_run_back(tmp_path: Path) -> None:
    """Breaks when the thread that saves and the end of a run write the status at once, or in the wrong order."""
    run = created(tmp_path / "a")
    run.write_progress({"step": 1})
    assert run.status().state == "new"
    run.write_status("running")
    with run.lock(), ThreadPoolExecutor(2) as threads:
        done = [threads.submit(run.write_progress, {"step": step}) for step in range(60)]
        for each in done:
            each.result()
        assert run.status().values["step"] in range(60)
    run.write_status("stopped", reason="SIGINT")
    run.write_progress({"step": 99})
    assert run.status().state == "stopped" and run.status().values == {}


def test_foreign_folders_and_other_runs_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("x")
    with pytest.raises(RefusedError, match="is not empty and holds no run; nothing was changed"):
        created(tmp_path / "foreign", overwrite=True)
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RefusedError, match="is no folder"):
        created(tmp_path / "file")
    run = created(tmp_path / "a")
    with pytest.raises(RefusedError, match=r"holds a run \(new\).*luthier resume"):
        created(run.folder)
    run.write_status("finished")
    with pytest.raises(RefusedError) as caught:
        created(run.folder)
    assert "resume" not in str(caught.value) and caught.value.exit_code == 77
    with pytest.raises(StorageError, match="is no run"):
        RunDirectory.open(tmp_path / "foreign")


def test_overwrite_moves_the_old_run_aside(tmp_path: Path) -> None:
    first = created(tmp_path / "a")
    second = created(tmp_path / "a", overwrite=True)
    third = created(tmp_path / "a", overwrite=True)
    assert RunDirectory.open(tmp_path / "a.old-1").run_id == first.run_id
    assert RunDirectory.open(tmp_path / "a.old-2").run_id == second.run_id
    assert RunDirectory.open(tmp_path / "a").run_id == third.run_id


def test_a_second_process_is_refused_at_once_and_told_who(tmp_path: Path) -> None:
    run = created(tmp_path / "a")
    program = textwrap.dedent("""
        import sys; from pathlib import Path
        from luthier.core.errors import RunLockedError; from luthier.store.runs import RunDirectory
        run = RunDirectory.open(Path(sys.argv[1]))
        try:
            with run.lock(): print("mine")
        except RunLockedError as error: print(error)
    """)
    with run.lock():
        told = subprocess.run(
            [sys.executable, "-c", program, str(run.folder)], capture_output=True, text=True, check=True
        ).stdout
        began = time.monotonic()
        with pytest.raises(RunLockedError, match=f"is used by pid {os.getpid()} on "), run.lock():
            pass
        assert time.monotonic() - began < 1
        with pytest.raises(RunLockedError):
            created(run.folder, overwrite=True)
        assert holder(run.folder / "run.lock") is not None
    assert f"{run.folder} is used by pid {os.getpid()} on " in told and "nothing was changed" in told
    assert "mine" in subprocess.run([sys.executable, "-c", program, str(run.folder)], capture_output=True, text=True,
                                    check=True).stdout  # fmt: skip


def test_the_lock_of_a_dead_process_is_nobodys(tmp_path: Path) -> None:
    run = created(tmp_path / "a")
    program = (
        "import os, sys; from pathlib import Path; from luthier.store.runs import RunDirectory\n"
        "run = RunDirectory.open(Path(sys.argv[1]))\n"
        "with run.lock():\n    run.write_status('running')\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(run.folder)], check=False)
    assert run.status().state == "interrupted"
    with run.lock():
        assert run.status().state == "running"


def test_a_process_of_an_earlier_boot_is_dead_and_one_elsewhere_may_live() -> None:
    import socket

    assert not Holder(pid=os.getpid(), host=socket.gethostname(), boot="earlier", since="").is_alive
    assert Holder(pid=1, host="elsewhere", boot="", since="").is_alive


def test_lines_survive_a_torn_end_and_cut_back_to_a_cursor(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "e.jsonl")
    assert list(lines.read()) == [] and lines.length == 0 and lines.tail() == []
    for number in range(3):
        lines.append({"n": number})
    cursor = lines.length
    lines.append({"n": 3})
    lines.sync()
    lines.close()
    with lines.path.open("ab") as file:
        file.write(b'{"n": 4')
    assert [record["n"] for record in lines.read()] == [0, 1, 2, 3]
    lines.append({"n": 5})
    assert [record["n"] for record in lines.read()] == [0, 1, 2, 3, 5]
    assert [record["n"] for record in lines.tail(20)] == [3, 5]
    assert lines.truncate(cursor) == 0
    assert [record["n"] for record in lines.read()] == [0, 1, 2]
    assert lines.truncate(cursor + 7) == 7
    lines.append({"n": 6})
    lines.close()
    assert lines.path.read_bytes().endswith(b'{"n":2}\n{"n":6}\n')


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "e.jsonl")
    lines.path.write_bytes(b'{"n":1}\n{"n":\n{"n":2}\n')
    with pytest.raises(CorruptError, match=r"e.jsonl:2"):
        list(lines.read())
    lines.path.write_bytes(b"[1]\n")
    with pytest.raises(CorruptError, match="a list"):
        list(lines.read())
    lines.path.write_bytes(b"x" * 200_000)
    lines.append({"n": 1})
    lines.close()
    assert lines.path.read_bytes() == b'{"n":1}\n'


def test_cursors_and_rewinding(tmp_path: Path) -> None:
    run = created(tmp_path / "a")
    run.record(Event("step", {}, step=1))
    run.sync_logs()
    cursors = run.events.length, run.samples.length
    run.record(Event("step", {}, step=2))
    run.record_sample({"x": 1})
    assert run.rewind(*cursors) == []
    assert [event["step"] for event in run.events.read()] == [1]
    assert run.samples.length == 0
    assert "lacks its last 10 bytes" in run.rewind(cursors[0] + 10, 0)[0]


def test_the_list_shows_every_run_even_broken_ones(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    good, bad, odd = (created(tmp_path / name) for name in ("good", "bad", "odd"))
    good.write_status("failed", reason="loss is NaN")
    (bad.folder / "run.json").write_text("{")
    (odd.folder / "status.json").write_text('{"state": "dancing"}')
    (tmp_path / "foreign").mkdir()
    rows = {row.name: row for row in list_runs(tmp_path)}
    assert sorted(rows) == ["bad", "good", "odd"]
    assert (rows["good"].state, rows["good"].problem) == ("failed", "loss is NaN")
    assert rows["bad"].state == rows["odd"].state == "unreadable"
    assert "dancing" in rows["odd"].problem
    json.dumps([row.as_dict() for row in rows.values()])


def test_the_receipt_says_what_a_run_was_made_with(tmp_path: Path) -> None:
    now = receipt(["luthier"])
    assert now["packages"]["torch"] and now["machine"]["memory_bytes"] > 0
    assert git_state(tmp_path) is None


def test_a_recipe_that_is_no_text_is_damage_with_a_name(tmp_path: Path) -> None:
    """Breaks when a flipped bit in recipe.yaml ends in the exception of a decoder."""
    run = created(tmp_path / "run")
    (run.folder / "recipe.yaml").write_bytes(b"model: \xafeedling\n")
    with pytest.raises(CorruptError, match=r"recipe\.yaml is not UTF-8 .*byte 7"):
        run.read_recipe()
