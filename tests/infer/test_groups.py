"""Many answers to one prompt: read once, and drawn as if each had been asked for alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters import Adapter
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.infer.adapter_pool import AdapterPool
from luthier.infer.engine import Engine
from luthier.infer.groups import GroupSpeaker
from luthier.infer.reader import PagedReader
from luthier.infer.request import Request
from luthier.infer.scheduler import Part
from luthier.kernels.native_tokens import NativeTokenBlocks
from luthier.model.speaker import PolicySampling, Sampling
from tests import forests


def test_answers_of_a_group_are_those_of_single_requests() -> None:
    """Breaks when answers of a group are copies, come in another order, or draw by another number."""
    model = forests.language_model("llama")
    rng = np.random.default_rng(2)
    one, two = forests.tokens(rng, 4), forests.tokens(rng, 6)
    sampling = PolicySampling(max_new_tokens=5, seed=9, temperature=1.3)
    asked = [one, one, one, two, two, one]
    grouped, single = GroupSpeaker(Engine(model)).speak(asked, sampling), Engine(model).speak(asked, sampling)
    assert [each.tokens.tolist() for each in grouped] == [each.tokens.tolist() for each in single]
    assert np.allclose([each.log_probs for each in grouped], [each.log_probs for each in single], atol=1e-5)
    assert len({tuple(each.tokens.tolist()) for each in grouped[:3]}) > 1


def test_all_answers_of_a_group_are_drawn_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when room is taken for each prompt, and its answers wait for each other."""
    model = forests.language_model("llama")
    rng = np.random.default_rng(2)
    asked = [prompt for prompt in (forests.tokens(rng, 4), forests.tokens(rng, 6)) for _ in range(8)]
    passes: list[int] = []
    hidden = PagedReader._hidden

    def counted(self: PagedReader, parts: Sequence[Part]) -> Any:
        passes.append(len(parts))
        return hidden(self, parts)

    monkeypatch.setattr(PagedReader, "_hidden", counted)
    GroupSpeaker(Engine(model)).speak(asked, PolicySampling(max_new_tokens=20, seed=9))
    assert passes == [2, *[16] * 19]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("adapter", [LoRA(rank=4), LoRA(rank=3, targets=["q", "down"]), IA3()], ids=["4", "3", "ia3"])
def test_a_block_takes_the_terms_of_the_adapter_that_is_trained(
    architecture: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a term is added at another layer, not added, or added to what is no low-rank term."""
    model = forests.language_model(architecture)
    if model.executor.backend.name != "native":
        pytest.skip("only the C++ has whole blocks")
    torch.manual_seed(0)
    forests.shake(model.attach(adapter.attach(model.sites)).named_parameters().values(), seed=4)
    rng = np.random.default_rng(2)
    asked = [prompt for prompt in (forests.tokens(rng, 4), forests.tokens(rng, 6)) for _ in range(4)]
    sampling = PolicySampling(max_new_tokens=6, seed=9)
    made: list[bool] = []
    through = NativeTokenBlocks.through

    def counted(self: NativeTokenBlocks, *given: Any) -> Any:
        found, added = through(self, *given), given[-1]
        made.append(found is not None and added is not None)
        return found

    monkeypatch.setattr(NativeTokenBlocks, "through", counted)
    at_once = GroupSpeaker(Engine(model)).speak(asked, sampling)
    assert any(made) == (not isinstance(adapter, IA3))
    monkeypatch.setattr(NativeTokenBlocks, "through", lambda *given: None)
    apart = GroupSpeaker(Engine(model)).speak(asked, sampling)
    for one, other in zip(at_once, apart, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=5e-6)


def test_a_block_takes_the_terms_of_many_adapters_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a row takes the terms of its neighbour, or the block adds them up in another way."""
    model = forests.language_model("llama")
    if model.executor.backend.name != "native":
        pytest.skip("only the C++ has whole blocks")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        attachment = model.attach(LoRA(rank=2 + seed).attach(model.sites), name=name, named_only=True)
        forests.shake(attachment.named_parameters().values(), seed=seed)
    prompts = [forests.tokens(np.random.default_rng(row), 5) for row in range(4)]

    def rows(tokens: int) -> torch.Tensor:
        """The next-token states of rows under the base and two adapters, by pages."""
        engine = Engine(model, pool=AdapterPool(model, lambda folder, name: None))
        for prompt, name in zip(prompts, ("one", "", "two", "one"), strict=True):
            engine.add(Request(prompt=prompt, sampling=Sampling(max_new_tokens=tokens), adapter=name))
        told = []
        while engine.busy:
            told += [said.log_prob for news in engine.step() for said in news.said]
        return torch.tensor(told)

    whole = rows(5)
    monkeypatch.setattr(NativeTokenBlocks, "through", lambda *given: None)
    assert torch.equal(whole, rows(5))
