"""The pool: memory of large CPU tensors that is given out again as it was freed, so that a process takes what it uses.

Idea: torch takes each tensor from the C library's heap, which falls into pieces: a freed place is not used again for a
tensor of the same size once something small lies beside it. The pool keeps freed blocks by size and never maps more
than was once alive, so the peak of a process is the peak of its tensors. It is torch's own hook for allocators; smaller
tensors stay where they were. See pool/pool.cpp for how.
Cost: none that was measured: pages are not taken anew, which saves more time than the pool takes (docs/performance.md).
Use when: training on a CPU, with a compiler on Linux. Not when: somebody else's process only imports this package:
    nothing is installed before a run begins, and it stays for the life of the process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

import torch

from luthier.core.errors import MissingError
from luthier.kernels.native_build import library

SOURCES: Final = Path(__file__).parent / "pool"
_CAPACITIES: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "1"}
"""oneDNN's own cache, and the one that torch has around it."""


def bound_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let oneDNN keep what it has prepared for few shapes of products; call it before the first product in bfloat16.

    It writes machine code for each shape, and torch and it keep 1,024 of these each. In training the number of tokens
    differs from micro-batch to micro-batch, so nearly none is ever used again: 24 micro-batches of different sizes took
    737 MB (hidden size 256, torch 2.13), and bounded they take less than 1 MB and a sixth less processor time. The
    bound is above the shapes of one pass, whose blocks do share them. What the user has set stays.
    """
    for name, value in _CAPACITIES.items():
        environ.setdefault(name, value)


def install() -> str:
    """Let torch take large CPU tensors from the pool, from now on; why not where that is impossible, else empty.

    Doing it twice changes nothing.
    """
    try:
        _library().pool_install()
    except MissingError as failure:
        return str(failure)
    return ""


def release() -> None:
    """Give back to the system what the pool keeps and nobody uses. Raises MissingError where there can be no pool."""
    _library().pool_release()


def _library() -> ctypes.CDLL:
    # Compiled against torch's headers: another version of torch needs another library.
    home = Path(torch.__file__).parent
    headers, libraries = home / "include", home / "lib"
    if not (headers / "c10" / "core" / "Allocator.h").is_file():
        raise MissingError(f"torch has come without its headers: {headers} has no c10/core/Allocator.h")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    version = f'-DTORCH_VERSION="{torch.__version__}"'
    link = ("-Wl,--no-as-needed", f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}")
    flags = ("-std=c++20", "-O2", "-fPIC", "-shared", abi, version, f"-I{headers}", *link)
    loaded, _ = library(SOURCES, flags)
    return loaded
