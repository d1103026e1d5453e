"""The threads behind products of a few rows, torch's or ours: they change no number, and two may call at once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from luthier.kernels import native_build
from luthier.kernels.backend import Backend
from luthier.kernels.chosen import backend_for


@pytest.fixture(scope="module")
def native() -> Backend:
    backend, missing = backend_for("auto", torch.device("cpu"), torch.float32)
    if backend.name != "native":
        pytest.skip(f"no C++ kernels here: {missing}")
    return backend


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 512, generator=generator).to(dtype),
        torch.randn(1201, 512, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(native: Backend, dtype: torch.dtype) -> None:
    """Breaks when a sum is cut between threads, or a piece is done twice or never."""
    x, weight = operands(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [native.product(x, weight, None) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], each) for each in found)
    slack = 0.5 if dtype == torch.bfloat16 else 1e-3
    assert torch.allclose(found[0].float(), x.float() @ weight.float().t(), atol=slack)


def test_several_threads_may_call_at_once(native: Backend) -> None:
    """Breaks when two callers share pieces, or wait for each other's helpers for ever."""
    x, weight = operands(torch.float32)
    expected, wrong = native.product(x, weight, None), []

    def call() -> None:
        for _ in range(200):
            if not torch.equal(native.product(x, weight, None), expected):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_calls_at_once_have_memory_of_their_own(native: Backend) -> None:
    """Breaks when what is kept for the next call is given to two, or is too small for who gets it: rows of an odd size
    are copied before they are multiplied, here into 50 kB to 800 kB."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 3001, generator=generator).bfloat16()
    rows = [torch.randn(count, 3001, generator=generator).bfloat16() for count in (8, 130, 16, 64, 31, 128)]
    expected = [native.product(x, weight, None) for x in rows]
    for x, found in zip(rows, expected, strict=True):
        assert torch.allclose(found.float(), x.float() @ weight.float().t(), atol=2.0)
    wrong: list[int] = []

    def call(first: int) -> None:
        for turn in range(40):
            own = (first + turn) % len(rows)
            if not torch.equal(native.product(rows[own], weight, None), expected[own]):
                wrong.append(own)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


COUNTING = """
#include "team.h"
// How often each piece is done, `rounds` times over. Some take long, so that others take over what is left of a share.
extern "C" void count_pieces(int64_t pieces, int64_t rounds, int32_t* counts) {
    for (int64_t round = 0; round < rounds; round++)
        Team::run(pieces, [&](int64_t piece, int) {
            for (int64_t i = 0; i < (piece * 7 + round) % 11 * 200; i++) breathe();
            __atomic_fetch_add(counts + piece, 1, __ATOMIC_RELAXED);
        }, true);
}
"""


def test_each_piece_is_done_once(native: Backend, tmp_path: Path) -> None:
    """Breaks when a piece that was taken over is left out, or is done by the one it was taken from too."""
    (tmp_path / "counting.cpp").write_text(COUNTING)
    headers = sorted(native_build.SOURCES.glob("*.h"))
    counting, _ = native_build.library(tmp_path, (*native_build.FLAGS, f"-I{native_build.SOURCES}"), headers=headers)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for pieces in (1, 2, 3, 6, 7, 8, 40, 129):
                counts = torch.zeros(pieces, dtype=torch.int32)
                counting.count_pieces(ctypes.c_int64(pieces), ctypes.c_int64(30), ctypes.c_void_p(counts.data_ptr()))
                assert counts.tolist() == [30] * pieces
    finally:
        torch.set_num_threads(before)


OURS = """
import os, sys, tempfile, torch
from pathlib import Path
from tests.kernels import test_team
from luthier.kernels.chosen import backend_for
torch.set_num_threads(2)
b, _ = backend_for('auto', torch.device('cpu'), torch.float32)
if b.name != 'native': sys.exit(77)
for dtype in (torch.float32, torch.bfloat16):
    test_team.test_the_number_of_threads_changes_no_bit(b, dtype)
test_team.test_several_threads_may_call_at_once(b)
with tempfile.TemporaryDirectory() as folder:
    test_team.test_each_piece_is_done_once(b, Path(folder))
x, w = torch.ones(2, 512), torch.ones(1200, 512)
child = os.fork()
fine = bool((b.product(x, w, None) == 512).all())
if child == 0: os._exit(0 if fine else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(0 if fine and code == 0 else 1)
"""


def test_all_of_it_holds_for_threads_of_our_own(native: Backend) -> None:
    """Breaks when a server's team loses or repeats a piece, or a fork waits for helpers that only its parent has."""
    home = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{home / 'src'}{os.pathsep}{home}", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OURS], timeout=120, check=False, env=environment)
    assert done.returncode == 0
