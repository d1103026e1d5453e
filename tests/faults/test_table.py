"""`scripts/faults.py`: its list of campaigns is whole, and its table says what came of them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.faults.campaign import CLEAN, Tally

HOME = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("faults_script", HOME / "scripts" / "faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def row(verdicts: dict[str, int], found: dict[str, int], *, note: str = "") -> dict[str, Any]:
    """A row as a campaign and its negative control make it."""
    rows = []
    for counted in (verdicts, found):
        tally = Tally("a | fault", "a promise", seed=7, control="a broken variant")
        for verdict, times in counted.items():
            tally.count(verdict, f"why it was {verdict}", times=times)
        tally.notes += [note] if note else []
        rows.append(dataclasses.asdict(tally.result()))
    whole: dict[str, Any] = json.loads(json.dumps({**rows[0], "broken": rows[1], "commit": "0123abc"}))
    return whole


def test_every_entry_has_a_campaign_and_a_negative_control(script: ModuleType) -> None:
    """Breaks when a campaign is renamed, or cannot be shown to fail."""
    names = [entry.name for entry in script.ENTRIES]
    assert len(set(names)) == len(names)
    for entry in script.ENTRIES:
        module = importlib.import_module(f"tests.faults.{entry.module}")
        run, control = getattr(module, entry.run), getattr(module, entry.control)
        assert list(inspect.signature(run).parameters)[:3] == ["count", "seed", "folder"], entry
        assert list(inspect.signature(control).parameters) == ["seed", "folder"], entry
        assert run is not control and entry.count > 0


def test_every_campaign_is_in_the_list(script: ModuleType) -> None:
    """Breaks when a campaign is written and never run."""
    listed = {(entry.module, entry.run) for entry in script.ENTRIES}
    for path in Path(__file__).parent.glob("*.py"):
        module = importlib.import_module(f"tests.faults.{path.stem}") if not path.stem.startswith("test_") else None
        for name, function in vars(module).items() if module else ():
            own = inspect.isfunction(function) and function.__module__ == f"tests.faults.{path.stem}"
            if own and name.startswith("run") and str(inspect.signature(function).return_annotation) == "Campaign":
                assert (path.stem, name) in listed, f"{path.stem}.{name} is in no row"


def test_the_full_counts_are_those_of_the_promise(script: ModuleType) -> None:
    """Breaks when a count is made smaller than what the docs say was tried."""
    counts = {entry.name: entry.count for entry in script.ENTRIES}
    least = {
        "kills": 1000, "power-cuts": 200, "flips": 1000, "full-disks": 50, "sigterm": 200, "bad-numbers": 200,
        "data-mutants": 100_000, "header-mutants": 1_000_000, "orphans": 200,
    }  # fmt: skip
    assert {name: counts[name] for name, least_count in least.items() if counts[name] < least_count} == {}


def test_a_row_tells_what_came_of_its_campaign(script: ModuleType) -> None:
    """Breaks when a failure, a skip or a negative control without findings looks like a kept promise."""
    kept = row({CLEAN: 1200}, {CLEAN: 1, "leak": 2}, note="it was quick")
    broken = row({CLEAN: 3, "hang": 1}, {"leak": 2})
    blind = row({CLEAN: 3}, {CLEAN: 2})
    told = script.table([kept, broken, blind, {"fault": "x", "skipped": "no root"}, {"fault": "y", "broke": "died"}])
    lines = told.splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1, told
    assert r"| a \| fault | a promise | 1,200 / 1,200 |" in lines[2]
    assert "2 of 3 found" in lines[2] and "3 / 4" in lines[3] and "1 hang" in lines[3]
    assert "0 of 2 found" in lines[4] and "no root" in lines[5] and "died" in lines[6]
    verdicts = [script._verdict(each) for each in (kept, broken, blind, {"skipped": "no root"}, {"broke": "died"})]
    assert verdicts[0] == "kept" and "kept" not in verdicts[1:]
    assert script.remarks([kept, broken]) == ["- a | fault: it was quick."]


def test_the_page_keeps_its_words_and_gets_the_table(script: ModuleType) -> None:
    """Breaks when writing the table eats what stands around it, or the old one stays."""
    page = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    once = script.written(page, [row({CLEAN: 5}, {"leak": 1})])
    assert once.startswith(f"before\n{script.BEGIN}\n") and once.endswith(f"{script.END}\nafter\n")
    assert "5 / 5" in once and "old" not in once and "0123abc" in once
    other = {**row({CLEAN: 8}, {"leak": 1}, note="slowly"), "fault": "another", "commit": "4567def"}
    both = script.written(once, [other])
    again = script.written(both, [row({CLEAN: 6}, {"leak": 1}, note="quick"), {**other, "notes": ["faster"]}])
    assert "5 / 5" in both and "8 / 8" in both and "another: slowly" in both
    assert "6 / 6" in again and "5 / 5" not in again and again.count(script.BEGIN) == again.count(script.END) == 1
    assert again.index("6 / 6") < again.index("8 / 8") and "faster" in again and "slowly" not in again
    real = script.PAGE.read_text("utf-8")
    assert real.count(script.BEGIN) == real.count(script.END) == 1


def test_a_campaign_of_its_own_process_answers(script: ModuleType, tmp_path: Path) -> None:
    """Breaks when the script and a campaign do not go together any more."""
    entry = next(entry for entry in script.ENTRIES if entry.name == "store-locks")
    answer = script.apart(entry, count=1, seed=3, folder=tmp_path)
    assert script._verdict(answer) == "kept" and answer["tried"] >= 1 and answer["seed"] == 3
