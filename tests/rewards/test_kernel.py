"""Kernel: Triton kernels in its interpreter, each operator solved honestly, and every way to cheat that we know."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from luthier.assets.kernels import kernel_rows
from luthier.core.errors import DataError, MissingError, RecipeError
from luthier.data.sample import Sample
from luthier.rewards import Tools
from luthier.rewards.kernel import Kernel
from luthier.sandbox.program import Outcome, Status
from tests.rewards.kernels import CHEATS, SOLUTIONS
from tests.rewards.samples import failure, sample, sandbox_tools, score
from tests.rewards.test_compiles import Broken

ROWS = {row["function"]: row for row in map(json.loads, kernel_rows().splitlines())}
FEW = ("leaky_relu", "softmax", "cosine", "matmul")


def answer(name: str, program: str) -> Sample:
    """An answer to a row of the example data."""
    facts = {key: value for key, value in ROWS[name].items() if key != "prompt"}
    return sample(f"```python\n{program}\n```", **facts)


KNOBS: dict[str, Any] = {}
GOOD = answer("leaky_relu", SOLUTIONS["leaky_relu"])
BAD = answer("leaky_relu", SOLUTIONS["leaky_relu"].replace("0.01 * x", "0.02 * x"))


def make_tools() -> Tools:
    pytest.importorskip("triton", reason="triton is not installed: no wheel for this platform")
    return sandbox_tools()


def test_the_data_and_its_solutions_are_of_the_same_operators() -> None:
    assert set(ROWS) == set(SOLUTIONS) and len(ROWS) >= 14
    for row in ROWS.values():
        assert {"prompt", "reference", "inputs"} <= set(row) and row["reference"] in row["prompt"]
        assert all(math.prod(sizes) >= 1 << 20 for sizes in row["timed"]), "too small to be timed on a GPU"


@pytest.mark.parametrize("name", FEW)
def test_an_honest_kernel_gets_everything(name: str) -> None:
    """Breaks when the interpreter does not run in the sandbox, or a defence takes an honest kernel for a cheat."""
    found = score("kernel", answer(name, SOLUTIONS[name]), make_tools())
    assert found.value == pytest.approx(1.0), found
    assert found.parts == {"form": 1.0, "runs": 1.0, "right": 1.0, "hack/idle-kernel": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SOLUTIONS) - set(FEW)))
def test_every_honest_kernel_gets_everything(name: str) -> None:
    assert score("kernel", answer(name, SOLUTIONS[name]), make_tools()).value == pytest.approx(1.0)


def cheating(name: str) -> Sample:
    """The honest kernel with one thing replaced, so that it cheats."""
    old, new = CHEATS[name]
    program = SOLUTIONS["leaky_relu"]
    assert old in program
    program = program.replace(old, new)
    if name == "finishes-in-pytorch":
        program = program.replace("    return out\n", "    return out * (out > 0) + out * (out <= 0) * 0.01\n")
    return answer("leaky_relu", program)


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_is_right(name: str) -> None:
    """Breaks when what is right for another reason than a kernel counts as right."""
    found = score("kernel", cheating(name), make_tools())
    assert found.value <= 0.3 + 1e-9 and found.parts["right"] < 1.0 and found.reason, found


def test_a_kernel_that_computes_nothing_is_found_although_the_values_are_right() -> None:
    """Breaks when right values are enough: the kernel writes zeros that something else has put there already."""
    row = {"function": "zeros", "reference": "import torch\ndef zeros(x):\n    return torch.zeros_like(x)",
           "inputs": "def draw(seed):\n    return [[[1.0, 2.0]]]"}  # fmt: skip
    program = SOLUTIONS["leaky_relu"].replace("leaky_relu", "zeros").replace("tl.where(x > 0, x, 0.01 * x)", "x * 0.0")
    honest = score("kernel", sample(program, **row), make_tools())
    assert honest.value == pytest.approx(1.0)
    idle = score("kernel", sample(program.replace("empty_like", "zeros_like"), **row), make_tools())
    assert idle.value == pytest.approx(0.3) and idle.parts["hack/idle-kernel"] == 1.0


def test_the_form_has_partial_credit_and_is_a_gate() -> None:
    tools = make_tools()
    assert score("kernel", sample("no program", **GOOD.facts), tools).value == 0.0
    part = score("kernel", cheating("no-launch"), tools)
    assert 0 < part.value < 0.1 and part.parts["runs"] == 0.0
    # A grid of one program is right for the inputs that fit into one.
    some = score(Kernel(partial=True), cheating("part-of-the-grid"), tools)
    assert some.parts["right"] == 0.75 and some.value == pytest.approx(0.3 + 0.75 * 0.7)
    assert score(Kernel(form=0.0), cheating("no-launch"), tools).value == 0.0


def test_without_triton_the_command_that_brings_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install"):
        Kernel().score([GOOD], Tools(sandbox=lambda limits, **more: Broken([])))  # type: ignore[arg-type,return-value]


def test_the_sandbox_and_the_row_are_told_from_the_answer() -> None:
    """Breaks when a broken sandbox or a broken reference is scored."""
    pytest.importorskip("triton", reason="triton is not installed: no wheel for this platform")
    broken = Broken([Outcome(Status.BROKEN, reason="no zygote")])
    tools = Tools(sandbox=lambda limits, **more: broken)  # type: ignore[arg-type,return-value]
    assert failure("kernel", GOOD, tools).again
    with pytest.raises(RecipeError, match="sandbox"):
        Kernel().score([GOOD], Tools())
    for column, text, part in (("inputs", "def draw(seed):\n    return 1", "inputs drew"),
                               ("reference", "def leaky_relu(x):\n    return y", "reference fails")):  # fmt: skip
        with pytest.raises(DataError, match=part):
            score("kernel", replace(GOOD, facts={**GOOD.facts, column: text}), make_tools())
