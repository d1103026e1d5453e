"""Pairs of tiny models, before and after: a LoRA, all weights moved, and nothing moved at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from luthier.adapters.lora import LoRA
from luthier.data.forest import Segment, Tree, pack
from luthier.model.comparing.base_spectra import BaseSpectra
from luthier.model.comparing.pair import Gradients, Pair, Text, pair_of_adapter, pair_of_models
from luthier.model.language_model import LanguageModel
from tests import forests

IDS = tuple(np.array([5, 17, 90, 3, 44, 71, 8, 8, 120, step], dtype=np.int32) for step in range(3))


def loss(model: LanguageModel) -> float:
    """The mean negative log-probability of a few made-up texts."""
    model.train(False)
    trees = [Tree((Segment(ids, np.ones(len(ids), np.float32)),)) for ids in IDS]
    with torch.no_grad():
        found = [model.token_outputs(forest).log_probs for forest in pack(trees, max_tokens=64)]
    return -float(torch.cat(found).mean())


def gradients(count: int) -> Iterator[Tensor]:
    """Gradients of mean one and variance one."""
    draws = torch.Generator().manual_seed(0)
    yield from (1 + torch.randn(16, generator=draws) / 2 for _ in range(count))


def _more(folder: Path | None, settings: dict[str, object]) -> dict[str, object]:
    texts = (Text("the task", "task", lambda model: -loss(model)), Text("old text", "kept", loss))
    return {"settings": settings, "texts": texts, "samples": IDS, "spectra": BaseSpectra(folder),
            "gradients": Gradients(gradients, rows=4, step_rows=8.0, row_tokens=10.0)}  # fmt: skip


def lora_pair(kind: str, *, std: float = 0.3, folder: Path | None = None) -> tuple[Pair, LanguageModel]:
    """A LoRA of rank 4 with random factors; with `std` 0 it is at its start."""
    model = forests.language_model(kind)
    method = LoRA(rank=4, alpha=8.0)
    torch.manual_seed(0)
    attachment = model.attach(method.attach(model.sites))
    if std:
        forests.shake(attachment.named_parameters().values(), seed=1, std=std)
    return pair_of_adapter(model, **_more(folder, method.as_recipe())), model


def full_pair(kind: str, *, std: float = 0.05, folder: Path | None = None) -> tuple[Pair, LanguageModel]:
    """Two models whose weights are `std` apart."""
    before, after = forests.language_model(kind), forests.language_model(kind)
    if std:
        draws = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in after.module.parameters():
                parameter += std * torch.randn(parameter.shape, generator=draws)
    return pair_of_models(before, after, **_more(folder, {"method": "full"})), after
