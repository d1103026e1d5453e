"""What was written against what is computed anew: the same passes, one other number or none at all does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import GateError
from luthier.merge.parents import Parent
from luthier.merge.plan import Wanted, plan
from luthier.merge.proof import prove
from luthier.merge.settings import Setting
from luthier.merge.stream import Room, stream
from luthier.model.files.array_views import array_type
from luthier.model.files.shards import SINGLE, ShardWriter
from tests.merge.models_of import folder, tensors
from tests.mergers_of import merger

MEMORY = 10**8
HEAD = "lm_head.weight"
"""The only tensor of its role, so one of those that are computed anew."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["slerp", "ties"])
@pytest.mark.parametrize("spoilt", [None, 1.01, float("nan"), float("inf")])
def test_a_number_that_was_not_computed_is_found(
    name: str, dtype: torch.dtype, spoilt: float | None, tmp_path: Path
) -> None:
    """Breaks when the proof lets other numbers pass, or what is no number at all."""
    places = [folder(tmp_path / str(seed), tensors(seed=seed)) for seed in (1, 2, 0)]
    parents = [Parent.open(place.name, str(place)) for place in places]
    based = name == "ties"
    wanted = Wanted(merger(name), (0, 1), 2 if based else None, (Setting.of(1.0, "weight"),) * 2, array_type(dtype),
                    {}, ())  # fmt: skip
    planned, out = plan(parents, wanted), tmp_path / "out"
    out.mkdir()
    with ShardWriter(out, planned.slots) as writer:
        stream(parents, planned, writer, Room(MEMORY, 2))
    if spoilt is None:
        assert prove(out, parents, planned, MEMORY) > 3
        return
    held = load_file(out / SINGLE)
    held[HEAD][3, 2] *= spoilt
    save_file(held, out / SINGLE, metadata={"format": "pt"})
    with pytest.raises(GateError, match='"lm_head.weight" was written with 1 numbers'):
        prove(out, parents, planned, MEMORY)
