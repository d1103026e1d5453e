"""What probing has found is remembered, for the same weights, code and libraries and for no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from luthier.data.forest import Forest
from luthier.kernels.backend import Backend
from luthier.model.language_model import LanguageModel
from luthier.model.load import load_model
from luthier.model.running import known
from luthier.model.running.executor import Executor
from luthier.model.running.probing import probe
from tests import forests
from tests.tiny import tiny_folder

FOREST = Forest((forests.branching(seed=1), *forests.rows(2, seed=2)))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The kinds of modules that were probed, in order, with a cache that knows none of them."""
    monkeypatch.setattr(known, "cache_folder", lambda: tmp_path / "cache")  # kernels stay where they are
    seen: list[str] = []

    def noting(module: PreTrainedModel, backend: Backend, *, fused: bool) -> Executor:
        seen.append(type(module).__name__)
        return probe(module, backend, fused=fused)

    monkeypatch.setattr(known, "probe", noting)
    return seen


def opened(module: PreTrainedModel, known_as: str = "digest", kernels: str = "auto") -> LanguageModel:
    return LanguageModel(module, source="tiny", digest="", known_as=known_as, kernels=kernels)


def told(executor: Executor) -> tuple[Any, ...]:
    return (executor.kind, executor.own_head, executor.reason, executor.backend.identity, executor.blocks is not None,
            executor.by_mask, executor.entry)  # fmt: skip


MAKERS = {
    "llama": lambda: forests.zoo("llama"),
    "gemma2": lambda: forests.zoo("gemma2"),
    "not ours": lambda: forests.zoo("llama", ours=False),
    "mamba": forests.mamba,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_remembered_is_what_was_found(kind: str, probed: list[str]) -> None:
    """Breaks when a start from memory runs a model in another way, or probes it again."""
    make = MAKERS[kind]
    first, second = opened(make()), opened(make())
    assert len(probed) == 1
    assert told(second.executor) == told(first.executor) and second.notices == first.notices
    left, right = (forests.engine_loss(model, FOREST.trees) for model in (first, second))
    assert torch.equal(left, right)


def double(module: PreTrainedModel) -> PreTrainedModel:
    return module.to(torch.bfloat16)


def other_config(module: PreTrainedModel) -> PreTrainedModel:
    module.config.rms_norm_eps = 1e-3
    return module


@pytest.mark.parametrize("change", [double, other_config])
def test_another_model_is_probed(change: Callable[[PreTrainedModel], PreTrainedModel], probed: list[str]) -> None:
    """Breaks when precision or config are left out of what a finding holds for."""
    opened(forests.zoo("llama"))
    opened(change(forests.zoo("llama")))
    assert len(probed) == 2


def test_other_weights_other_kernels_and_other_code_are_probed(
    probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a finding outlives what it was found of."""
    opened(forests.zoo("llama"))
    opened(forests.zoo("llama"), known_as="other")
    opened(forests.zoo("llama"), kernels="torch")
    monkeypatch.setattr(known, "_CODE", ("model",))
    opened(forests.zoo("llama"))
    assert len(probed) == 4
    opened(forests.zoo("llama"), known_as="")
    opened(forests.zoo("llama"), known_as="")
    assert len(probed) == 6


def test_a_start_from_memory_runs_nothing(probed: list[str]) -> None:
    """Breaks when the model is run before anybody has asked for something."""
    opened(forests.zoo("llama"))
    module, ran = forests.zoo("llama"), list[str]()
    for name, part in module.named_modules():
        # Which function bends is asked of seven numbers, not remembered.
        if not name.endswith("act_fn"):
            part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    assert opened(module).executor.blocks is not None
    assert ran == [] and len(probed) == 1


WRONG_CALLS = '{"kind": "segments", "own_head": true, "reason": "", "calls": [[0, "0.25", null, null]]}'
ONE_CALL_TOO_FEW = '{"kind": "segments", "own_head": true, "reason": "", "calls": [[0, 0.25, null, null]]}'


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"kind": "segments"}', '{"kind": "other", "own_head": true}', WRONG_CALLS, ONE_CALL_TOO_FEW]
)
def test_a_damaged_memory_is_found_out_anew(text: str, probed: list[str], tmp_path: Path) -> None:
    """Breaks when a file that was cut short stops a start, or stays."""
    opened(forests.zoo("llama"))
    (path,) = (tmp_path / "cache" / known.FOLDER).iterdir()
    whole = json.loads(path.read_text("utf-8"))
    path.write_text(text, "utf-8")
    opened(forests.zoo("llama"))
    assert len(probed) == 2 and json.loads(path.read_text("utf-8")) == whole


def test_a_folder_is_probed_once_and_again_when_its_weights_change(probed: list[str], tmp_path: Path) -> None:
    """Breaks when loading forgets to say which weights it has."""
    folder = tiny_folder("llama", tmp_path)
    for _ in range(2):
        load_model(str(folder), precision="float32", device="cpu")
    assert len(probed) == 1
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    load_model(str(folder), precision="float32", device="cpu")
    assert len(probed) == 2
