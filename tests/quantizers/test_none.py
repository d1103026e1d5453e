"""No quantizer: nothing is packed, and a run without one is the run there was."""

from __future__ import annotations

import torch

from luthier.kernels.torch_backend import TorchBackend
from luthier.quantizers.none import Unpacked
from luthier.recipes.opening.quantized import kept_quantizer, quantize
from tests import forests


def test_nothing_happens() -> None:
    """Breaks when weights are touched, or a result of older days is taken for a quantized one."""
    method = Unpacked()
    assert method.pack(torch.ones(4, 4), TorchBackend()) is None and method.packed_bytes((4, 4)) is None
    model = forests.language_model("llama")
    before = forests.snapshot(model.module)
    quantize(model, method)
    assert forests.snapshot(model.module) == before and kept_quantizer({}) == method
