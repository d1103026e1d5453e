"""The check of a GPU, without one: its steps can be begun, fit into their time, and are told however they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from luthier.data.sample import Sample
from luthier.recipes.schemas.files import load_recipe
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from tests.benchmarks.lines import module

ROOT = Path(__file__).parents[2]


def test_every_step_is_there_and_names_what_exists(tmp_path: Path) -> None:
    """Breaks when a step names a file, a workload or a system that is gone, or gets more time than there is."""
    check, workloads = module("gpu_check"), module("workloads")
    todo = check.steps(tmp_path)
    assert len({step.name for step in todo}) == len(todo)
    assert all(0 < step.limit <= check.SECONDS for step in todo)
    assert sum(step.limit for step in todo[:-1]) <= check.SECONDS, "all but the largest fit whatever happens"
    for step in todo:
        files = [word for word in step.command if word.startswith(str(ROOT)) and word.endswith(".py")]
        assert all(Path(file).is_file() for file in files), files
        if "--workloads" in step.command:
            name = step.command[step.command.index("--workloads") + 1]
            assert workloads.WORKLOADS[name].device == "cuda"
            sft = module("sft")
            words = list(step.command[2:])
            assert sft.parse(words).device == "cuda", "its command line is understood"


def test_the_recipes_of_the_steps_are_valid(tmp_path: Path) -> None:
    """Breaks when a command of a step would be refused before it looks at a device."""
    check = module("gpu_check")
    check.write_rows(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "gpu-rows.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 32 and all(set(row) == {"text"} for row in rows)
    recipe = tmp_path / "gpu-runs" / "one.yaml"
    recipe.write_text(f"model: seedling\ndata: {tmp_path / 'gpu-rows.jsonl'}\nobjective: language_model\n", "utf-8")
    for step in check.steps(tmp_path):
        words = step.command
        sets = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        if "train" in words:
            loaded = load_recipe(recipe, overrides=sets).recipe
            assert loaded.device == "cuda" and loaded.budget.steps == 8
            assert loaded.batch.offload == ("both" if "all weights" in step.name else "none")


def test_what_fails_or_takes_too_long_ends_nothing(tmp_path: Path) -> None:
    """Breaks when a step that hangs takes the time of all others, or a failure is not told."""
    check = module("gpu_check")

    def python(program: str, limit: float = 60) -> object:
        return check.Step(program, (sys.executable, "-c", program), limit)

    said: list[str] = []
    todo = [python("print('well')"), python("raise SystemExit(3)"), python("import time; time.sleep(60)", 0.5)]
    found = check.check(todo, 1000, tell=said.append)
    assert [each.code for each in found] == [0, 3, None]
    assert found[0].said == "well\n" and "took longer" in found[2].said
    assert [line.split()[0] for line in said] == ["fine", "FAILED", "FAILED"]
    late = check.check(todo[:1], 5, tell=said.append)
    assert late[0].code is None and late[0].said.startswith("not begun")
    kept = check.evidence(found, [{"system": "luthier"}])
    assert json.loads(json.dumps(kept))["good"] is False and len(kept["steps"]) == 3 and kept["lines"]


def test_without_a_gpu_it_only_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check = module("gpu_check")
    assert check.main(["--list", "--home", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(check.steps(tmp_path))
    if not check.torch.cuda.is_available():
        with pytest.raises(SystemExit):
            check.main(["--home", str(tmp_path)])
        assert "there is no GPU here" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the kernels of the rewards, by themselves
LOG = """12 openat(AT_FDCWD, "/proc/self/task/13/comm", O_RDWR) = -1 ENOENT (No such file or directory)
12 openat(AT_FDCWD, "/proc/self/task/13/comm", O_RDWR) = 4
12 openat(AT_FDCWD, "/usr/lib/libcuda.so.1", O_RDONLY) = 5
12 io_uring_setup(1, {}) = -1 EPERM (Operation not permitted)
13 stat("/sys/module/nvidia", {st_mode=S_IFDIR|0755, st_size=0, ...}) = 0
13 read(5, "x", 1) = 1
"""


def test_what_cuda_wanted_is_read_from_a_trace() -> None:
    """Breaks when a call that the walls refuse, or a file of the machine, is not told."""
    found = module("gpu_kernels").looked_through(LOG)
    assert found == {"calls": {"io_uring_setup": 1}, "files": {"/proc/self/task/N/comm": 1, "/sys/module/nvidia": 0}}


class Answering(Reward):
    """Gives what is written in an answer."""

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        said = samples[0].answer
        return [RewardError("the GPU is gone") if said == "gone" else Score(float(said), {"right": 1.0}, "so")]


def test_no_verdict_is_no_value_and_ends_nothing() -> None:
    """Breaks when an operator without a verdict ends the check, or looks as if it had got 0."""
    samples = {said: Sample(prompt=(), answer=said) for said in ("1.0", "gone", "0.3")}
    found = module("gpu_kernels").scored(Answering(), samples, Tools(), 2)
    assert [each["value"] for each in found.values()] == [1.0, None, 0.3] and "gone" in found["gone"]["reason"]


def test_kernels_are_not_begun_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = module("gpu_kernels")
    if not kernels.gpus_for("cuda"):
        with pytest.raises(SystemExit):
            kernels.main(["--home", str(tmp_path)])
        assert "there is no GPU of NVIDIA here" in capsys.readouterr().err


def test_the_evidence_of_kernels_says_where_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when walls that keep CUDA out look like kernels that are wrong, or the file lacks why."""
    kernels = module("gpu_kernels")
    monkeypatch.setattr(kernels, "gpus_for", lambda device: ("/dev/nvidia0",))
    monkeypatch.setattr(kernels, "without_walls", lambda: "")
    monkeypatch.setattr(kernels, "behind_walls", lambda: {"walls": [], "passed_over": [], "why": "CUDA error 304"})
    monkeypatch.setattr(kernels, "traced", lambda: {"calls": {"memfd_create": 1}})
    monkeypatch.setattr(kernels, "version", lambda name: "1")
    assert kernels.main(["--home", str(tmp_path)]) == 1
    kept = json.loads((tmp_path / "gpu-kernels.json").read_text("utf-8"))
    assert kept["good"] is False and kept["behind walls"]["why"] == "CUDA error 304" and kept["traced"]["calls"]
    assert kept["date"] and "kernel" not in kept
