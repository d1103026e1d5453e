"""`import luthier` and `luthier --help` answer at once and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.architecture.source import SOURCE

MOST_SECONDS = 0.3
TRIALS = 5
HEAVY = ("torch", "transformers", "peft", "pyarrow", "numpy.linalg")
REPORT = f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)"
FACADE = f"import json, sys; import luthier; {REPORT}"
HELP = f"""
import json, sys
sys.argv = ["luthier", "--help"]
from luthier.cli.main import main
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
else:
    code = 0
{REPORT}
sys.exit(code)
"""


@pytest.mark.parametrize("program", [FACADE, HELP], ids=["import luthier", "luthier --help"])
def test_it_starts_at_once_and_without_heavy_modules(program: str) -> None:
    empty, runs = [], []
    # Best of several: other work on the machine only ever adds to a time.
    for _ in range(TRIALS):
        empty.append(seconds("pass")[0])
        runs.append(seconds(program))
    heavy = json.loads(runs[-1][1].strip().splitlines()[-1])
    assert not heavy, f"imports {', '.join(heavy)}; import it inside the function that needs it"
    extra = min(taken for taken, _ in runs) - min(empty)
    assert extra < MOST_SECONDS, f"takes {extra * 1000:.0f} ms more than python itself (limit {MOST_SECONDS * 1000:.0f})"


def seconds(program: str) -> tuple[float, str]:
    """Wall time of a fresh interpreter that runs `program`, and what it said on stderr."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - began
    assert done.returncode == 0, f"exit {done.returncode}:\n{done.stderr[-2000:]}"
    return taken, done.stderr
