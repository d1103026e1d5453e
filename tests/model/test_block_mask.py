"""Attention by mask: who sees whom, which blocks are left out, and the same numbers as attention by segment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from luthier.data.forest import Forest, Segment, Span, Tree
from luthier.model.attending import block_mask as by
from luthier.model.attending.attention import ForestPlan
from luthier.model.attending.block_mask import BLOCK, MaskedAttention, MaskedCall, plain_attention
from luthier.model.language_model import LanguageModel
from luthier.model.running import probing
from luthier.objectives.sft import SFT
from tests import forests

CPU = torch.device("cpu")
UNCOMPILED = "ignore:flex_attention called without torch.compile:UserWarning"


def spans(seed: int, *, times: int = 1) -> tuple[Span, ...]:
    """The layout of a branching tree between plain rows, each segment `times` as long."""
    trees = [*forests.rows(2, seed=seed), forests.branching(seed=seed), *forests.rows(2, seed=seed + 1)]
    longer = [
        Tree(tuple(Segment(np.repeat(s.tokens, times), np.repeat(s.weights, times), s.parent) for s in tree.segments))
        for tree in trees
    ]
    return Forest(tuple(longer)).layout.spans


def dense(laid: tuple[Span, ...], outside: int, window: int | None) -> Tensor:
    """Who sees whom as attention by segment has it: each span's own mask, put at the places of the keys it sees."""
    plan = ForestPlan(spans=laid)
    mask = torch.zeros(laid[-1].stop, outside + laid[-1].stop, dtype=torch.bool)
    for span in laid:
        seen = [torch.arange(laid[a].start, laid[a].stop) + outside for a in span.ancestors]
        columns = torch.cat([torch.arange(outside), *seen, torch.arange(span.start, span.stop) + outside])
        mask[span.start : span.stop, columns] = plan.mask(len(columns) - span.length, span.length, window, CPU)
    return mask


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("outside", [0, 5, 130])
@pytest.mark.parametrize(("seed", "times"), [(0, 1), (1, 9), (2, 40)])
def test_the_mask_and_its_blocks(seed: int, times: int, outside: int, window: int | None) -> None:
    """Breaks when a cousin is seen, a window is counted along the batch, or a block that somebody needs is left out."""
    laid = spans(seed, times=times)
    expected = dense(laid, outside, window)
    count = laid[-1].stop
    queries, keys = torch.meshgrid(torch.arange(count), torch.arange(outside + count), indexing="ij")
    assert torch.equal(by.mask_mod(laid, outside, window, CPU)(None, None, queries, keys), expected)
    some, full = by.blocks(laid, outside, window)
    padded = torch.zeros(some.shape[0] * BLOCK, some.shape[1] * BLOCK, dtype=torch.bool)
    padded[:count, : outside + count] = expected
    tiles = padded.view(some.shape[0], BLOCK, some.shape[1], BLOCK).transpose(1, 2).flatten(2)
    assert np.array_equal(some, tiles.any(-1).numpy())
    assert np.array_equal(full, tiles.all(-1).numpy())


@pytest.mark.parametrize("outside", [0, 130])
@pytest.mark.parametrize(("seed", "times"), [(0, 1), (1, 40)])
def test_segments_that_see_both_ways(seed: int, times: int, outside: int) -> None:
    """Breaks when a token of an encoder's text does not see what comes after it, or sees into another text."""
    laid = tuple(replace(span, both_ways=not span.ancestors and index % 2 == 0)
                 for index, span in enumerate(spans(seed, times=times)))  # fmt: skip
    expected = dense(laid, outside, None)
    for span in laid:
        if span.both_ways:
            own = slice(span.start + outside, span.stop + outside)
            expected[span.start : span.stop, own] = True
    count = laid[-1].stop
    queries, keys = torch.meshgrid(torch.arange(count), torch.arange(outside + count), indexing="ij")
    assert torch.equal(by.mask_mod(laid, outside, None, CPU)(None, None, queries, keys), expected)
    some, full = by.blocks(laid, outside, None)
    padded = torch.zeros(some.shape[0] * BLOCK, some.shape[1] * BLOCK, dtype=torch.bool)
    padded[:count, : outside + count] = expected
    tiles = padded.view(some.shape[0], BLOCK, some.shape[1], BLOCK).transpose(1, 2).flatten(2)
    assert np.array_equal(some, tiles.any(-1).numpy())
    assert np.array_equal(full, tiles.all(-1).numpy())


def test_blocks_are_handed_over_as_they_are_found() -> None:
    """Breaks when a block without a mask is one that needs it, or the lists for the backward pass are others."""
    laid = spans(2, times=40)
    some, full = by.blocks(laid, 5, None)
    assert full.any() and not some.all()
    mask = by.block_mask(laid, 5, None, CPU)
    assert np.array_equal(mask.to_dense()[0, 0].bool().numpy(), some)
    assert mask.shape == (1, 1, laid[-1].stop, laid[-1].stop + 5)
    assert mask.full_kv_num_blocks is not None and mask.full_q_num_blocks is not None and mask.q_num_blocks is not None
    assert mask.full_kv_num_blocks[0, 0].tolist() == full.sum(1).tolist()
    assert mask.full_q_num_blocks[0, 0].tolist() == full.sum(0).tolist()
    assert mask.q_num_blocks[0, 0].tolist() == (some & ~full).sum(0).tolist()


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_model_has_the_same_log_probabilities(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when windows, soft caps, scales, roots from outside or the order of heads are lost on the way."""
    monkeypatch.setattr(by, "SMALLEST_HEAD", 8)
    model = forests.language_model(architecture, fused=False)
    forest = Forest((forests.branching(), *forests.rows(3)))
    asked: list[tuple[object, ...]] = []

    def attention(*arguments: Tensor, **named: Any) -> Tensor:
        asked.append(arguments[0].shape)
        found: Tensor = flex_attention(*arguments, **named)
        return found

    by_mask = replace(model.executor, by_mask=MaskedAttention(attention))
    with torch.no_grad():
        expected = model.token_outputs(forest).log_probs
        model.executor = by_mask
        found = model.token_outputs(forest).log_probs
    assert len(asked) == model.sites.layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_tree_has_the_same_gradients_at_once_and_in_parts(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when keys from another pass are put behind those of this one, or are cut off from their gradients."""
    monkeypatch.setattr(by, "SMALLEST_HEAD", 8)
    rng = np.random.default_rng(0)
    branches = [Segment(forests.tokens(rng, 4), np.ones(4, np.float32), 0) for _ in range(4)]
    tree = Tree((Segment(forests.tokens(rng, 6), np.ones(6, np.float32)), *branches))
    found = []
    for masked in (False, True):
        for parts in (False, True):
            model = forests.language_model(architecture, fused=False)
            if masked:
                model.executor = replace(model.executor, by_mask=MaskedAttention(plain_attention))
            parameters = forests.trainable(model)
            if parts:
                for _ in model.backward_in_parts(tree, SFT().loss, max_tokens=8):
                    pass
            else:
                forests.engine_loss(model, [tree]).backward()
            found.append({name: each.grad for name, each in parameters.items() if each.grad is not None})
    for other in found[1:]:
        forests.assert_same_gradients(other, found[0], tolerance=2e-5)  # type: ignore[arg-type]


def test_one_text_alone_needs_no_mask() -> None:
    """Breaks when a single text, for which causal attention is there, goes through a mask."""
    model = forests.language_model("llama", fused=False)
    model.executor = replace(model.executor, by_mask=MaskedAttention(refused))
    model.token_outputs(Forest((forests.rows(1)[0],)))


def refused(*arguments: Tensor, **named: Any) -> Tensor:
    raise RuntimeError("no kernel for this device\nand more words")


def test_it_is_chosen_on_a_gpu_only_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a GPU whose compiler fails ends a run at loading, or takes the slower way without a word."""
    assert forests.language_model("gpt2").executor.by_mask is None
    monkeypatch.setattr(by, "SMALLEST_HEAD", 8)
    monkeypatch.setattr(probing, "_may_mask", lambda module, blocks: True)
    ways = ((plain_attention, ""), (refused, "RuntimeError: no kernel for this device"), (wrong, "logits"),
            (rigid, "gradients"))  # fmt: skip
    for attention, reason in ways:
        monkeypatch.setattr(MaskedAttention, "compiled", classmethod(lambda cls, way=attention: cls(way)))
        module = forests.zoo("gpt2")
        model = LanguageModel(module, source="tiny", digest="")
        assert (model.executor.by_mask is None) == bool(reason)
        assert any(reason in notice and "by segment" in notice for notice in model.notices) == bool(reason)
        assert LanguageModel(module, source="tiny", digest="", kernels="torch").executor.by_mask is None


def wrong(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    """Attention to everything."""
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def rigid(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    """The right values, and a gradient in which keys do not matter."""
    return plain_attention(query, key.detach() + 0 * key, value, **named)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own, of torch.jit
def test_compiled_for_this_cpu_it_has_the_same_numbers() -> None:
    """Breaks when the lists of blocks are not what FlexAttention takes them for; a CPU has its forward pass.

    Once for each length: torch 2.13 writes C++ that does not compile when lengths are left open. A GPU has other code.
    """
    attention = MaskedAttention(torch.compile(flex_attention, dynamic=False, fullgraph=True))
    laid, outside = spans(1, times=30), 5
    count = laid[-1].stop
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, count, 16, generator=generator)
    key, value = (torch.randn(1, 2, outside + count, 16, generator=generator) for _ in range(2))
    for window in (None, 100):
        expected = F.scaled_dot_product_attention(
            query, key, value, attn_mask=dense(laid, outside, window), enable_gqa=True, scale=0.3
        )
        call = MaskedCall(query, key, value, by.block_mask(laid, outside, window, CPU), 0.3, None)
        with torch.no_grad():
            found = attention.attend(call)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_compilation_is_enough_for_all_lengths_and_windows() -> None:
    """Breaks when a number that changes from batch to batch is part of what is compiled."""
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    attention = MaskedAttention(torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend))
    for seed in range(3):
        for outside in (0, 3, 4):
            for window in (None, 7, 8):
                laid = spans(seed)
                query, key = torch.randn(1, 2, laid[-1].stop, 16), torch.randn(1, 2, outside + laid[-1].stop, 16)
                mask = by.block_mask(laid, outside, window, CPU)
                attention.attend(MaskedCall(query, key, key, mask, None, None))
    # With and without keys from outside: where there are none, queries and keys are taken to be equally many for good.
    assert len(compiled) <= 2
