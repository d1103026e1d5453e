"""Whether a run records CUDA graphs of its passes (model/running/graphs.py): by rule, so that nobody has to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from luthier.kernels.triton_backend import TritonBackend
from luthier.model.editing.edits import base_parameters
from luthier.model.language_model import LanguageModel
from luthier.model.running.graphs import Graphs, Recorder, cuda_recorder

SMALL: Final = 1_000_000_000
"""Parameters below which a GPU may wait for its host; in larger models products take longer than to start them."""


def worth_recording(model: LanguageModel, *, alone: bool) -> bool:
    """Whether passes of this model would be recorded: a small one on a GPU, by our kernels, all of it kept."""
    blocks = model.executor.blocks
    if blocks is None or blocks.recomputed or model.device.type != "cuda" or not alone:
        return False
    sizes = {id(each): each.numel() for each in base_parameters(model.module).values()}
    return isinstance(blocks.backend, TritonBackend) and sum(sizes.values()) < SMALL


def recorded(
    model: LanguageModel, most: int, *, alone: bool, recorder: Callable[[], Recorder] = cuda_recorder
) -> Graphs | None:
    """From now on let passes of up to `most` tokens be recorded and played again, where that is worth it."""
    blocks = model.executor.blocks
    if blocks is None or not worth_recording(model, alone=alone):
        return None
    graphs = Graphs(recorder(), most)
    model.executor = replace(model.executor, blocks=replace(blocks, graphs=graphs))
    return graphs
