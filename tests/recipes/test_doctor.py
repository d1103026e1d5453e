"""What the machine offers, and an exit code when something needed is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.core.errors import SandboxUnavailableError
from luthier.recipes import doctor
from luthier.sandbox.sandbox import open_sandbox
from tests.cli.commands import luthier, tree


@pytest.fixture
def seedling(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the place of the seedling."""
    monkeypatch.setattr(doctor, "resolve_source", lambda _: str(copied))
    return copied


def test_all_that_is_needed_is_there(seedling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    checks = luthier("doctor", "--json").must(0).json["checks"]
    found = {check["what"]: check for check in checks}
    assert {*doctor.NEEDED, "GPU", "CPU", "memory", "cache", "runs", "seedling"} <= set(found)
    assert all(set(check) == {"what", "state", "detail"} for check in checks)
    assert all(found[name]["state"] == "fine" and found[name]["detail"] for name in doctor.NEEDED)
    shown = luthier("doctor").must(0)
    assert shown.err == "" and "torch" in shown.out and "\x1b" not in shown.out
    assert tree(tmp_path) == before


def test_what_is_missing_is_marked_and_ends_with_69(seedling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (seedling / "model.safetensors").unlink()
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package"))
    told = luthier("doctor").must(69, "error[missing]", "no-such-package, seedling", "pip install")
    assert "!! no-such-package" in told.out and "ok torch" in told.out
    assert "grow_seedling.py" in told.err


def test_the_tier_of_the_sandbox_is_told(seedling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when doctor says that programs can be run where nothing may be run, or stops because of it."""
    found = {check["what"]: check for check in luthier("doctor", "--json").must(0).json["checks"]}["sandbox"]
    try:
        with open_sandbox(workers=1) as sandbox:
            assert found["state"] == "fine" and found["detail"].startswith(f"{sandbox.tier.value}, ")
    except SandboxUnavailableError:
        assert found["state"] == "note"

    def none(**_: object) -> object:
        raise SandboxUnavailableError("no walls stand here", allowed="some that do")

    monkeypatch.setattr(doctor, "open_sandbox", none)
    said = luthier("doctor").must(0).out
    assert "none, so nothing that a model wrote can be run: no walls stand here" in said


def test_lines_stay_whole_where_nobody_sees_a_width(seedling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    why = "float32, because this is a sentence of more than thirty characters"
    monkeypatch.setattr(doctor, "choose_precision", lambda *_: (torch.float32, why))
    said = luthier("doctor").must(0).out
    assert why in said and "float32 products" in said and "FLOP/s, copies" in said


def test_a_folder_that_may_not_be_written_is_named(
    seedling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    luthier("doctor").must(69, "cache, runs")
