"""Running out of memory: what it looks like, what is given back before a retry, and what is said when none is left.

Idea: a loss is a sum, so a step that does not fit may be done again in smaller micro-batches and its gradient is the
same. What must not stay behind is what the failed attempt held: the exception keeps its frames, the frames keep the
graph, and the graph keeps the activations.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from luthier.core.errors import LuthierError, MemoryExhaustedError
from luthier.core.units import bytes_text
from luthier.data.forest import Tree

_SIGNS: Final = (
    "defaultcpuallocator",  # torch 2.13 on the CPU: RuntimeError, "can't allocate memory: you tried to allocate ..."
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",  # CUDA calls outside torch's own allocator
    "std::bad_alloc",
    "alloc_failed",  # cuBLAS and cuDNN workspaces
    "could not create a memory object",  # oneDNN
)
_LONGEST_REASON: Final = 200
_CONSUMERS: Final = 3
REMEDY: Final = (
    "lower data.max_tokens (with data.over_length: truncate or drop), take precision: bfloat16 or an adapter that "
    "trains less, or free memory that other programs hold"
)


@dataclass(frozen=True)
class Split:
    """Micro-batches were made smaller because memory ran out; no gradient is changed by it."""

    from_tokens: int
    to_tokens: int
    reason: str


def shortage(failure: BaseException) -> str | None:
    """What ran out, in one line, when `failure` means that memory did; None for every other failure."""
    if isinstance(failure, LuthierError):
        return None
    lines = str(failure).strip().splitlines()
    text = (lines[0] if lines else type(failure).__name__)[:_LONGEST_REASON]
    if isinstance(failure, (MemoryError, torch.OutOfMemoryError)):
        return text
    signs = isinstance(failure, RuntimeError) and any(sign in str(failure).lower() for sign in _SIGNS)
    return text if signs else None


def release(device: torch.device) -> None:
    """Give back what a failed attempt may still hold; call it once its exception is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def exhausted(tree: Tree | None, reason: str, planned: Mapping[str, int]) -> MemoryExhaustedError:
    """The error when the smallest micro-batch does not fit: which row, and what needs the memory."""
    biggest = sorted(planned.items(), key=lambda item: -item[1])[:_CONSUMERS]
    needs = ", ".join(f"{name} {bytes_text(size)}" for name, size in biggest)
    row = "" if tree is None else f" for row {tree.row} alone ({tree.token_count:,} tokens)"
    plan = f"; the largest parts of the plan are {needs}" if needs else ""
    return MemoryExhaustedError(
        f"there is not enough memory{row}, and its micro-batch cannot be made smaller ({reason}){plan}",
        allowed="the longest row, forward and backward, in the memory that is free",
        do=REMEDY,
    )
