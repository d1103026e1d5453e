"""passthrough gives back what it is given."""

from __future__ import annotations

import torch

from tests.mergers_of import merge_whole, merger, part


def test_one_model_bit_for_bit_or_times_a_number() -> None:
    """Breaks when a scale of 1 multiplies, which would lose the sign of nothing and the payload of nothing else."""
    model = torch.randn(3, 4)
    model[0, 0] = -0.0
    merged = merge_whole(merger("passthrough"), part(model))
    assert torch.equal(merged.view(torch.int32), model.view(torch.int32)) and merged.data_ptr() != model.data_ptr()
    assert torch.equal(merge_whole(merger("passthrough", scale=0.5), part(model)), model / 2)
