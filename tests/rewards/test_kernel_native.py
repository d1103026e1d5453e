"""Kernels natively, as far as a machine without a GPU can tell: compiled for chips, and launched by Triton behind the
walls, through a driver that launches nothing (cuda_stand_in.py). What is not seen here is what a kernel computes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import SandboxUnavailableError
from luthier.data.kernel_programs import MAKES, kernel_form
from luthier.data.sample import Sample
from luthier.rewards import RewardError, Tools
from luthier.rewards.kernel import Kernel, _Place, _wrapped
from luthier.sandbox.program import Call, Limits, Outcome, Program, Returned, Status
from tests.architecture.source import REPOSITORY
from tests.rewards.cuda_stand_in import COMPILES, PRELUDE
from tests.rewards.kernels import SOLUTIONS
from tests.rewards.samples import sandbox_tools, score
from tests.rewards.test_kernel import GOOD, answer
from tests.sandbox.conftest import LENT, strongest

NO_TRITON = "triton is not installed: no wheel for this platform"
TUNED = SOLUTIONS["leaky_relu"].replace(
    "@triton.jit",
    "@triton.autotune([triton.Config({}, num_warps=1), triton.Config({}, num_warps=2)], key=['n'], "
    "reset_to_zero=['out'], restore_value=['out'])\n@triton.jit",
)
ROOM = Limits(seconds=120, cpu_seconds=120, memory_bytes=2048 << 20, processes=64)


@pytest.mark.parametrize("names", [
    "softmax",
    pytest.param(",".join(SOLUTIONS), marks=pytest.mark.slow),
])  # fmt: skip
def test_every_operator_is_a_kernel_for_chips(names: str, tmp_path: Path) -> None:
    """Breaks when an answer that is right in the interpreter is no program for a GPU of kind 8.0, 9.0 or 10.0: with the
    inputs that are drawn and those that are timed, and with its body taken out.
    """
    pytest.importorskip("triton", reason=NO_TRITON)
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [f"{chip}:{name}" for chip in (80, 90, 100) for name in names.split(",")]


@pytest.fixture(scope="module")
def lending() -> Any:
    """Walls with a device lent that is no GPU, and modules as the reward has them there."""
    pytest.importorskip("triton", reason=NO_TRITON)
    if not Path(LENT).exists() or shutil.which("gcc", path="/usr/bin:/bin") is None:
        pytest.skip(f"there is no {LENT}, or no gcc in /usr")
    with strongest(ROOM, devices=[LENT], preload=("torch", "torch.overrides", "triton", "triton.language")) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", ["layer_norm", "tuned"])
def test_triton_launches_behind_the_walls(name: str, lending: Any) -> None:
    """Breaks when Triton's C module, ptxas or the cache do not work there, or the guard refuses what Triton asks."""
    program = TUNED if name == "tuned" else SOLUTIONS[name]
    place = _Place("cuda", lending.run_all)
    wrapped = _wrapped(program, "leaky_relu" if name == "tuned" else name, 7, place, free=False)
    counted = f"{wrapped}\ndef launches():\n    return library.launches()\n".replace('device="cuda"', 'device="cpu"')
    calls = (Call("call_7", ([[1.0, -2.0], [3.0, 4.0]],)), Call("launches"))
    outcome = lending.run(Program(PRELUDE + counted, calls))
    assert outcome.status is Status.ENDED, outcome
    made, launched = outcome.returned
    # Nothing was launched, so memory is as it was: poisoned, or zero where the autotuner has reset it.
    assert made.error is None and made.value[1] == "torch.float32", made
    assert launched.value == 1 if name == "layer_norm" else launched.value > 2


def test_a_race_of_kernels_is_run_behind_the_walls(lending: Any) -> None:
    """Breaks when kernels of a program that is no file are not compiled, or events and reserved memory do not fit."""
    text = files("luthier.kernels").joinpath("race.py").read_text("utf-8")
    events = "race = Race(CudaStopwatch(Event, Event.record, Event.elapsed_time, print, print), [[4, 64]])\n"
    calls = (Call("race.enter", ("softmax", SOLUTIONS["softmax"], list(MAKES))),
             *(each for _ in range(2) for each in (Call("race.draw", ([1, 2],)), Call("race.timed"))),
             Call("race.values", ([0.0],)))  # fmt: skip
    source = f"{text}\n{PRELUDE}\nCudaStopwatch.device = 'cpu'\n{events}"
    outcome = lending.run(Program(source, calls))
    assert [each.error for each in outcome.returned] == [None] * len(calls), outcome
    assert outcome.returned[4].value == [pytest.approx(1e-3)] * 2
    assert [each[:2] for each in outcome.returned[-1].value] == [["torch.float32", [4, 64]]] * 4


def test_an_answer_that_is_tuned_is_right_in_the_interpreter_too() -> None:
    """Breaks when Triton's autotuner wants a GPU to choose with: an honest answer would get nothing."""
    pytest.importorskip("triton", reason=NO_TRITON)
    assert kernel_form(TUNED, "leaky_relu").share == 1.0
    found = score("kernel", answer("leaky_relu", TUNED), sandbox_tools())
    assert found.value == pytest.approx(1.0), found


# --------------------------------------------------------------------------------------------- what fails on a GPU
class Gpu:
    """A sandbox whose reference and answers fail on the GPU, and whose plainest kernel runs."""

    def __init__(self, told: str) -> None:
        self.told = told

    def run_all(self, programs: list[Program]) -> list[Outcome]:
        return [self.run(program) for program in programs]

    def run(self, program: Program) -> Outcome:
        name = program.calls[0].function
        if name == "draw":
            return Outcome(Status.ENDED, returned=(Returned([[[1.0]]]),))
        if name == "proof":
            return Outcome(Status.ENDED, returned=(Returned([1.0]),))
        return Outcome(Status.ENDED, returned=(Returned(None, self.told, "RuntimeError"),))


def on_a_gpu(told: str, monkeypatch: pytest.MonkeyPatch, one: Sample = GOOD) -> tuple[Any, list[dict[str, Any]]]:
    monkeypatch.setattr("luthier.rewards.kernel.gpus_for", lambda device: (LENT,))
    pytest.importorskip("triton", reason=NO_TRITON)
    opened: list[dict[str, Any]] = []

    def lend(limits: Limits, **more: Any) -> Gpu:
        opened.append({"limits": limits, **more})
        return Gpu(told)

    return Kernel().score([one], Tools(sandbox=lend))[0], opened  # type: ignore[arg-type]


def test_a_gpu_without_room_is_no_fault_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a trainer that fills the GPU ends a run with an error about its data, or is scored as 0."""
    found, _ = on_a_gpu("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", monkeypatch)
    assert isinstance(found, RewardError) and found.again and "no room" in str(found) and "leave it some" in str(found)


def test_a_gpu_is_given_time_to_start_and_products_are_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the start of CUDA is taken from the time of an answer, or tf32 makes right kernels wrong."""
    _, [opened] = on_a_gpu("OutOfMemoryError: CUDA out of memory", monkeypatch)
    assert opened["limits"].seconds == opened["limits"].cpu_seconds == Kernel().seconds + 60
    assert opened["devices"] == (LENT,) and dict(opened["environment"]) == {"TRITON_F32_DEFAULT": "ieee"}


def test_where_a_gpu_cannot_be_lent_the_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a container without walls for a device leaves nobody knowing what to do."""
    pytest.importorskip("triton", reason=NO_TRITON)
    monkeypatch.setattr("luthier.rewards.kernel.gpus_for", lambda device: (LENT,))

    def lend(limits: Limits, **more: Any) -> Any:
        raise SandboxUnavailableError("no walls stand here: landlock: a device is let in only with a root of its own")

    with pytest.raises(SandboxUnavailableError, match="cannot be lent.*no walls stand.*device: interpreter"):
        Kernel().score([GOOD], Tools(sandbox=lend))


@pytest.mark.parametrize(("built", "count"), [("13.0", 1), (None, 0)])
def test_a_torch_without_cuda_takes_no_gpu(built: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a machine with a GPU and a torch for CPUs is refused where Triton's interpreter would do."""
    import torch

    from luthier.data import kernel_programs

    pytest.importorskip("triton", reason=NO_TRITON)
    monkeypatch.setattr(kernel_programs, "gpu_devices", lambda: ("/dev/nvidia0",))
    monkeypatch.setattr(torch.version, "cuda", built)
    assert len(kernel_programs.gpus_for("auto")) == len(kernel_programs.gpus_for("cuda")) == count
    assert kernel_programs.gpus_for("interpreter") == kernel_programs.gpus_for("cpu") == ()


def test_what_the_compiler_said_is_told() -> None:
    from luthier.data.kernel_programs import why_no_kernel_runs

    said = "cuda_utils.c:9:10: fatal error: Python.h: No such file or directory\ncompilation terminated.\n"
    failed = Outcome(Status.ENDED, returned=(Returned(None, "CalledProcessError: gcc", "Exception"),), stderr=said)
    told = why_no_kernel_runs(lambda program: failed)
    assert told == "CalledProcessError: gcc (cuda_utils.c:9:10: fatal error: Python.h: No such file or directory)"


