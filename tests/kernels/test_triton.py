"""The Triton kernels without a GPU: run in the interpreter, compiled for chips, and read for what neither shows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.errors import MissingError
from luthier.kernels import triton_backend, varlen
from luthier.kernels.backend import Seen
from luthier.kernels.chosen import backend_for
from luthier.kernels.torch_backend import TorchBackend
from luthier.kernels.triton_backend import NUMBERS, VOCABULARY_PART, Tile, TritonBackend
from tests.kernels import test_backends
from tests.kernels.flash_stand_in import stand_in

KERNELS = Path(triton_backend.__file__).parent / "triton_rows.py"
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NO_TRITON = "triton is not installed: no wheel for this platform"
NAN = float("nan")
SHARED_BYTES = 227 * 1024
"""Of one thread block on sm_90; sm_80 has 163 KB, and these kernels need a few dozen bytes."""
BROAD = Tile.of_rows(4096)
PART = Tile.of_rows(14_336, longest=1024)
HEADS = Tile.of_rows(64)
# Each kernel: what its arguments are ("*" a tensor of rows, "*f" of float32), and its constants in the order they come.
COMPILED: dict[str, tuple[str, list[tuple[Any, ...]], int]] = {
    "norm": ("* * * *f i i i f", [(known, BROAD.rows, BROAD.width) for known in (False, True)], BROAD.warps),
    "norm_backward": (
        "* * * *f * * i i i i i", [(added, BROAD.rows, BROAD.width) for added in (False, True)], BROAD.warps,
    ),
    "gated": ("* * * i i i i", [(PART.rows, PART.width)], PART.warps),
    "gated_backward": ("* * * * i i i i", [(PART.rows, PART.width)], PART.warps),
    "rotated": ("* * * * i i i i i i i", [(HEADS.rows, HEADS.width)], HEADS.warps),
    "label_slopes": (
        "* *l *f i i", [(slopes, VOCABULARY_PART) for slopes in (False, True)], VOCABULARY_PART // 512,
    ),
    "unpacked_rows": ("*c *f * i i", [(PART.rows, PART.width)], PART.warps),
    "unpacked": ("*b *f *f * i i", [(NUMBERS // 2,)], NUMBERS // 512),
}  # fmt: skip
KINDS = {"*f": "*fp32", "*l": "*i64", "*b": "*u8", "*c": "*i8", "i": "i32", "f": "fp32"}


def test_in_the_interpreter() -> None:
    """Breaks when a kernel differs from its twin; the process shows which one, in which of the tests of interpreted.py.

    A process of its own, because triton decides when it is imported whether it interprets.
    """
    pytest.importorskip("triton", reason=NO_TRITON)
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib", "--noconftest", "-p",
               "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(HERE / "interpreted.py")]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout and "failed" not in done.stdout


@pytest.mark.parametrize("rows", ["bf16", "fp32"])
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_compiled_for_a_chip(chip: int, rows: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Breaks when a kernel is no program for this chip, wants more shared memory than there is, or spills registers.

    At the sizes of an 8B model; every argument is taken to be a multiple of 16, as at a launch with such sizes.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    triton = pytest.importorskip("triton.compiler", reason=NO_TRITON)
    from triton.backends.compiler import GPUTarget

    from luthier.kernels import triton_rows

    assert set(COMPILED) == kernel_names(), "every kernel has a line in COMPILED"
    for name, (kinds, constants, warps) in COMPILED.items():
        kernel = vars(triton_rows)[name]
        for values in constants:
            given = [KINDS.get(kind, f"*{rows}") for kind in kinds.split()]
            named = dict(zip(kernel.arg_names[len(given) :], values, strict=True))
            signature = {**dict(zip(kernel.arg_names, given, strict=False)), **dict.fromkeys(named, "constexpr")}
            even = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(given) if kind != "fp32"}
            source = triton.ASTSource(fn=kernel, signature=signature, constexprs=named, attrs=even)
            options = {"num_warps": warps, "enable_fp_fusion": False}
            compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
            assert compiled.asm["cubin"][:4] == b"\x7fELF", name
            assert compiled.metadata.shared <= SHARED_BYTES, name
            made = tmp_path / f"{name}.cubin"
            made.write_bytes(compiled.asm["cubin"])
            assert on_stack(made) == 0, f"{name}{values} spills registers"


@pytest.mark.parametrize("small", ["n", "d", "f", "heads", "half", "size", "numbers"])
def test_compiled_for_a_size_of_one(small: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Breaks when a kernel cannot be compiled for one row, or one column: a launcher makes constants of these."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    triton = pytest.importorskip("triton.compiler", reason=NO_TRITON)
    from triton.backends.compiler import GPUTarget

    from luthier.kernels import triton_rows

    for name, (kinds, constants, warps) in COMPILED.items():
        kernel = vars(triton_rows)[name]
        given = dict(zip(kernel.arg_names, [KINDS.get(kind, "*bf16") for kind in kinds.split()], strict=False))
        if small in given:
            constant = {small: 1, **dict(zip(kernel.arg_names[len(given) :], constants[-1], strict=True))}
            options = {"num_warps": warps, "enable_fp_fusion": False}
            source = triton.ASTSource(kernel, {**given, **dict.fromkeys(constant, "constexpr")}, constant)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert made.asm["cubin"]


def on_stack(cubin: Path) -> int:
    """Bytes of local memory of a compiled kernel: what did not fit into registers."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(word.split(":", 1) for line in told.splitlines() for word in line.split() if word.count(":") == 1)
    return int(used["STACK"]) + int(used["LOCAL"])


# --------------------------------------------------------------------------------------------- read, not run


def test_nothing_loaded_is_reckoned_with_before_it_is_wide() -> None:
    """Breaks when a kernel computes in the precision of its rows, which the interpreter gets wrong without a word."""
    assert not complaints(ast.parse(KERNELS.read_text("utf-8")))


def test_arithmetic_in_the_precision_of_the_rows_would_be_seen() -> None:
    assert complaints(ast.parse("y = tl.load(x) * 2"))
    assert complaints(ast.parse("y = tl.load(x).to(tl.bfloat16)"))
    assert complaints(ast.parse("y = a.to(out.dtype.element_ty) * b"))
    assert complaints(ast.parse("tl.store(out, a + b)"))
    assert complaints(ast.parse("y = tl.dot(a, b)"))
    assert not complaints(ast.parse("y = tl.load(x).to(tl.float32)\ntl.store(out, y.to(out.dtype.element_ty))"))
    assert not complaints(ast.parse("y = (a * b).to(out.dtype.element_ty).to(tl.float32) * c"))


def test_kernels_need_no_gpu_to_be_chosen() -> None:
    """Breaks when a kernel is autotuned, which asks for a GPU, or calls libdevice, which the interpreter has not."""
    text = KERNELS.read_text("utf-8")
    assert "@triton.autotune" not in text and "import libdevice" not in text


WIDE = {"tl.float32", "tl.int64", "tl.int32"}


def complaints(tree: ast.AST) -> list[str]:
    """Where something loaded, or rounded on the way, is used before it is float32 again.

    A load is widened at once. What is cast to the precision of the rows goes into a store, or is widened at once.
    """
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        line = f"{node.lineno}: {ast.unparse(node)}"
        if called == "tl.dot":
            found.append(f"{line}: products need a rule of their own here")
        if called == "tl.load" and not widened(node, parents):
            found.append(f"{line}: not widened where it is loaded")
        if called.endswith(".to") and ast.unparse(node.args[0]) not in WIDE:
            above = parents[node]
            stored = isinstance(above, ast.Call) and ast.unparse(above.func) == "tl.store" and node in above.args
            if not (stored and goal(node) == "element_ty") and not widened(node, parents):
                found.append(f"{line}: rounded, and not widened again")
        if called == "tl.store" and not cast_or_wide(node):
            found.append(f"{line}: stored in a precision that is not said")
    return found


def widened(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether the very next thing done with a value is `.to(tl.float32)`, or to whole numbers as wide."""
    attribute = parents.get(node)
    call = parents.get(attribute) if attribute is not None else None
    return (
        isinstance(attribute, ast.Attribute)
        and attribute.attr == "to"
        and isinstance(call, ast.Call)
        and ast.unparse(call.args[0]) in WIDE
    )


def goal(cast: ast.Call) -> str:
    return ast.unparse(cast.args[0]).rpartition(".")[2]


FLOAT32_RESULTS = {"inverse", "log_probs"}


def cast_or_wide(store: ast.Call) -> bool:
    """Whether a store says the precision of its result, or goes into one that is float32 whatever the rows are."""
    where = next(node.id for node in ast.walk(store.args[0]) if isinstance(node, ast.Name))
    return where in FLOAT32_RESULTS or (isinstance(store.args[1], ast.Call) and goal(store.args[1]) == "element_ty")


def kernel_names() -> set[str]:
    tree = ast.parse(KERNELS.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# --------------------------------------------------------------------------------------------- chosen, or not


def test_triton_is_not_imported_before_it_is_wanted() -> None:
    """Breaks when choosing kernels for a CPU pays for those of a GPU."""
    program = (
        "import sys, torch; before = 'triton' in sys.modules; from luthier.kernels.chosen import backend_for;"
        "backend_for('auto', torch.device('cpu'), torch.float32); assert before or 'triton' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_kernels_for_another_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when what was asked for by name is quietly something else."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(MissingError, match="run on a GPU"):
        backend_for("triton", torch.device("cpu"), torch.float32)
    with pytest.raises(MissingError, match="run on a CPU"):
        backend_for("native", torch.device("cuda"), torch.float32)


def test_a_gpu_without_triton_takes_plain_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a missing package ends a run, or is passed over in silence."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # type: ignore[arg-type]
    backend, reason = backend_for("auto", torch.device("cuda"), torch.bfloat16)
    assert isinstance(backend, TorchBackend) and "needs the package triton" in reason
    with pytest.raises(MissingError, match=r"luthier\[gpu\]"):
        backend_for("triton", torch.device("cuda"), torch.bfloat16)


def test_a_gpu_on_which_triton_fails_takes_plain_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a missing C compiler, which Triton's launcher needs, comes up in the middle of a run."""
    pytest.importorskip("triton", reason=NO_TRITON)

    def launch(self: TritonBackend, *arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(TritonBackend, "_run", launch)
    with pytest.raises(MissingError, match="do not run on this cpu device: Failed to find C compiler"):
        TritonBackend.build(torch.device("cpu"), torch.float32)


# --------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("dtype", "size", "fits"),
    [(torch.bfloat16, 64, True), (torch.float16, 192, True), (torch.float32, 64, False), (torch.bfloat16, 20, False),
     (torch.bfloat16, 256, False)],
)  # fmt: skip
def test_what_flash_attention_takes(dtype: torch.dtype, size: int, fits: bool) -> None:
    """Breaks when a head goes to an operation that would refuse it, its backward pass maybe."""
    query = torch.empty(3, 2, size, dtype=dtype)
    assert varlen.fits(query) == fits
    assert not varlen.allowed(query), "not on a CPU"


def test_the_operations_of_torch_are_called_as_they_are_declared() -> None:
    """Breaks when torch's operation has other arguments: shapes are all that can be known of it without a GPU."""
    query, key, value = (torch.empty(9, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    places = varlen.find_places([(2, 3), (1, 3)], None, torch.device("meta"))
    out, log_sums = varlen.attend(query, key, value, places, 0.25)
    assert out.shape == query.shape and log_sums.shape == (4, 9)
    grads = varlen.attend_backward(out, query, key, value, out, log_sums, places, 0.25)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


def test_places_of_texts_and_of_what_they_see() -> None:
    """Breaks when a text's keys are not in the order of its path, or the longest text is not the longest."""
    cpu = torch.device("cpu")
    alone = varlen.find_places([(2, 3), (1, 4)], None, cpu)
    assert alone.queries.tolist() == alone.keys.tolist() == [0, 3, 6, 10] and alone.rows is None
    assert alone.longest_queries == alone.longest_keys == 4
    seen = Seen((((0, 2),), ((0, 2), (2, 3)), ()), outside=2)
    places = varlen.find_places([(1, 3), (1, 1), (1, 2)], seen, cpu)
    assert places.queries.tolist() == [0, 3, 4, 6] and places.keys.tolist() == [0, 5, 11, 13]
    assert places.rows is not None and places.rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert (places.longest_queries, places.longest_keys) == (3, 6)
    finder = varlen.Finder()
    first = finder.places([(2, 3)], None, cpu)
    assert finder.places([(2, 3)], None, cpu) is first and finder.places([(3, 3)], None, cpu) is not first


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """The backend with plain torch where a GPU would have to be: for what lies around torch's operation."""
    pytest.importorskip("triton", reason=NO_TRITON)
    from luthier.kernels import triton_rows

    stand_in(monkeypatch)
    return TritonBackend(triton_rows)


def test_what_lies_around_the_operation(stood_in: TritonBackend) -> None:
    """Breaks when a shared key does not get the gradients of all that saw it."""
    test_backends.test_attention(stood_in, torch.float32, 4, 2, 16)
    for outside, size in ((0, 10), (3, 16)):
        test_backends.test_attention_after_what_is_seen(stood_in, torch.float32, outside, size)
    test_backends.test_what_is_not_finite_stays_in_its_text(stood_in, torch.float32, NAN)
