"""Closed formulas of inference against real caches, and against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.arithmetic import inference
from luthier.arithmetic.shapes import Shape, shape_of
from tests.arithmetic.published import config
from tests.tiny import KINDS, WINDOW, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_has_the_bytes_that_are_told(kind: str) -> None:
    """Breaks when grouped heads, a window or the width of a number is left out: against transformers' cache."""
    from transformers import DynamicCache

    model = tiny_model(kind)
    shape = shape_of(model.config.to_dict())
    for length in (3, WINDOW - 1, 2 * WINDOW):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.ones(2, length, dtype=torch.long), past_key_values=cache, use_cache=True)
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        told = 2 * inference.cache_bytes(shape, length, 4)
        windowed = sum(window is not None and window < length for window in shape.windows)
        # Of a window the zoo keeps one key less: the next token brings its own.
        assert held == told - 2 * windowed * 2 * 4 * shape.key_value
    assert inference.cache_bytes_per_token(shape, 4) == inference.cache_bytes(shape, 1, 4)


def test_weights_are_packed_in_the_blocks_alone() -> None:
    shape = shape_of(config("LLaMA-7B"))
    assert inference.weight_bytes(shape, 2) == 2 * shape.parameters
    rest = shape.parameters - shape.blocks
    assert inference.weight_bytes(shape, 2, lambda size: size[0] * size[1] // 2) == shape.blocks // 2 + 2 * rest
    assert inference.weight_bytes(shape, 4, lambda size: None) == 4 * shape.parameters


def step(**more: Any) -> float:
    shape = shape_of(config("Llama-3.1-8B"))
    known: dict[str, Any] = {"rows": 1, "context": 512, "flops_per_second": 1e15, "bytes_per_second": 1e12}
    return inference.decode_seconds(shape, weights=2 * shape.parameters, **{**known, **more})


def test_a_step_waits_for_the_slower_of_memory_and_products() -> None:
    shape = shape_of(config("Llama-3.1-8B"))
    # The table of tokens is looked up, and not read.
    read = 2 * (shape.parameters - shape.table) + 512 * 131_072
    assert step() == read / 1e12
    assert step(rows=8) == (read + 7 * 512 * 131_072) / 1e12
    assert step(rows=8, flops_per_second=1e9) == 8 * inference.decode_flops(shape, 512) / 1e9
    assert inference.decode_flops(shape, 512) == 2 * (shape.blocks + shape.table) + 4 * 32 * 4096 * 512


def test_reading_a_text_sees_each_pair_once() -> None:
    """Against a sum over tokens, with windows that are shorter and longer than the text."""
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 5, "head_dim": 4}
    for window in (3, 7, 50):
        shape = shape_of({"model_type": "gemma2", **small, "sliding_window": window})
        pairs = sum(min(at + 1, window) + at + 1 for at in range(9))
        assert inference.prefill_flops(shape, 9) == 2 * shape.blocks * 9 + 2 * shape.table + 4 * 8 * pairs


def test_what_fits_is_whole_rows() -> None:
    assert inference.most_rows(100, weights=40, cache=25) == 2
    assert inference.most_rows(30, weights=40, cache=25) == 0
    assert inference.rule_of_thumb(10.0) == 12.0


def test_experts_are_not_packed() -> None:
    """Breaks when weights are promised in four bits that stay in sixteen: no quantizer packs slices of a tensor."""
    shape = shape_of(config("Mixtral-8x7B"))
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    assert weight_saved(shape) == 2 * attention - attention // 2
    assert weight_saved(shape_of(config("LLaMA-7B"))) == 1.5 * shape_of(config("LLaMA-7B")).blocks


def weight_saved(shape: Shape) -> int:
    """Bytes that packing saves, at half a byte a number."""
    return inference.weight_bytes(shape, 2) - inference.weight_bytes(shape, 2, lambda size: size[0] * size[1] // 2)
