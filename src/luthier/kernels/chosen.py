"""Which backend runs a model: the best for its device and precision, or the one that LUTHIER_KERNELS names.

    auto      the best there is (when it is not set)
    torch     none: the zoo's own modules run one by one
    blocks    our operations in plain torch
    native    our operations in C++, compiled once for this CPU
    triton    our operations as Triton kernels, on a GPU
A backend that is asked for and cannot run here is an error; `auto` says why it did not take it.
"""

from __future__ import annotations

from types import ModuleType

import torch

from luthier.core.errors import MissingError
from luthier.kernels.backend import Backend
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.torch_backend import TorchBackend
from luthier.kernels.triton_backend import TritonBackend

BEST = {"cpu": "native", "cuda": "triton"}
"""What `auto` takes on a kind of device; plain torch on all others."""


def backend_for(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend, and why it is not a better one; empty when it is the best.

    Raises MissingError when `choice` names one that cannot run here.
    """
    kind = BEST.get(device.type, "blocks") if choice == "auto" else choice
    if kind in ("torch", "blocks") or dtype not in (torch.float32, torch.bfloat16):
        return TorchBackend(), ""
    try:
        return _build(kind, device, dtype), ""
    except MissingError as failure:
        if choice != "auto":
            raise
        return TorchBackend(), str(failure)


def planned_backend(choice: str, kind: str, dtype: torch.dtype) -> Backend:
    """The backend that would run a model on a `kind` of device, which need not be here: for plans, to be asked only."""
    if kind == "cuda" and choice in ("auto", "triton") and dtype in (torch.float32, torch.bfloat16):
        # It launches kernels when it computes, and not before.
        return TritonBackend(ModuleType("triton_rows"))
    return backend_for(choice, torch.device(kind), dtype)[0]


def _build(kind: str, device: torch.device, dtype: torch.dtype) -> Backend:
    if kind == "triton":
        return TritonBackend.build(device, dtype)
    if device.type != "cpu":
        raise MissingError(
            f"C++ kernels run on a CPU, and the model is on {device.type}", do="leave LUTHIER_KERNELS out"
        )
    return NativeBackend.build()
