"""Honest Triton kernels for every operator of `luthier data kernels`, and ways to cheat with them."""

from __future__ import annotations

HEAD = "import torch\nimport triton\nimport triton.language as tl\n\n\n"

_ELEMENTS = '''@triton.jit
def kernel({pointers}, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
{loads}
    tl.store(out + at, {value}, mask=mask)


def {name}({params}):
    out = torch.empty_like(x)
    kernel[(triton.cdiv(x.numel(), 64),)]({params}, out, x.numel(), BLOCK=64)
    return out
'''
_ROWS = '''@triton.jit
def kernel({pointers}, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < n
{loads}
{body}


def {name}({params}):
    rows, n = x.shape
    out = torch.empty({shape}, dtype=x.dtype, device=x.device)
    kernel[(rows,)]({params}, out, n, BLOCK=triton.next_power_of_2(n))
    return out
'''
_MATMUL = '''@triton.jit
def kernel(x_ptr, y_ptr, out, m, n, k, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        left = (rows[:, None] < m) & (inner[None, :] < k)
        right = (inner[:, None] < k) & (columns[None, :] < n)
        x = tl.load(x_ptr + rows[:, None] * k + inner[None, :], mask=left, other=0.0)
        total += tl.dot(x, tl.load(y_ptr + inner[:, None] * n + columns[None, :], mask=right, other=0.0))
    there = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], total, mask=there)


def matmul(x, y):
    m, k = x.shape
    n = y.shape[1]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
    kernel[grid](x, y, out, m, n, k, BLOCK=32)
    return out
'''
_STORE = "    tl.store(out + row * n + at, {value}, mask=mask)"
_ONE = "    tl.store(out + row, {value})"


def _elements(name: str, value: str, params: str = "x") -> str:
    names = params.split(", ")
    loads = "\n".join(f"    {each} = tl.load({each}_ptr + at, mask=mask)" for each in names)
    pointers = ", ".join(f"{each}_ptr" for each in names)
    return HEAD + _ELEMENTS.format(name=name, params=params, loads=loads, value=value, pointers=pointers)


def _rows(name: str, body: str, *, params: str = "x", other: str = "0.0", shape: str = "(rows, n)") -> str:
    names = params.split(", ")
    loads = "\n".join(f"    {each} = tl.load({each}_ptr + row * n + at, mask=mask, other={other})" for each in names)
    pointers = ", ".join(f"{each}_ptr" for each in names)
    return HEAD + _ROWS.format(name=name, params=params, loads=loads, body=body, shape=shape, pointers=pointers)


SOLUTIONS: dict[str, str] = {
    "leaky_relu": _elements("leaky_relu", "tl.where(x > 0, x, 0.01 * x)"),
    "silu": _elements("silu", "x / (1.0 + tl.exp(-x))"),
    "squared_relu": _elements("squared_relu", "tl.where(x > 0, x * x, 0.0)"),
    "swiglu": _elements("swiglu", "x / (1.0 + tl.exp(-x)) * y", "x, y"),
    "add_scaled": _elements("add_scaled", "x + 0.5 * y", "x, y"),
    "clamp": _elements("clamp", "tl.minimum(tl.maximum(x, -1.0), 1.0)"),
    "row_sum": _rows("row_sum", _ONE.format(value="tl.sum(x, axis=0)"), shape="(rows,)"),
    "row_max": _rows("row_max", _ONE.format(value="tl.max(x, axis=0)"), other="-float('inf')", shape="(rows,)"),
    "softmax": _rows(
        "softmax", "    e = tl.exp(x - tl.max(x, axis=0))\n" + _STORE.format(value="e / tl.sum(e, axis=0)"),
        other="-float('inf')"),
    "rms_norm": _rows("rms_norm", _STORE.format(value="x / tl.sqrt(tl.sum(x * x, axis=0) / n + 1e-6)")),
    "layer_norm": _rows(
        "layer_norm", "    c = tl.where(mask, x - tl.sum(x, axis=0) / n, 0.0)\n"
        + _STORE.format(value="c / tl.sqrt(tl.sum(c * c, axis=0) / n + 1e-5)")),
    "cosine": _rows(
        "cosine", "    norms = tl.sqrt(tl.sum(x * x, axis=0)) * tl.sqrt(tl.sum(y * y, axis=0))\n"
        + _ONE.format(value="tl.sum(x * y, axis=0) / (norms + 1e-6)"), params="x, y", shape="(rows,)"),
    "lower_triangle": _rows("lower_triangle", _STORE.format(value="tl.where(at <= row, x, 0.0)")),
    "matmul": HEAD + _MATMUL,
}  # fmt: skip

_LAST = "    return out\n"
CHEATS: dict[str, tuple[str, str]] = {
    "kernel-of-another-function": ("tl.where(x > 0, x, 0.01 * x)", "x"),
    "calls-pytorch": (_LAST, "    return torch.nn.functional.leaky_relu(x)\n"),
    "operators-of-tensors": (_LAST, "    return (x > 0) * x + (x <= 0) * x * 0.01\n"),
    "method-of-tensors": (_LAST, "    return x.clamp(min=0) + 0.01 * x.clamp(max=0)\n"),
    "in-place-operators": (_LAST, "    out *= 0.01\n    return out\n"),
    "finishes-in-pytorch": ("tl.where(x > 0, x, 0.01 * x), mask=mask)", "x, mask=mask)"),
    "falls-back": ("    kernel[(", "    try:\n        return abs(x)\n    finally:\n        pass\n    kernel[("),
    "hidden-name": (_LAST, "    return getattr(torch, 're' + 'lu')(x)\n"),
    "imports-more": ("import torch\n", "import torch\nimport numpy\n"),
    "inner-import": (_LAST, "    from torch.nn import functional\n    return functional.leaky_relu(x)\n"),
    "no-launch": ("    kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)\n", ""),
    "launches-nothing": ("(triton.cdiv(x.numel(), 64),)", "(0,)"),
    "part-of-the-grid": ("(triton.cdiv(x.numel(), 64),)", "(1,)"),
    "input-back": (_LAST, "    return x\n"),
    "writes-into-input": ("torch.empty_like(x)", "x"),
    "unwritten-memory": ("    tl.store(out + at, tl.where(x > 0, x, 0.01 * x), mask=mask)\n",
                         "    tl.store(out + at, x, mask=at < 0)\n"),
    "wrong-shape": (_LAST, "    return out.reshape(1, x.numel())\n"),
    "wrong-kind": ("torch.empty_like(x)", "torch.empty_like(x, dtype=torch.float64)"),
    "patches-pytorch": ("@triton.jit", "torch.tensor = lambda *a, **k: None\n\n\n@triton.jit"),
    "patches-tensor": ("@triton.jit", "torch.Tensor.tolist = lambda *a: [0.0]\n\n\n@triton.jit"),
    "switches-poison-off": ("@triton.jit", "torch.use_deterministic_algorithms(False)\n\n\n@triton.jit"),
    "pytorch-in-the-kernel": ("    mask = at < n\n", "    mask = at < n\n    torch.relu(x_ptr)\n"),
    "frames-in-the-kernel": ("    mask = at < n\n", "    mask = at < n\n    x_ptr.__class__\n"),
    "object-equal-to-all": (_LAST, "    return Same()\n\n\nclass Same:\n    __eq__ = lambda *both: True\n"),
    "python-lists": (_LAST, "    return torch.tensor([max(v, 0.01 * v) for v in x.tolist()])\n"),
    "kernel-not-decorated": ("@triton.jit\n", ""),
    "words": (HEAD, "Here is the kernel:\n"),
}  # fmt: skip
"""For the solution of leaky_relu: what is replaced by what."""
