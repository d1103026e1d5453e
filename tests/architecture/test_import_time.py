"""`import luthier` and `luthier --help` answer at once and without torch, and so do commands that run no model."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.architecture.source import SOURCE

MOST_SECONDS = 0.2
COUNTING, COUNTING_SECONDS = "for number in range(10**6): number + 1", 0.05
"""What the limit is measured with: a machine that takes longer for this may take longer for the command, as much."""
TRIALS = 5
HEAVY = ("torch", "transformers", "tokenizers", "peft", "pyarrow", "numpy", "jinja2")
REPORT = f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)"
FACADE = f"import json, sys; import luthier; {REPORT}"
COMMAND = f"""
import json, sys
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
HELP = f"import sys; sys.argv = ['luthier', '--help']\n{COMMAND}"
LIGHT = ("run list", "data show rows.jsonl --rows 1", "data stats rows.jsonl", "data check rows.jsonl --json",
         "describe", "describe lora", "lint adapter")  # fmt: skip
"""Commands that look at files only."""


@pytest.mark.parametrize("command", LIGHT)
def test_commands_that_run_no_model_do_without_torch(command: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is it?", "completion": "A cow."}\n', "utf-8")
    (folder := tmp_path / "adapter").mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', "utf-8")
    name = "base_model.model.layers.0.q_proj.lora_A.weight"
    save_file({name: np.zeros((1, 4), np.float32)}, folder / "adapter_model.safetensors")
    said = seconds(f"import sys; sys.argv = {['luthier', *command.split()]!r}\n{COMMAND}", cwd=tmp_path)[2]
    assert "torch" not in json.loads(said.strip().splitlines()[-1])


@pytest.mark.parametrize("program", [FACADE, HELP], ids=["import luthier", "luthier --help"])
def test_it_starts_at_once_and_without_heavy_modules(program: str) -> None:
    empty, counted, runs = [], [], []
    for _ in range(TRIALS):
        empty.append(seconds("pass"))
        counted.append(seconds(COUNTING))
        runs.append(seconds(program))
    heavy = json.loads(runs[-1][2].strip().splitlines()[-1])
    assert not heavy, f"imports {', '.join(heavy)}; import it inside the function that needs it"
    # Other work on the machine only ever adds: to the wall time by taking turns, to both by sharing caches. So the best
    # of several counts, and where turns were taken, the processor time.
    extra, counting = (
        min(min(run[kind] for run in some) - min(run[kind] for run in empty) for kind in (0, 1))
        for some in (runs, counted)
    )
    most = MOST_SECONDS * max(1.0, counting / COUNTING_SECONDS)
    assert extra < most, f"takes {1000 * extra:.0f} ms more than python itself (limit {1000 * most:.0f} ms)"


def seconds(program: str, cwd: Path | None = None) -> tuple[float, float, str]:
    """Wall and processor time of a fresh interpreter that runs `program`, and what it said on stderr."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100"},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - began
    assert done.returncode == 0, f"exit {done.returncode}:\n{done.stderr[-2000:]}"
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime, done.stderr
