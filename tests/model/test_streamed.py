"""A model whose weights pass by: it computes what the whole one does, and remembers what it has multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.kernels.floats import widened
from luthier.kernels.vectors import PlainVectors
from luthier.model.comparing import streamed
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.comparing.sketches import Sketching, sketched
from luthier.model.comparing.streamed import RowSource, StreamedModel
from luthier.model.files.array_views import tensor_of
from luthier.model.files.shards import Shards
from luthier.model.load import config_of, load_model
from tests import task_folders

PROMPTS = [np.arange(3, 3 + size, dtype=np.int32) for size in (9, 20, 1)]


class Passing(RowSource):
    """The tensors of a folder, seven rows at a time; `most` is the largest block that was given."""

    def __init__(self, folder: Path) -> None:
        self.shards = Shards(folder)
        self.slots = self.shards.slots
        self.asked: list[str] = []

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        self.asked.append(name)
        for first in range(0, self.slots[name].rows, 7):
            yield widened(self.shards.read(name, first, min(first + 7, self.slots[name].rows)))


def test_it_computes_what_the_whole_model_does(every_tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a row is at another place, padding is seen, or a table lacks a row that a prompt asks for."""
    monkeypatch.setattr(streamed, "_TABLE", 0)
    rows = Passing(every_tiny_path)
    model = StreamedModel(config_of(str(every_tiny_path)), rows, "it")
    whole = ModelSide("whole", load_model(str(every_tiny_path), precision="float32"))
    for prompt, logits in zip(PROMPTS, model.logits(PROMPTS), strict=True):
        np.testing.assert_allclose(logits, whole.logits(prompt), rtol=0, atol=2e-5)
    # Nothing stays: what the module holds afterwards are numbers that stand for tensors.
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.module.parameters())
    assert len(rows.asked) <= len(rows.slots) + 1, "a tied table twice, all others once"
    before = list(rows.asked)
    wanted = sketched((name, tensor_of(each)) for name, each in rows.shards.each())
    found = model.sketches()
    assert rows.asked == before and found.keys() == wanted.keys()
    assert all(wanted[name].apart(found[name]) < 1e-9 and found[name].norm == pytest.approx(wanted[name].norm)
               for name in wanted)  # fmt: skip


def test_a_sketch_that_grows_in_pieces_is_that_of_the_whole() -> None:
    """Breaks when a sign or a bucket depends on where a piece begins."""
    tensor = torch.randn(3, 100_003, generator=torch.Generator().manual_seed(0))
    growing = Sketching(PlainVectors())
    for piece in tensor.reshape(-1).split(70_001):
        growing.add(piece.numpy())
    whole = sketched([("x", tensor)])["x"]
    np.testing.assert_allclose(growing.sketch(whole.shape).sums, whole.sums, atol=1e-2)
    assert growing.sketch(whole.shape).norm == pytest.approx(whole.norm)


def test_what_cannot_be_streamed_is_told(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Breaks when padding is shown to a model that sees what lies behind."""
    bert = task_folders.bert_folder(tmp_path / "bert")
    with pytest.raises(RecipeError, match="does not read from left to right"):
        StreamedModel(config_of(str(bert)), Passing(bert), "it")
