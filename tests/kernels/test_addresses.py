"""What has no numbers to be read never reaches the C++: a process that it would end says an error instead."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.kernels.addresses import nowhere
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.thin import ThinFactors, ThinTerms
from tests.cli.commands import environ

CALLS = """
import torch
from luthier.core.errors import RecipeError
from luthier.kernels.native_backend import NativeBackend

native = NativeBackend.build()


def calls(device):
    x, weight, wide = (torch.empty(*shape, device=device) for shape in ((2, 8), (8,), (8, 8)))
    heads = torch.empty(2, 2, 4, device=device)
    half = torch.empty(2, 2, device=device)
    number = torch.zeros(2, dtype=torch.int64, device=device)
    codes = torch.zeros(8, 8, dtype=torch.int8, device=device)
    kept = torch.empty(2, 2, device=device)
    yield lambda: native.norm(x, weight, 1e-5)
    yield lambda: native.norm_backward(x, x, weight, torch.empty(2, 1), None)
    yield lambda: native.gated(x, x)
    yield lambda: native.gated_backward(x, x, x)
    yield lambda: native.rotated(heads, half, half)
    yield lambda: native.label_slopes(x, number, slopes=True)
    yield lambda: native.best(x)
    yield lambda: native.unpacked(codes.view(torch.uint8).flatten(), weight, torch.zeros(16), 16, 128, torch.float32)
    yield lambda: native.attend(heads, heads, heads, [(1, 2)], 1.0, None)
    yield lambda: native.attend_backward(heads, heads, heads, heads, heads, (kept,), [(1, 2)], 1.0, None)
    yield lambda: native.product(x, wide, None)
    yield lambda: native.product(torch.zeros(2, 8), wide, None)
    yield lambda: native.product_of_bytes(x, codes, weight)
    yield lambda: native.unpacked_rows(codes, weight, torch.float32)


for call in calls("meta"):
    try:
        call()
    except RecipeError as error:
        assert "meta" in str(error), error
    else:
        raise SystemExit("nothing was said")
for call in calls("cpu"):
    call()
print("alive")
"""


def test_tensors_without_numbers_are_refused_and_the_process_lives() -> None:
    """Breaks when an operation in C++ is handed an address that is none; in a process of its own, as it would end."""
    # Compiled here, where workers wait for each other; the process finds it.
    NativeBackend.build()
    done = subprocess.run(
        [sys.executable, "-c", CALLS], capture_output=True, text=True, check=False, env=environ(), timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-2000:]


def test_factors_of_terms_are_refused_too() -> None:
    """Breaks when the address is kept in a table, where no call would look at it."""
    empty = torch.empty(2, 4, device="meta")
    with pytest.raises(RecipeError, match="numbers lie nowhere"):
        ThinTerms().put(0, ThinFactors(empty, empty, 1.0))


def test_a_tensor_of_no_numbers_has_the_address_of_nothing() -> None:
    assert nowhere(torch.empty(0, 4)) == 0
