"""Kernel programs: what may be written beside and in kernels, and in programs of PyTorch that are to be timed."""

from __future__ import annotations

import pytest

from luthier.data.kernel_programs import kernel_form, torch_form, why_no_kernel_runs
from luthier.sandbox.program import Outcome, Program, Returned, Status
from tests.rewards.kernels import HEAD, SOLUTIONS

KERNEL = SOLUTIONS["leaky_relu"]
HONEST = {
    "operators": "import torch\n\ndef f(x):\n    return torch.relu(x) ** 2 + x.sum(1, keepdim=True)",
    "functional": "import torch\nimport torch.nn.functional as F\n\ndef f(x):\n"
                  "    return F.silu(x) @ torch.linalg.vector_norm(x)",
    "long-name": "import torch\n\ndef f(x):\n    return torch.nn.functional.layer_norm(x, x.shape[-1:])",
    "state": "import math\nkept = {}\n\ndef f(x):\n    kept['x'] = x.max()\n    return x * math.sqrt(2)",
    "from": "from torch import Tensor\n\ndef f(x: Tensor) -> Tensor:\n    return x.clamp(min=0)",
}  # fmt: skip
REFUSED = {
    "import os": "os is imported", "import torch as t": "torch gets another name",
    "from torch import cuda": "torch.cuda is imported", "from torch import *": "torch.* is imported",
    "from torch import use_deterministic_algorithms": "is imported", "import torch.cuda": "torch.cuda is imported",
    "from math import __loader__": "math.__loader__ is imported", "from . import torch": "is imported",
    "t = torch": "torch gets another name", "t = torch.nn": "torch.nn", "t = [torch]": "torch gets another name",
    "torch.set_num_threads(1)": "torch.set_num_threads", "torch.cuda.Event = None": "is changed",
    "torch.nn.functional.torch.cuda.synchronize()": "torch.nn.functional.torch", "torch.compile": "torch.compile",
    "torch.linalg.os": "torch.linalg.os", "x = torch.nn.Module": "torch.nn.Module",
    "torch.relu.__globals__": ".__globals__",
    "getattr(torch, 'x')": "getattr is used", "__builtins__": "__builtins__ is used", "math.os": "math.os",
    "try:\n    pass\nfinally:\n    pass": "try", "with torch.no_grad():\n    pass": "with",
    "class A:\n    pass": "classdef",
    "del torch.relu": "is changed", "def g():\n    global f": "global", "async def g():\n    pass": "async",
    "x.backward()": ".backward()", "print(gc)\nx.get_objects()": ".get_objects()",
}  # fmt: skip
"""Lines of a program of PyTorch, and what is told of them."""
BESIDE = {
    "from torch import relu": "torch.relu is imported", "from triton import testing": "triton.testing is imported",
    "triton.testing.do_bench(print)": "triton.testing", "triton.runtime.driver": "triton.runtime",
    "l = triton.language": "triton.language is used", "l = tl.core": "tl.core", "l = tl": "tl gets another name",
    "tl.core.inspect.sys.modules": "tl.core", "f = torch.relu": "PyTorch computes: torch.relu",
    "import triton.language as lang": "triton.language gets another name",
    "from triton import language": "triton.language gets another name",
    "import torch.nn.functional as F": "torch.nn.functional is imported",
}  # fmt: skip
INSIDE = {
    "t = torch": "torch is used in a kernel", "tl.core.inspect.sys.modules": "tl.core", "tl.math.core": "tl.math.core",
    "tl.inline_asm_elementwise('', '', [x_ptr], tl.float32, True, 1)": "tl.inline_asm", "import os": "import",
    "triton.testing.do_bench(x_ptr)": "triton.testing", "x_ptr._value": "._value", "open('x')": "open is used",
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_of_pytorch_have_the_form(name: str) -> None:
    """Breaks when the language refuses how people write."""
    form = torch_form(f"Here:\n```python\n{HONEST[name]}\n```", "f")
    assert form.share == 1.0 and not form.trouble and form.program == HONEST[name], form


@pytest.mark.parametrize("line", REFUSED)
def test_what_reaches_beyond_the_operators_is_told(line: str) -> None:
    """Breaks when a program that is timed may patch, look around, or get at more of PyTorch by another name."""
    form = torch_form(f"import torch\n{line}\n\ndef f(x):\n    return x\n", "f")
    assert form.share < 1.0 and REFUSED[line] in form.trouble and not form.program, form


def test_what_is_no_program_has_no_form() -> None:
    assert "no Python" in torch_form("def f(:", "f").trouble and torch_form("x = 1", "f").trouble == "f is not defined"
    assert torch_form("", "f").share == kernel_form("", "f").share == 0.0


@pytest.mark.parametrize("line", BESIDE)
def test_beside_kernels_nothing_else_computes_by_any_name(line: str) -> None:
    """Breaks when PyTorch, or the modules behind Triton, are reached through an alias."""
    form = kernel_form(KERNEL.replace("@triton.jit", f"{line}\n\n\n@triton.jit"), "leaky_relu")
    assert form.share < 1.0 and BESIDE[line] in form.trouble, form


@pytest.mark.parametrize("line", INSIDE)
def test_in_kernels_there_is_only_the_language_of_triton(line: str) -> None:
    form = kernel_form(KERNEL.replace("    mask = at < n\n", f"    mask = at < n\n    {line}\n"), "leaky_relu")
    assert form.share < 1.0 and INSIDE[line] in form.trouble, form


def test_kernels_that_do_nothing_keep_the_rest() -> None:
    """Breaks when the program without its kernels is another one."""
    form = kernel_form(KERNEL, "leaky_relu")
    assert form.share == 1.0 and "tl.load" not in form.without and "kernel[" in form.without
    tuned = KERNEL.replace("@triton.jit", "@triton.autotune([triton.Config({}, num_warps=1)], key=['n'])\n@triton.jit")
    assert kernel_form(tuned, "leaky_relu").share == 1.0
    assert kernel_form(KERNEL.replace("import triton.language as tl", "from triton import language as tl"),
                       "leaky_relu").share == 1.0  # fmt: skip
    assert HEAD in KERNEL


def test_the_plainest_kernel_tells_whether_any_runs() -> None:
    def run(outcome: Outcome) -> str:
        asked: list[Program] = []
        told = why_no_kernel_runs(lambda program: asked.append(program) or outcome)  # type: ignore[func-returns-value]
        assert "tl.store" in asked[0].source
        return told

    assert run(Outcome(Status.ENDED, returned=(Returned([1.0]),))) == ""
    assert run(Outcome(Status.ENDED, returned=(Returned(None, "no gcc"),))) == "no gcc"
    assert run(Outcome(Status.KILLED, reason="ended by signal 31")) == "ended by signal 31"
