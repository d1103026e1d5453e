"""Kernel: whether an answer is a Triton kernel that computes what a PyTorch program does.

Idea: three rungs. The form: Triton is imported, a kernel is decorated, loads and stores, the function launches it, and
nothing but kernels computes. It runs: every input is answered. It is right: on inputs drawn after the answer was
written, each value is that of the reference, which runs in another process. Then every kernel's body is taken out: if
the answer is still right, the kernel was never what computed it. Memory that is not written is NaN, inputs must come
back as they were, and every operation of PyTorch but making and shaping tensors is an error while the function runs.
Kernels are compiled where there is a GPU, and run in Triton's interpreter where there is none.
Equation: w_form f + w_runs c + w_right s, each only where those before it are 1; f is a share of checks, and s is 1 if
all inputs are right, else 0 (with `partial` their share)
Source: Predibase, reinforcement fine-tuning of PyTorch to Triton; Ouyang et al., arXiv 2502.10517 (KernelBench)
Cost: three runs in the sandbox; Triton's interpreter needs milliseconds for each program of a small grid.
Use when: kernels are to be written; small shapes, so that Triton's interpreter on the CPU is enough.
Not when: speed alone counts: that is `kernel_speed`, behind a gate of this.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from pydantic import Field

from luthier.core.errors import DataError, MissingError, RecipeError, SandboxUnavailableError
from luthier.data.cases import Sameness, shown
from luthier.data.cells import name_of, program_of
from luthier.data.kernel_programs import (
    MAKES,
    PRECISE,
    START_SECONDS,
    answered,
    gpus_for,
    is_of_the_gpu,
    kernel_form,
    why_no_kernel_runs,
    why_not,
)
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Status

_PRELOAD: Final = (
    "torch", "torch.overrides", "triton", "triton.language", "triton.runtime.interpreter",
    "triton.experimental.gluon._runtime", "triton.experimental.gluon.language._semantic",
)  # fmt: skip
_BEFORE: Final = """
import torch as {torch}
from torch.overrides import TorchFunctionMode as {mode}
{torch}._C._set_deterministic_algorithms(True, warn_only=True)
{torch}._C._set_deterministic_fill_uninitialized_memory(True)
"""
_FIRST_CHOICE: Final = """
from triton.runtime.autotuner import Autotuner as {tuner}
{tuner}._bench = lambda *ignored, **more: [0.0, 0.0, 0.0]
"""
"""In the interpreter nothing can be timed: Triton's autotuner takes the first of its choices."""
_PROCESSES: Final = 64
_AFTER: Final = """

class {guard}({mode}):
    def __torch_function__(self, operation, types, arguments=(), keywords=None):
        name = getattr(operation, "__name__", str(operation))
        if name not in {allowed}:
            raise RuntimeError("PyTorch computes: " + name)
        return operation(*arguments, **(keywords or {{}}))

def {call}(*arguments):
    given = [{torch}.tensor(each, device="{device}") if isinstance(each, list) else each for each in arguments]
    with {guard}():
        made = {function}(*given)
    kept = [each.tolist() if isinstance(each, {torch}.Tensor) else each for each in given]
    return [made.tolist(), str(made.dtype), kept]
"""


@final
class Kernel(Reward):
    """A Triton kernel in the place of PyTorch."""

    column: str = Field("function", min_length=1, description="the column with the name of the function to write")
    reference: str = Field("reference", min_length=1, description="the column with the PyTorch program of that name")
    inputs: str = Field(
        "inputs", min_length=1, description="the column with Python text in which draw(seed) gives a list of arguments"
    )
    form: float = Field(0.1, ge=0, description="what the form is worth")
    runs: float = Field(0.2, ge=0, description="what a kernel that runs is worth")
    right: float = Field(0.7, gt=0, description="what the right values are worth")
    partial: bool = Field(False, description="whether each input that is right gives its share")
    absolute: float = Field(1e-4, ge=0, description="how far off a right value may be")
    relative: float = Field(1e-3, ge=0, lt=1, description="how far off, as a share of the right value")
    device: Literal["auto", "interpreter", "cuda"] = Field(
        "auto", description="where kernels run; auto: on the GPU where there is one, else in Triton's interpreter"
    )
    seconds: float = Field(
        20.0, gt=0, description="the longest that all inputs may take together; on a GPU a minute more, for it to start"
    )
    memory_megabytes: int = Field(2048, ge=256, description="the most memory it may use")

    requires = frozenset({"sandbox"})

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, self.form + self.runs + self.right)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.reference, self.inputs)

    def check(self, facts: Mapping[str, Any]) -> None:
        program_of(facts, self.reference, name_of(facts, self.column))
        program_of(facts, self.inputs, "draw")

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.sandbox is None:
            raise RecipeError("the reward kernel needs the sandbox", allowed="a machine that has one")
        if importlib.util.find_spec("triton") is None:
            raise MissingError(
                "the reward kernel needs the package triton, which is not installed",
                allowed="Linux, where its interpreter runs", do='install it with: pip install "luthier[gpu]"',
            )  # fmt: skip
        lent = gpus_for(self.device)
        if self.device == "cuda" and not lent:
            raise SandboxUnavailableError(
                "there is no GPU of NVIDIA here, or a PyTorch without CUDA", allowed="device: interpreter, or auto"
            )
        device = "cuda" if lent else "cpu"
        seconds = self.seconds + START_SECONDS[device]
        limits = Limits(seconds, seconds, self.memory_megabytes << 20, processes=_PROCESSES)
        environment = PRECISE if lent else (("TRITON_INTERPRET", "1"),)
        try:
            sandbox = tools.sandbox(limits, preload=_PRELOAD, environment=environment, devices=lent)
        except SandboxUnavailableError as failure:
            if not lent:
                raise
            raise SandboxUnavailableError(
                f"the GPU cannot be lent to programs: {failure.received}", allowed=failure.allowed,
                do="or set device: interpreter; docs/sandbox.md says what a container needs for it",
            ) from failure  # fmt: skip
        place = _Place(device, sandbox.run_all)
        return [self._one(sample, place, _seed(sample, tools)) for sample in samples]

    def _one(self, sample: Sample, place: _Place, seed: int) -> Verdict:
        name, reference = str(sample.fact(self.column)), str(sample.fact(self.reference))
        drawing = Program(str(sample.fact(self.inputs)), (Call("draw", (seed,)),))
        form = kernel_form(sample.said, name)
        if form.trouble:
            return Score(self.form * form.share, _parts(form.share), form.trouble, form.trouble)
        [drawn] = place.run([drawing])
        if drawn.status is Status.BROKEN:
            return RewardError(f"the sandbox broke: {drawn.reason}").of(sample)
        calls = self._calls(drawn, seed)
        sources = (reference, form.program, form.without)
        known, said, without = place.run(
            [Program(_wrapped(source, name, seed, place, free=source is reference), calls) for source in sources]
        )
        if broken := [each.reason for each in (known, said, without) if each.status is Status.BROKEN]:
            return RewardError(f"the sandbox broke: {broken[0]}").of(sample)
        if told := place.lacking(known, said, without):
            return RewardError(f"no kernel runs on this GPU behind the walls: {told}").of(sample, again=False)
        if not answered(known) and place.device == "cuda" and is_of_the_gpu(told := why_not(known)):
            return RewardError(f"the GPU has no room for the reference: {told}", do="leave it some").of(sample)
        return self._verdict(calls, known, said, without)

    def _calls(self, drawn: Outcome, seed: int) -> tuple[Call, ...]:
        given = drawn.returned[0].value if drawn.returned and drawn.returned[0].error is None else None
        if not isinstance(given, list) or not given or not all(isinstance(each, list) for each in given):
            why = drawn.returned[0].error if drawn.returned else drawn.reason or drawn.raised
            raise DataError(f"{self.inputs} drew {shown(given)} ({why})", allowed="a list of lists of arguments")
        return tuple(Call(f"call_{seed}", tuple(each)) for each in given)

    def _verdict(self, calls: tuple[Call, ...], known: Outcome, said: Outcome, without: Outcome) -> Verdict:
        expected = [each.value for each in known.returned if each.error is None]
        if len(expected) != len(calls):
            raise DataError(f"{self.reference} fails: {why_not(known)}", allowed="a program that answers every input")
        answers = [each.value for each in said.returned if each.error is None]
        if len(answers) != len(calls):
            told = why_not(said)
            return Score(self.form, _parts(1.0), told, told)
        troubles = [self._trouble(call, *pair) for call, *pair in zip(calls, answers, expected, strict=True)]
        empty = [each.value for each in without.returned if each.error is None]
        idle = len(empty) == len(calls) and all(map(self._same, empty, expected))
        wrong = [told for told in troubles if told]
        share = 0.0 if idle else 1 - len(wrong) / len(calls)
        told = "it is right without its kernels: they compute nothing" if idle else wrong[0] if wrong else ""
        value = self.form + self.runs + self.right * (share if self.partial else float(share == 1))
        return Score(value, _parts(1.0, 1.0, share, float(idle)), told, told)

    def _trouble(self, call: Call, answer: Any, expected: Any) -> str:
        if not isinstance(answer, list) or len(answer) != 3:
            return "the function gave no tensor"
        if answer[1] != expected[1]:
            return f"a tensor of {answer[1]} instead of {expected[1]}"
        if not Sameness(0.0, 1e-6, numbers=True).same(answer[2], list(call.arguments)):
            return "it has changed its inputs"
        return "" if self._same(answer, expected) else "a value is not that of the reference"

    def _same(self, answer: Any, expected: Any) -> bool:
        return isinstance(answer, list) and Sameness(self.absolute, self.relative).same(answer[:2], expected[:2])


@dataclass(frozen=True)
class _Place:
    """Where kernels run, and how to run programs there."""

    device: str
    run: Callable[[list[Program]], list[Outcome]]

    def lacking(self, known: Outcome, *others: Outcome) -> str:
        """Why no kernel runs here, whatever the answer; empty where one does: then it is the answer that failed."""
        if self.device == "cpu" or (answered(known) and any(map(answered, others))):
            return ""
        return why_no_kernel_runs(lambda program: self.run([program])[0])


def _wrapped(source: str, function: str, seed: int, place: _Place, *, free: bool) -> str:
    """The program between what makes memory NaN and what hands in tensors; the reference is `free` to compute."""
    names = {name: f"{name}_{seed}" for name in ("torch", "mode", "guard", "call", "tuner")}
    after = _AFTER.format(function=function, allowed=repr(MAKES), device=place.device, **names)
    if free:
        after = after.replace(f"name not in {MAKES!r}", "False")
    before = _BEFORE if place.device == "cuda" else _BEFORE + _FIRST_CHOICE
    return f"{before.format(**names)}\n{source}\n{after}"


def _seed(sample: Sample, tools: Tools) -> int:
    text = f"{tools.seed} {tools.step} {sample.answer}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _parts(form: float, runs: float = 0.0, right: float = 0.0, idle: float = 0.0) -> dict[str, float]:
    return {"form": form, "runs": runs, "right": right, "hack/idle-kernel": idle}
