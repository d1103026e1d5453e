"""Small operators as PyTorch programs, to be replaced by kernels: data for the rewards `kernel` and `kernel_speed`."""

from __future__ import annotations

from importlib.resources import files


def kernel_rows() -> str:
    """The rows, one JSON object a line: prompt, function, reference, inputs to check with, sizes to time with."""
    return files("luthier.assets").joinpath("triton_kernels.jsonl").read_text("utf-8")
