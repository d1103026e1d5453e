"""The two places where work is measured, a CPU and a GPU, behind the same few questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import procfs
import torch


@dataclass(frozen=True)
class Device:
    """`cpu` or `cuda`."""

    name: str

    def settle(self) -> None:
        """Wait until all that was asked for is done; a clock that is read before says nothing about a GPU."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> bool:
        """Start the peak anew, so that probes do not count; False where that is not allowed."""
        if self.name != "cuda":
            return procfs.forget_peak()
        # What the probes leave in the allocator's cache would count as reserved.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        procfs.forget_peak()
        return True

    def peak(self) -> dict[str, int | None]:
        """`peak_memory_bytes` is that of the device: on a GPU the bytes of tensors, cache and host apart."""
        host = procfs.peak_memory_bytes()
        if self.name != "cuda":
            return {"peak_memory_bytes": host}
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "peak_host_bytes": host,
        }

    def machine(self) -> dict[str, Any]:
        """Processor, cores and memory, and the GPU if that is where the work is done."""
        gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if self.name == "cuda" else {}
        return procfs.machine() | gpu
