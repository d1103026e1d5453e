"""Kernel: whether an answer is a Triton kernel that computes what a PyTorch program does.

Idea: three rungs. The form: Triton is imported, a kernel is decorated, loads and stores, the function launches it, and
nothing but kernels computes. It runs: every input is answered. It is right: on inputs drawn after the answer was
written, each value is that of the reference, which runs in another process. Then every kernel's body is taken out: if
the answer is still right, the kernel was never what computed it. Memory that is not written is NaN, inputs must come
back as they were, and every operation of PyTorch but making and shaping tensors is an error while the function runs.
Equation: w_form f + w_runs c + w_right s, each only where those before it are 1; f is a share of checks, and s is 1 if
all inputs are right, else 0 (with `partial` their share)
Source: Predibase, reinforcement fine-tuning of PyTorch to Triton; Ouyang et al., arXiv 2502.10517 (KernelBench)
Cost: three runs in the sandbox; Triton's interpreter needs milliseconds for each program of a small grid.
Use when: kernels are to be written; small shapes, so that Triton's interpreter on the CPU is enough.
Not when: speed counts: under the interpreter it says nothing, and no GPU is let into the sandbox.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from pydantic import Field

from luthier.core.errors import DataError, MissingError, RecipeError
from luthier.data.cases import Sameness, shown
from luthier.data.programs import parsed, program_in
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Status

_MODULES: Final = ("torch", "triton", "triton.language", "math", "typing", "__future__")
_TORCH: Final = frozenset({
    "empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like", "Tensor", "Size", "dtype",
    "device", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
    "float", "int", "long",
})  # fmt: skip
_METHODS: Final = frozenset({
    "numel", "size", "stride", "dim", "contiguous", "is_contiguous", "view", "reshape", "flatten", "unsqueeze",
    "squeeze", "transpose", "t", "permute", "expand", "new_empty", "new_zeros", "element_size", "cdiv",
    "next_power_of_2", "append", "get", "items", "keys", "values", "join", "format",
})  # fmt: skip
_NAMES: Final = frozenset({
    "getattr", "setattr", "delattr", "eval", "exec", "compile", "globals", "locals", "vars", "open", "input",
    "breakpoint", "__import__", "__builtins__",
})  # fmt: skip
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
_AFTER: Final = """

class {guard}({mode}):
    def __torch_function__(self, operation, types, arguments=(), keywords=None):
        name = getattr(operation, "__name__", str(operation))
        if name not in {allowed}:
            raise RuntimeError("PyTorch computes: " + name)
        return operation(*arguments, **(keywords or {{}}))

def {call}(*arguments):
    given = [{torch}.tensor(each) if isinstance(each, list) else each for each in arguments]
    with {guard}():
        made = {function}(*given)
    kept = [each.tolist() if isinstance(each, {torch}.Tensor) else each for each in given]
    return [made.tolist(), str(made.dtype), kept]
"""
_SHAPING: Final = (
    *sorted(_METHODS), "empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like", "__get__",
    "data_ptr", "cpu", "to", "copy_", "untyped_storage", "storage_offset", "set_", "is_pinned", "nelement", "__set__",
)  # fmt: skip
"""What may be asked of tensors while the function runs; the second half is what Triton's interpreter asks."""


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
    seconds: float = Field(20.0, gt=0, description="the longest that all inputs may take together")
    memory_megabytes: int = Field(2048, ge=256, description="the most memory it may use")

    requires = frozenset({"sandbox"})

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, self.form + self.runs + self.right)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.reference, self.inputs)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if tools.sandbox is None:
            raise RecipeError("the reward kernel needs the sandbox", allowed="a machine that has one")
        if importlib.util.find_spec("triton") is None:
            raise MissingError(
                "the reward kernel needs the package triton, which is not installed",
                allowed="Linux, where its interpreter runs", do='install it with: pip install "luthier[gpu]"',
            )  # fmt: skip
        limits = Limits(self.seconds, self.seconds, self.memory_megabytes << 20)
        sandbox = tools.sandbox(limits, preload=_PRELOAD, environment=(("TRITON_INTERPRET", "1"),))
        return [self._one(sample, sandbox.run_all, tools) for sample in samples]

    def _one(self, sample: Sample, run: Any, tools: Tools) -> Verdict:
        name, reference = str(sample.fact(self.column)), str(sample.fact(self.reference))
        seed = _seed(sample, tools)
        drawing = Program(str(sample.fact(self.inputs)), (Call("draw", (seed,)),))
        form = _form(sample.said, name)
        if form.trouble:
            return Score(self.form * form.share, _parts(form.share), form.trouble, form.trouble)
        [drawn] = run([drawing])
        if drawn.status is Status.BROKEN:
            return RewardError(f"the sandbox broke: {drawn.reason}").of(sample)
        calls = self._calls(drawn, seed)
        sources = (reference, form.program, form.without)
        outcomes = run([Program(_wrapped(source, name, seed, free=source is reference), calls) for source in sources])
        if broken := [outcome.reason for outcome in outcomes if outcome.status is Status.BROKEN]:
            return RewardError(f"the sandbox broke: {broken[0]}").of(sample)
        return self._verdict(calls, *outcomes)

    def _calls(self, drawn: Outcome, seed: int) -> tuple[Call, ...]:
        given = drawn.returned[0].value if drawn.returned and drawn.returned[0].error is None else None
        if not isinstance(given, list) or not given or not all(isinstance(each, list) for each in given):
            why = drawn.returned[0].error if drawn.returned else drawn.reason or drawn.raised
            raise DataError(f"{self.inputs} drew {shown(given)} ({why})", allowed="a list of lists of arguments")
        return tuple(Call(f"call_{seed}", tuple(each)) for each in given)

    def _verdict(self, calls: tuple[Call, ...], known: Outcome, said: Outcome, without: Outcome) -> Verdict:
        expected = [each.value for each in known.returned if each.error is None]
        if len(expected) != len(calls):
            told = next((each.error for each in known.returned if each.error), known.reason or known.raised)
            raise DataError(f"{self.reference} fails: {told}", allowed="a program that answers every input")
        answers = [each.value for each in said.returned if each.error is None]
        if len(answers) != len(calls):
            told = next((each.error for each in said.returned if each.error), said.reason or said.raised) or said.status
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


def _wrapped(source: str, function: str, seed: int, *, free: bool) -> str:
    """The program between what makes memory NaN and what hands in tensors; the reference is `free` to compute."""
    names = {name: f"{name}_{seed}" for name in ("torch", "mode", "guard", "call")}
    after = _AFTER.format(function=function, allowed=repr(_SHAPING), **names)
    if free:
        after = after.replace(f"name not in {_SHAPING!r}", "False")
    return f"{_BEFORE.format(**names)}\n{source}\n{after}"


@dataclass(frozen=True)
class _Form:
    """How much of the form is there, what is missing first, the program, and the same with kernels that do nothing."""

    share: float
    trouble: str
    program: str = ""
    without: str = ""


def _form(said: str, name: str) -> _Form:
    program = program_in(said)
    tree = parsed(program) if program is not None else "there is no program"
    if isinstance(tree, str) or program is None:
        return _Form(0.0, f"it is no Python: {tree}")
    kernels = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_kernel(node)]
    inside = {id(inner) for kernel in kernels for inner in ast.walk(kernel)}
    outside = [node for node in ast.walk(tree) if id(node) not in inside]
    entry = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)
    used = {_path(node) for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Attribute)}
    checks = {
        "no function is decorated with triton.jit": bool(kernels),
        "no kernel loads and stores": {"tl.load", "tl.store"} <= used,
        f"{name} is not defined": entry is not None and entry not in kernels,
        "no kernel is launched": _launches(outside, {kernel.name for kernel in kernels}),
        (other := _other_work(outside) or _hidden_work(kernels)): not other,
    }
    missing = [told for told, there in checks.items() if not there]
    share = 1 - len(missing) / len(checks)
    if missing:
        return _Form(share if kernels else 0.0, missing[0])
    for kernel in kernels:
        kernel.body = [ast.Pass()]
    try:
        return _Form(1.0, "", program, ast.unparse(ast.fix_missing_locations(tree)))
    except RecursionError:
        return _Form(0.0, "it is nested too deeply")


def _is_kernel(node: ast.FunctionDef) -> bool:
    found = [decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list]
    return any(_path(decorator) in ("triton.jit", "jit") for decorator in found)


def _launches(nodes: list[ast.AST], kernels: set[str]) -> bool:
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
               and _path(node.func.value) in kernels for node in nodes)  # fmt: skip


def _other_work(nodes: list[ast.AST]) -> str:
    """What is done beside kernels and must not be: the first of it, in words."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
            if other := [name for name in names if name not in _MODULES]:
                return f"{other[0]} is imported"
        if isinstance(node, ast.Try | ast.With | ast.AsyncFunctionDef | ast.Global | ast.ClassDef):
            return f"a {type(node).__name__.lower()} statement stands beside the kernels"
        if isinstance(node, ast.Name) and (node.id in _NAMES or node.id.startswith("__")):
            return f"{node.id} is used"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return "PyTorch multiplies matrices"
        if isinstance(node, ast.Attribute) and (told := _of_attribute(node)):
            return told
    calls = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    wrong = [call.attr for call in calls if call.attr not in _METHODS and _path(call).partition(".")[0] not in
             ("torch", "triton", "tl", "math")]  # fmt: skip
    return f".{wrong[0]}() is called beside the kernels" if wrong else ""


def _hidden_work(kernels: list[ast.FunctionDef]) -> str:
    """What Triton would not compile, and its interpreter would run."""
    for node in (inner for kernel in kernels for inner in ast.walk(kernel)):
        if isinstance(node, ast.Attribute) and (node.attr.startswith("_") or _path(node).startswith("torch.")):
            return f"{_path(node) or node.attr} is used in a kernel"
        if isinstance(node, ast.Name) and (node.id in _NAMES or node.id.startswith("__")):
            return f"{node.id} is used in a kernel"
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.With | ast.Global | ast.ClassDef):
            return f"a {type(node).__name__.lower()} statement stands in a kernel"
    return ""


def _of_attribute(node: ast.Attribute) -> str:
    path = _path(node)
    if node.attr.startswith("_"):
        return f".{node.attr} is used"
    if path.startswith("torch.") and path.split(".")[1] not in _TORCH:
        return f"PyTorch computes: {path}"
    changed = isinstance(node.ctx, ast.Store | ast.Del)
    return f"{path or node.attr} is changed" if changed else ""


def _path(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def _seed(sample: Sample, tools: Tools) -> int:
    text = f"{tools.seed} {tools.step} {sample.answer}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _parts(form: float, runs: float = 0.0, right: float = 0.0, idle: float = 0.0) -> dict[str, float]:
    return {"form": form, "runs": runs, "right": right, "hack/idle-kernel": idle}
