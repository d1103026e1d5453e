"""Promises do not depend on `assert`: they hold under `python -O`, which removes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.commands import environ

HOME = Path(__file__).resolve().parents[2]


def test_damage_bad_numbers_and_pickles_are_refused_under_python_o(tmp_path: Path) -> None:
    """Breaks when a check that a promise rests on is an `assert`."""
    command = [sys.executable, "-O", "-m", "tests.faults.optimized", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=HOME, env=environ(), check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said.pop("optimize") == 1
    assert said.pop("pickle") == "unsafe-artifact"
    for name, (passed, tried, verdicts, failures) in said.items():
        assert 0 < tried == passed, f"{name}: {verdicts} {failures}"
    assert said["flips"][2].get("found") and said["flips"][2].get("fell back")
