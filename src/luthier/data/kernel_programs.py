"""Programs of a small language: what an answer that is to be timed, or to be computed by kernels, may contain.

Idea: such a program runs in one process with what checks it, so it is held to a list of what it may name. Of PyTorch it
makes and shapes tensors, and where it is `torch_form` that is asked for it computes with them; kernels do the rest.
What can reach for anything else (patches, frames, imports, other names for modules) is not in the language: the first
of it is told. How much of the form is there is a share of checks, as something to learn from.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from luthier.data.programs import parsed, program_in
from luthier.sandbox.devices import gpu_devices
from luthier.sandbox.program import Call, Outcome, Program, Status

_MAKING: Final = frozenset({
    "empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like", "Tensor", "Size", "dtype",
    "device", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
    "float", "int", "long",
})  # fmt: skip
_TRITON: Final = frozenset({"jit", "cdiv", "next_power_of_2", "autotune", "Config", "heuristics"})
_METHODS: Final = frozenset({
    "numel", "size", "stride", "dim", "contiguous", "is_contiguous", "view", "reshape", "flatten", "unsqueeze",
    "squeeze", "transpose", "t", "permute", "expand", "new_empty", "new_zeros", "element_size", "cdiv",
    "next_power_of_2", "append", "get", "items", "keys", "values", "join", "format",
})  # fmt: skip
_NAMES: Final = frozenset({
    "getattr", "setattr", "delattr", "eval", "exec", "compile", "globals", "locals", "vars", "open", "input",
    "breakpoint", "__import__", "__builtins__",
})  # fmt: skip
_OPERATORS: Final = frozenset({
    "abs", "add", "addmm", "amax", "amin", "arange", "argmax", "argmin", "argsort", "as_strided", "baddbmm", "bmm",
    "broadcast_to", "cat", "ceil", "chunk", "clamp", "clamp_", "clamp_max", "clamp_min", "clone", "conv1d", "conv2d",
    "copy_", "cos", "count_nonzero", "cumprod", "cumsum", "diag", "diagonal", "diff", "div", "div_", "dot", "einsum",
    "eq", "erf", "exp", "exp_", "expand_as", "expm1", "eye", "fill_", "flip", "floor", "gather", "ge", "gelu", "glu",
    "gt", "index_add", "index_select", "inner", "layer_norm", "le", "leaky_relu", "lerp", "linear", "linspace", "log",
    "log1p", "log_softmax", "logsumexp", "lt", "masked_fill", "masked_fill_", "masked_select", "matmul", "max",
    "maximum", "mean", "min", "minimum", "mish", "mm", "movedim", "mul", "mul_", "mv", "narrow", "ne", "neg", "norm",
    "normalize", "ones", "ones_like", "outer", "pow", "prod", "reciprocal", "relu", "relu_", "repeat",
    "repeat_interleave", "rms_norm", "roll", "rsqrt", "scatter", "scatter_add", "select", "sigmoid", "sign", "silu",
    "sin", "softmax", "softplus", "sort", "split", "sqrt", "square", "stack", "std", "sub", "sub_", "sum", "tanh",
    "tensordot", "tile", "to", "topk", "tril", "triu", "unbind", "unflatten", "unfold", "var", "vector_norm", "where",
    "zero_",
})  # fmt: skip
_TL: Final = frozenset({
    "program_id", "num_programs", "arange", "load", "store", "constexpr", "tensor", "dtype", "pointer_type", "void",
    "int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "float8e4nv", "float8e5", "where", "maximum", "minimum", "exp", "exp2", "log", "log2", "sin", "cos",
    "sqrt", "rsqrt", "sqrt_rn", "abs", "fma", "floor", "ceil", "erf", "sigmoid", "softmax", "sum", "max", "min",
    "argmax", "argmin", "xor_sum", "reduce", "associative_scan", "cumsum", "cumprod", "sort", "topk", "dot",
    "dot_scaled", "cast", "cdiv", "zeros", "zeros_like", "full", "reshape", "ravel", "view", "trans", "permute", "join",
    "split", "interleave", "cat", "expand_dims", "broadcast", "broadcast_to", "flip", "gather", "histogram", "clamp",
    "umulhi", "div_rn", "fdiv", "range", "static_range", "static_assert", "assume", "multiple_of", "max_contiguous",
    "max_constancy", "debug_barrier", "make_block_ptr", "advance", "make_tensor_descriptor", "rand", "randn", "randint",
    "swizzle2d", "atomic_add", "atomic_and", "atomic_cas", "atomic_max", "atomic_min", "atomic_or", "atomic_xchg",
    "atomic_xor",
})  # fmt: skip
_MATH: Final = frozenset({
    "ceil", "comb", "cos", "e", "erf", "exp", "floor", "gcd", "inf", "isqrt", "log", "log2", "nan", "pi", "prod", "sin",
    "sqrt", "tanh", "tau",
})  # fmt: skip
_FREE: Final = ("typing", "__future__")
"""Modules of which anything may be imported by its name."""

_STATEMENTS: Final = (ast.Try, ast.TryStar, ast.With, ast.AsyncFunctionDef, ast.Global, ast.ClassDef)

MAKES: Final = (
    *sorted(_METHODS), "empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full", "full_like", "__get__",
    "data_ptr", "cpu", "to", "copy_", "untyped_storage", "storage_offset", "set_", "is_pinned", "nelement", "__set__",
    "zero_", "clone",
)  # fmt: skip
"""What may be asked of tensors while a function with kernels runs; the second half is what Triton asks, and the last
two are its autotuner's, which no program may name."""
PRECISE: Final = (("TRITON_F32_DEFAULT", "ieee"),)
"""A variable of Triton: products of float32 are what they are for the reference and in the interpreter, not of tf32."""
START_SECONDS: Final = {"cpu": 0.0, "cuda": 60.0}
"""For CUDA to start, and for the C compiler, ptxas and the autotuner: not the answer's time."""


_OF_THE_GPU: Final = ("device is busy", "devices unavailable", "ecc error", "gpu is lost", "fallen off the bus")
_SAID: Final = 300
PROOF: Final = """
import torch
import triton
import triton.language as tl

@triton.jit
def copy(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))

def proof():
    source = torch.ones(16, device="cuda")
    target = torch.zeros_like(source)
    copy[(1,)](source, target, BLOCK=16)
    return target.tolist()
"""
"""A kernel that nobody doubts."""


@dataclass(frozen=True)
class _Language:
    """Modules with the one name that each may have, what may be named of each, and methods of tensors."""

    aliases: dict[str, str]
    named: dict[str, frozenset[str]]
    methods: frozenset[str]

    def holds(self, path: str, *, base: bool) -> bool:
        """Whether a dotted path leads to what may be named; where it is a `base` of a longer one, to a module too."""
        if path.partition(".")[0] not in self.aliases.values():
            return True  # it begins with something of the program's own
        of = max((name for name in self.named if path.startswith(name + ".")), key=len, default="")
        if base and any(name == path or name.startswith(path + ".") for name in self.named):
            return True
        return path.removeprefix(of + ".").partition(".")[0] in self.named.get(of, frozenset())


_COMPUTES: Final = _MAKING | _OPERATORS
_OF_KERNELS: Final = _Language(
    {"torch": "torch", "triton": "triton", "triton.language": "tl", "math": "math"},
    {"torch": _MAKING, "triton": _TRITON, "tl": _TL, "tl.math": _TL, "triton.language": _TL, "math": _MATH}, _METHODS,
)  # fmt: skip
_OF_TORCH: Final = _Language(
    {"torch": "torch", "torch.nn.functional": "F", "math": "math"},
    {"torch": _COMPUTES, "torch.nn.functional": _COMPUTES, "torch.linalg": _COMPUTES, "F": _COMPUTES, "math": _MATH},
    _METHODS | _OPERATORS,
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How much of the form is there, what is missing first, the program, and the same with kernels that do nothing."""

    share: float
    trouble: str
    program: str = ""
    without: str = ""


def kernel_form(said: str, name: str) -> Form:
    """The form of a program in which the function `name` launches kernels of Triton that do the work."""
    program = program_in(said)
    tree = parsed(program) if program is not None else "there is no program"
    if isinstance(tree, str) or program is None:
        return Form(0.0, f"it is no Python: {tree}")
    kernels = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_kernel(node)]
    inside = {id(inner) for kernel in kernels for inner in ast.walk(kernel)}
    outside = [node for node in ast.walk(tree) if id(node) not in inside]
    entry = _entry(tree, name)
    used = {_path(node) for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Attribute)}
    other = _other_work(outside, _OF_KERNELS, "beside the kernels") or _hidden_work(kernels)
    checks = {
        "no function is decorated with triton.jit": bool(kernels),
        "no kernel loads and stores": {"tl.load", "tl.store"} <= used,
        f"{name} is not defined": entry is not None and entry not in kernels,
        "no kernel is launched": _launches(outside, {kernel.name for kernel in kernels}),
        other: not other,
    }
    missing = [told for told, there in checks.items() if not there]
    share = 1 - len(missing) / len(checks)
    if missing:
        return Form(share if kernels else 0.0, missing[0])
    for kernel in kernels:
        kernel.body = [ast.Pass()]
    try:
        return Form(1.0, "", program, ast.unparse(ast.fix_missing_locations(tree)))
    except RecursionError:
        return Form(0.0, "it is nested too deeply")


def torch_form(said: str, name: str) -> Form:
    """The form of a program in which the function `name` computes with operators of PyTorch."""
    program = program_in(said)
    tree = parsed(program) if program is not None else "there is no program"
    if isinstance(tree, str) or program is None:
        return Form(0.0, f"it is no Python: {tree}")
    if _entry(tree, name) is None:
        return Form(0.0, f"{name} is not defined")
    other = _other_work(ast.walk(tree), _OF_TORCH, "in the program")
    return Form(0.5, other) if other else Form(1.0, "", program)


def answered(outcome: Outcome) -> bool:
    """Whether a program ran to its end and answered every call."""
    return outcome.status is Status.ENDED and all(each.error is None for each in outcome.returned)


def why_no_kernel_runs(run: Callable[[Program], Outcome]) -> str:
    """Why not even the plainest kernel runs on the GPU of a sandbox; empty where it does.

    A compiler that is not there, or a driver that wants what is walled off, must not become a bad reward.
    """
    proof = run(Program(PROOF, (Call("proof"),)))
    return "" if answered(proof) else why_not(proof)


def why_not(outcome: Outcome) -> str:
    """Why a program has not answered every call, in words; what a compiler said last stands behind it."""
    told = next((each.error for each in outcome.returned if each.error), "")
    lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    said = errors[0][:_SAID] if errors else ""
    told = told or outcome.reason or outcome.raised or str(outcome.status)
    return told if not said or said in told else f"{told[:_SAID]} ({said})"


def is_of_the_gpu(told: str) -> bool:
    """Whether an error tells of a GPU that has no room, or is gone: it says nothing about the program."""
    words = told.lower()
    return "out of memory" in words or any(word in words for word in _OF_THE_GPU)


def gpus_for(device: str) -> tuple[str, ...]:
    """The device files to lend where `device` is auto or cuda: none where PyTorch or Triton could not use them."""
    if device not in ("auto", "cuda") or importlib.util.find_spec("triton") is None:
        return ()
    return gpu_devices() if built_for_gpus() else ()


def built_for_gpus() -> bool:
    """Whether this PyTorch is one for GPUs of NVIDIA."""
    import torch

    return torch.version.cuda is not None


def _entry(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def _is_kernel(node: ast.FunctionDef) -> bool:
    found = [decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list]
    return any(_path(decorator) in ("triton.jit", "jit") for decorator in found)


def _launches(nodes: list[ast.AST], kernels: set[str]) -> bool:
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
               and _path(node.func.value) in kernels for node in nodes)  # fmt: skip


def _other_work(nodes: Iterable[ast.AST], language: _Language, where: str) -> str:
    """What is done there and is not in the language: the first of it, in words."""
    each = list(nodes)
    based = {id(node.value) for node in each if isinstance(node, ast.Attribute)}
    for node in each:
        if isinstance(node, ast.Import | ast.ImportFrom) and (told := _of_import(node, language)):
            return told
        if isinstance(node, _STATEMENTS):
            return f"a {type(node).__name__.lower()} statement stands {where}"
        if isinstance(node, ast.Name) and (node.id in _NAMES or node.id.startswith("__")):
            return f"{node.id} is used"
        if isinstance(node, ast.Name) and node.id in language.aliases.values() and id(node) not in based:
            return f"{node.id} gets another name"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and "matmul" not in language.methods:
            return "PyTorch multiplies matrices"
        if isinstance(node, ast.Attribute) and (told := _of_attribute(node, language, base=id(node) in based)):
            return told
    calls = [node.func for node in each if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    wrong = [call.attr for call in calls if call.attr not in language.methods
             and _path(call).partition(".")[0] not in language.aliases.values()]  # fmt: skip
    return f".{wrong[0]}() is called {where}" if wrong else ""


def _of_import(node: ast.Import | ast.ImportFrom, language: _Language) -> str:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name not in language.aliases and alias.name not in _FREE:
                return f"{alias.name} is imported"
            if (alias.asname or alias.name) != language.aliases.get(alias.name, alias.name):
                return f"{alias.name} gets another name"
        return ""
    for alias in node.names:
        path = f"{node.module}.{alias.name}"
        if path in language.aliases:
            if (alias.asname or alias.name) != language.aliases[path]:
                return f"{path} gets another name"
        elif node.level or alias.name.startswith(("_", "*")) or not (
            node.module in _FREE or alias.name in language.named.get(str(node.module), ())
        ):
            return f"{path} is imported"
    return ""


def _of_attribute(node: ast.Attribute, language: _Language, *, base: bool) -> str:
    path = _path(node)
    if node.attr.startswith("_"):
        return f".{node.attr} is used"
    if isinstance(node.ctx, ast.Store | ast.Del):
        return f"{path or node.attr} is changed"
    if not language.holds(path, base=base):
        return f"PyTorch computes: {path}" if path.startswith("torch.") else f"{path} is used"
    return ""


def _hidden_work(kernels: list[ast.FunctionDef]) -> str:
    """What Triton would not compile, and its interpreter would run."""
    each = [inner for kernel in kernels for inner in ast.walk(kernel)]
    based = {id(node.value) for node in each if isinstance(node, ast.Attribute)}
    for node in each:
        if isinstance(node, ast.Attribute) and (told := _of_attribute(node, _OF_KERNELS, base=id(node) in based)):
            return f"in a kernel: {told}"
        if isinstance(node, ast.Name) and (node.id in (*_NAMES, "torch") or node.id.startswith("__")):
            return f"{node.id} is used in a kernel"
        if isinstance(node, (ast.Import, ast.ImportFrom, *_STATEMENTS)):
            return f"a {type(node).__name__.lower()} statement stands in a kernel"
    return ""


def _path(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""
