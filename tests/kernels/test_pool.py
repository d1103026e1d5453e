"""The pool of large CPU tensors, in processes of its own: what it maps, gives out again, and leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from luthier.core.errors import MissingError
from luthier.kernels import pool

SOURCE = Path(__file__).resolve().parents[2] / "src"
BEGIN = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
import torch
from luthier.kernels import pool

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

def million():
    return torch.ones(4_000_000, dtype=torch.uint8)

assert pool.install() == "" == pool.install()
"""


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skip where there is nothing to compile it with."""
    try:
        pool._library()
    except MissingError as failure:
        pytest.skip(str(failure))


def run(body: str, *before: str) -> None:
    """A process with the pool that must come to its end."""
    command = [*before, sys.executable, "-c", BEGIN + body]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_freed_is_given_out_again() -> None:
    """Breaks when a freed block is lost, or a tensor gets memory that another one still has."""
    run("""
first = million()
place = first.data_ptr()
del first
again, other = million(), million()
assert again.data_ptr() == place != other.data_ptr()
again.fill_(7)
assert int(other.sum()) == other.numel()
""")


def test_new_blocks_lie_one_behind_the_other() -> None:
    """Breaks when the weights of a model, most of them smaller than a large page, lie in small pages at their ends."""
    run("""
size = 1_605_632
kept = [torch.ones(size, dtype=torch.uint8) for _ in range(40)]
steps = [after.data_ptr() - before.data_ptr() for before, after in zip(kept, kept[1:])]
assert steps.count(size) >= len(steps) - 2, steps
huge = torch.ones(100_000_000, dtype=torch.uint8)
assert int(huge.long().sum()) == huge.numel()
""")


def test_no_more_is_mapped_than_was_once_alive() -> None:
    """Breaks when freed blocks of other sizes pile up, as they do in a heap."""
    run("""
kept = [million() for _ in range(10)]
del kept
most = resident()
for size in range(500_000, 40_000_000, 700_001):
    torch.ones(size, dtype=torch.uint8)
assert resident() - most < 2_000_000, (resident(), most)
pool.release()
assert most - resident() > 30_000_000, (resident(), most)
""")


def test_tensors_may_grow_be_shared_with_numpy_and_be_freed_elsewhere() -> None:
    """Breaks when a way in which torch takes or frees memory goes past the pool's bookkeeping."""
    run("""
import threading
tensor = million()
tensor.resize_(9_000_000)[4_000_000:] = 2
assert int(tensor[:4_000_000].sum()) == 4_000_000
array = tensor.numpy()
del tensor
assert array[-1] == 2 and array[0] == 1
left = torch.rand(700, 700).bfloat16()
assert torch.isfinite(left @ left).all()
made = []
thread = threading.Thread(target=lambda: made.append(million()))
thread.start()
thread.join()
made.clear()
assert million().sum() == 4_000_000
""")


def test_what_was_freed_before_goes_back_to_the_system() -> None:
    """Breaks when weights that were packed before the pool was there stay with the heap, beside what replaced them."""
    run("""
import ctypes
import numpy
# As after a large array was freed once: from then on arrays of its size lie in the heap.
ctypes.CDLL(None).mallopt(-3, 32 * 2 ** 20)
weights, codes = [], []
for _ in range(20):
    weights.append(numpy.ones(4_000_000, numpy.uint8))
    codes.append(numpy.ones(100_000, numpy.uint8))
before = resident()
weights.clear()
pool.install()
assert before - resident() > 60_000_000, (before, resident())
""")


def test_scratch_of_kernels_stays_out_of_the_heap() -> None:
    """Breaks when glibc raises its threshold after the first scratch is freed, and the next lies among what stays."""
    run("""
import ctypes
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def heap():
    return next(line for line in open("/proc/self/maps") if line.endswith("[heap]\\n")).split()[0].split("-")

for _ in range(3):
    scratch = libc.malloc(1_000_000)
    start, end = (int(each, 16) for each in heap())
    assert not start <= scratch < end
    libc.free(scratch)
""")


def test_a_child_of_a_process_with_the_pool_can_allocate() -> None:
    """Breaks when a fork inherits a lock that nobody will open."""
    run("""
import os
# The threads that fill a tensor do not live on in a child, which would wait for them for ever.
torch.set_num_threads(1)
tensor = million()
child = os.fork()
if child == 0:
    del tensor
    million()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""")


def test_a_shortage_is_told_as_torch_tells_it() -> None:
    """Breaks when running out of memory ends a process instead of making micro-batches smaller."""
    run("""
import resource
from luthier.train.shortage import shortage
kept = million()
limit = 10 ** 9 + int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.ones(3 * 10 ** 9, dtype=torch.uint8)
except RuntimeError as failure:
    assert shortage(failure), failure
else:
    raise SystemExit("there was room")
assert million().sum() == kept.sum()
""")


def test_products_of_many_shapes_do_not_pile_up() -> None:
    """Breaks when what oneDNN prepares for a number of tokens is kept after the micro-batch that had it."""
    run("""
pool.bound_caches()
weight = torch.rand(640, 640).bfloat16()
def many(start):
    for rows in range(start, start + 60):
        torch.ones(rows, 640, dtype=torch.bfloat16) @ weight
many(100)
before = resident()
many(200)
many(300)
# Without bounds it is 93 MB.
assert resident() - before < 30_000_000, (before, resident())
""")


def test_what_the_user_has_set_stays() -> None:
    """Breaks when a bound that somebody chose is overruled."""
    environ = {"LRU_CACHE_CAPACITY": "9"}
    pool.bound_caches(environ)
    assert environ == {"LRU_CACHE_CAPACITY": "9", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the heap is used without a word."""
    monkeypatch.setattr("luthier.kernels.native_build.shutil.which", lambda name: None)
    assert "compiler" in pool.install()
