"""The formulas of memory against what autograd keeps, tensor by tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.arithmetic.memory import (
    Decoder,
    Work,
    activations,
    checkpoint,
    gradients,
    head,
    kept_checkpoints,
    masters,
    on_heap,
    staging,
    token_cache,
)
from luthier.data.forest import Forest, row_tree
from luthier.model import attention
from luthier.model.language_model import LanguageModel
from luthier.recipes.memory import peak_of
from luthier.train.source import MicroBatch

SIZES = {
    "vocab_size": 128, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16),
}
ADAPTERS = {"lora": lambda: LoRA(rank=1), "full": Full, "prefix": lambda: PrefixTuning(prefix_tokens=1)}
ROWS, LENGTH = 12, 64
TOKENS = ROWS * LENGTH
DECODER = Decoder(
    layers=2, hidden=10, inner=30, query=10, key_value=5, heads=2, vocabulary=100, gated=True, bytes=2
)  # fmt: skip


def kept_by_autograd(model: LanguageModel, forest: Forest) -> int:
    """Bytes of all storages that the graph of one forward pass holds on to, weights left out."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {each.untyped_storage().data_ptr() for each in model.module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model.token_outputs(forest)
    assert outputs.log_probs.requires_grad
    return sum(size for place, size in storages.items() if place not in weights)


def laid_out(
    architecture: str, adapter: Adapter, dtype: torch.dtype, *, fused: bool = True
) -> tuple[LanguageModel, int, int]:
    """A model with an adapter, what autograd keeps for a micro-batch, and what the formula says."""
    attention.register()
    config = CONFIGS[architecture]()
    module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()
    model = LanguageModel(module, source="fresh", digest="", kernels="auto" if fused else "torch")
    attachment = model.attach(adapter.attach(model.sites))
    rng = np.random.default_rng(0)
    forest = Forest(tuple(
        row_tree(rng.integers(3, 128, LENGTH).astype(np.int32), np.ones(LENGTH, dtype=np.float32)) for _ in range(ROWS)
    ))  # fmt: skip
    batch = MicroBatch(tuple(range(ROWS)), TOKENS, LENGTH)
    resident, _, _ = peak_of(model, attachment, batch, 1.0)
    edited = 0.0 if attachment.root is not None else 1.0
    work = Work(
        tokens=TOKENS, predicted=TOKENS, longest=LENGTH, edited=edited, trains_base=attachment.trains_base,
        fused=model.executor.blocks is not None,
    )  # fmt: skip
    return model, kept_by_autograd(model, forest), int(resident / on_heap(1000, work) * 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "zoo"])
def test_activations_are_what_autograd_keeps(fused: bool, architecture: str, adapter: str, dtype: torch.dtype) -> None:
    """Breaks when a block, ours or the zoo's, keeps another tensor, or an adapter's inputs are forgotten."""
    _, kept, formula = laid_out(architecture, ADAPTERS[adapter](), dtype, fused=fused)
    # The widest tensor at work comes on top of what is kept.
    working = TOKENS * SIZES["intermediate_size"] * dtype.itemsize
    assert formula - working == pytest.approx(kept, rel=0.05)


def test_soft_capped_attention_keeps_squares() -> None:
    """Breaks when attention without a flash kernel is planned as if it had one."""
    _, kept, formula = laid_out("gemma2", LoRA(rank=1), torch.float32)
    assert formula == pytest.approx(kept, rel=0.25)


def test_activations_grow_as_the_equation_says() -> None:
    """Breaks when a term has lost its factor: tokens and layers scale, edits and trained norms add."""
    one = Work(tokens=10, predicted=10, longest=5)
    block = 10 * (2 * 10 * 4 + (2 * 10 + 2 * 5) * 2 + 2 * 4 + 3 * 30 * 2 + (2 * 10 + 10 + 30) * 2)
    assert activations(DECODER, one) == 2 * block + 10 * 10 * 2 + 10 * 30 * 2
    frozen = Work(tokens=10, predicted=10, longest=5, edited=0.0)
    assert activations(DECODER, one) - activations(DECODER, frozen) == 2 * 10 * (2 * 10 + 10 + 30) * 2
    trained = Work(tokens=10, predicted=10, longest=5, trains_base=True)
    assert activations(DECODER, trained) - activations(DECODER, one) == 2 * 10 * 2 * 10 * 2
    squared = Work(tokens=10, predicted=10, longest=5, squares=3)
    assert activations(DECODER, squared) - activations(DECODER, one) == 2 * 10 * 3 * 2 * 5 * 2
    masked = Work(tokens=10, predicted=10, longest=5, masked=True)
    assert activations(DECODER, masked) - activations(DECODER, one) == 2 * 10 * 5 * 2
    assert on_heap(100, trained) < on_heap(100, frozen) < on_heap(100, one)


def test_the_head_needs_a_chunk_of_logits_however_many_tokens_there_are() -> None:
    """Breaks when the full logits are planned, or a trained head's gradient is not."""
    few, many = (Work(tokens=count, predicted=count, longest=5) for count in (1000, 100_000))
    states = 2 * 10 * 2
    assert head(DECODER, many) - head(DECODER, few) == 99_000 * states
    assert head(DECODER, few) == 1000 * states + 256 * 100 * (3 * 4 + 2)
    alone = Work(tokens=10, predicted=10, longest=5)
    assert head(DECODER, alone) == 10 * states + 10 * 100 * (2 * 4 + 2)
    trained = Work(tokens=10, predicted=10, longest=5, trains_base=True)
    assert head(DECODER, trained) - head(DECODER, alone) == 100 * 10 * (4 + 2 * 2)


def test_copies_and_files_are_counted() -> None:
    """Breaks when a float32 parameter gets a master, or a checkpoint forgets the optimizer."""
    assert masters(10, 4) == 0 and masters(10, 2) == 40 and gradients(10) == 40 and staging(10, 80) == 120
    small, large = (checkpoint(count, 8 * count, tensors=2, rows=5) for count in (0, 1000))
    assert large - small == 12_000
    assert kept_checkpoints(2, 100) == 5 and kept_checkpoints(2, 3) == 3
    assert token_cache(100, 10) == 1700 + 120 + 768
