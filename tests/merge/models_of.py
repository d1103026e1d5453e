"""Folders of models for merging: a config, a tokenizer of a few words, and any tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.model.files.array_views import array_of
from luthier.model.files.shards import Slot, write_shards

LAYERS = 3
WIDTH = 8


def tensors(*, seed: int, rows: int = 12, layers: int = LAYERS, spread: float = 0.1) -> dict[str, torch.Tensor]:
    """A model in miniature, near the one of seed 0 with the same shapes."""
    shapes = {**dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (rows, WIDTH)),
              "model.norm.weight": (WIDTH,)}  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.q_proj.weight": (WIDTH, WIDTH),
                   f"model.layers.{layer}.mlp.down_proj.weight": (WIDTH, 2 * WIDTH),
                   f"model.layers.{layer}.input_layernorm.weight": (WIDTH,)}  # fmt: skip
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        common = torch.randn(shape, generator=base)
        found[name] = common + (spread * torch.randn(shape, generator=own) if seed else 0)
    return found


def folder(
    place: Path, held: Mapping[str, torch.Tensor], *, words: Sequence[str] = (), added: Sequence[str] = (),
    dtype: torch.dtype = torch.float32, shard_bytes: int = 5 * 10**9, config: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a model folder; `words` make a vocabulary, and `added` are tokens behind it."""
    place.mkdir(parents=True)
    kept = {name: array_of(tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in held.items()}
    slots = {name: Slot(each.dtype, each.shape) for name, each in kept.items()}
    write_shards(place, slots, kept.items(), shard_bytes=shard_bytes)
    layers = 1 + max((int(name.split(".")[2]) for name in held if ".layers." in name), default=-1)
    said = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": len(held.get("lm_head.weight", ())),
            "torch_dtype": "float32", **(config or {})}  # fmt: skip
    (place / "config.json").write_text(json.dumps(said))
    if words:
        entries = [{"id": len(words) + n, "content": text, "special": True} for n, text in enumerate(added)]
        whole = {"model": {"type": "WordLevel", "vocab": {text: n for n, text in enumerate(words)}},
                 "added_tokens": entries}  # fmt: skip
        (place / "tokenizer.json").write_text(json.dumps(whole))
    return place
