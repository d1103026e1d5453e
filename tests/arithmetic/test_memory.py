"""The formulas of memory against what autograd keeps, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.arithmetic.memory import (
    UNDER_WAY,
    Decoder,
    Ours,
    Output,
    Peak,
    Recomputed,
    Work,
    checkpoint,
    far_inputs,
    gradients,
    kept,
    kept_checkpoints,
    libraries,
    masters,
    on_heap,
    peak,
    staging,
    token_cache,
)
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.data.forest import Forest, row_tree
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.running import far_inputs as far_inputs_module
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.recipes.sizing.sizes import decoder_of, work_of
from luthier.train.source import MicroBatch
from luthier.train.stepper import Stepper
from tests.lanes import LateLane

SIZES = {
    "vocab_size": 128, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "dropping": lambda: LlamaConfig(**SIZES, attention_dropout=0.1),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16),
}
ADAPTERS = {"lora": lambda: LoRA(rank=1), "full": Full, "prefix": lambda: PrefixTuning(prefix_tokens=1)}
ROWS, LENGTH = 12, 64
TOKENS = ROWS * LENGTH
DECODER = Decoder(
    layers=2, hidden=10, inner=30, query=10, key_value=5, heads=2, vocabulary=100, gated=True, bytes=2
)  # fmt: skip
FUSED = Ours(attention=True, feed_forward=True)


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
    architecture: str, adapter: Adapter, dtype: torch.dtype, *, fused: bool = True, recomputed: int = 0,
    training: bool = False,
) -> tuple[int, int]:
    """What autograd keeps for a micro-batch, and what the formula says."""
    attention.register()
    config = CONFIGS[architecture]()
    module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()
    model = LanguageModel(module, source="fresh", digest="", kernels="auto" if fused else "torch")
    attachment = model.attach(adapter.attach(model.sites))
    model.recompute(recomputed)
    if training:
        model.train()
    rng = np.random.default_rng(0)
    weights = np.ones(LENGTH, dtype=np.float32)
    weights[: LENGTH // 2] = 0
    forest = Forest(tuple(row_tree(rng.integers(3, 128, LENGTH).astype(np.int32), weights) for _ in range(ROWS)))
    work = work_of(model, attachment, MicroBatch(tuple(range(ROWS)), TOKENS, LENGTH), TOKENS // 2)
    work = replace(work, recomputed=Recomputed(blocks=recomputed))
    return kept_by_autograd(model, forest), kept(decoder_of(model), work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "zoo"])
def test_activations_are_what_autograd_keeps(fused: bool, architecture: str, adapter: str, dtype: torch.dtype) -> None:
    """Breaks when a block, ours or the zoo's, keeps another tensor, or an adapter's inputs are forgotten."""
    found, formula = laid_out(architecture, ADAPTERS[adapter](), dtype, fused=fused)
    # A learned root's masks are shared by some of the calls that are counted apart, and the queries of the first block
    # need no gradient, so that norms of heads keep nothing there.
    learned_root = 0.1 if architecture == "qwen3" else 0.07
    assert formula == pytest.approx(found, rel=learned_root if adapter == "prefix" else 0.05)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "zoo"])
@pytest.mark.parametrize("adapter", [name for name in catalog.names("adapters") if name not in ("full", "lora")])
def test_every_adapter_of_the_catalog_says_what_it_keeps(adapter: str, fused: bool) -> None:
    """Breaks when a new edit does not say what autograd keeps for it, or blocks below it are taken to keep anything."""
    for dtype in (torch.float32, torch.bfloat16):
        found, formula = laid_out("llama", choose("adapters", Adapter, adapter), dtype, fused=fused)
        assert formula == pytest.approx(found, rel=0.05), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["lora", "ia3", "full", "bottleneck"])
def test_attention_that_drops_weights_keeps_them(adapter: str, dtype: torch.dtype) -> None:
    """Breaks when squares of a row's tokens are forgotten, or the half of a block that is still ours is the zoo's."""
    found, formula = laid_out("dropping", choose("adapters", Adapter, adapter), dtype, training=True)
    assert formula == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("target", ["self_attn.q_proj", "mlp.down_proj"])
def test_blocks_below_the_lowest_edit_keep_nothing(layer: int, target: str) -> None:
    """Breaks when a model is planned as if gradients went through all of it, whatever is trained."""
    method = LoRA(rank=1, targets=(f"layers.{layer}.{target}",))
    found, formula = laid_out("llama", method, torch.float32, fused=False)
    assert formula == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("recomputed", [1, 2, 3])
@pytest.mark.parametrize("adapter", [*ADAPTERS, "ia3"])
def test_a_recomputed_block_keeps_what_goes_into_it(adapter: str, recomputed: int) -> None:
    """Breaks when the inside of a block survives its forward pass, or more is hoped for than is saved."""
    found, formula = laid_out("llama", {**ADAPTERS, "ia3": IA3}[adapter](), torch.float32, recomputed=recomputed)
    # Angles of positions and the generator's state of each block come on top: little, where there is little else.
    assert formula == pytest.approx(found, rel=0.07, abs=TOKENS * 16 * 4 * 2 + 3 * 6000)


def test_soft_capped_attention_keeps_squares() -> None:
    """Breaks when attention without a flash kernel is planned as if it had one."""
    found, formula = laid_out("gemma2", LoRA(rank=1), torch.float32)
    assert formula == pytest.approx(found, rel=0.25)


def test_activations_grow_as_the_equation_says() -> None:
    """Breaks when a term has lost its factor: tokens and layers scale, edits and trained norms add."""
    one = Work(tokens=10, predicted=10, longest=5, edits=2 * 10 + 10 + 30)
    block = 10 * (2 * 10 * 4 + (2 * 10 + 2 * 5) * 2 + 2 * 4 + 3 * 30 * 2 + (2 * 10 + 10 + 30) * 2)
    assert kept(DECODER, one) == 2 * block + 10 * 10 * (4 + 2) + 10 * 10 * 2
    more = {
        "frozen": (replace(one, edits=0.0), -2 * 10 * (2 * 10 + 10 + 30) * 2),
        "trained": (replace(one, trains_base=True), 2 * 10 * 2 * 10 * 2 + 10 * 10 * 2),
        "squared": (replace(one, squares=3), 2 * 10 * 3 * 2 * 5 * 2),
        "masked": (replace(one, masked=True), 2 * 10 * 5 * 2),
    }
    for name, (work, added) in more.items():
        assert kept(DECODER, work) - kept(DECODER, one) == added, name


def test_a_fused_block_is_kept_as_the_equation_says() -> None:
    """Breaks when a recomputed block keeps more than the stream, or rows that predict nothing reach the last half."""
    work = Work(tokens=10, predicted=4, longest=5, ours=FUSED, edits=3)
    around = (2 * 10 + 2 * 5) * 2 + 2 * 4 + 2 * (10 * 2 + 4) + 3 * 2
    block, inner = 10 * (around + 2 * 30 * 2), 2 * 30 * 2
    last = 10 * around - 6 * (10 * 2 + 4) + 4 * (inner + 10 * 2)
    states = 4 * (10 * 2 + 10 * 2 + 4)
    assert kept(DECODER, work) == block + last + states
    assert kept(DECODER, replace(work, recomputed=Recomputed(blocks=1))) == 10 * 10 * 2 + last + states
    assert kept(DECODER, replace(work, recomputed=Recomputed(blocks=2))) == 2 * 10 * 10 * 2 + states


def test_the_widest_moment_is_the_head_or_a_block_and_shrinks_with_what_is_recomputed() -> None:
    """Breaks when a moment is left out, or a block that is made again is taken to cost nothing then."""
    work = Work(tokens=1000, predicted=1000, longest=5, ours=FUSED, output=Output(in_place=True))
    deep = replace(DECODER, layers=12)
    totals = [peak(deep, replace(work, recomputed=Recomputed(blocks=count))).total for count in range(13)]
    assert all(more > less for more, less in pairwise(totals[:12]))
    assert totals[-1] > 12 * 1000 * 10 * 2 + 1000 * (2 * 10 + 2 * 5 + 2 * 30) * 2
    # With a large vocabulary the head is the widest, however few blocks are kept.
    broad = replace(deep, vocabulary=1_000_000)
    assert peak(broad, work).working >= 256 * 1_000_000 * 2
    assert Peak(kept=1, working=2).total == 3


def test_the_head_needs_a_chunk_of_logits_however_many_tokens_there_are() -> None:
    """Breaks when the full logits are planned, or a trained head's gradient is not."""
    broad = replace(DECODER, vocabulary=10_000_000)

    def working(**more: object) -> int:
        return peak(broad, Work(tokens=1000, longest=5, **{"predicted": 1000, **more})).working  # type: ignore[arg-type]

    chunk, states = 256 * 10_000_000, 1000 * 10 * 2
    assert working() == states + chunk * (3 * 4 + 2)
    assert working(output=Output(in_place=True)) == states + chunk * 2 * 2
    assert working(output=Output(in_place=True, rows=1)) == states + chunk * (2 * 4 + 2)
    assert working(output=Output(in_place=True), predicted=10) == 10 * 10 * 2 + 10 * 10_000_000 * 2
    gradient = 10 * 10_000_000 * (4 + 2 * 2)
    assert working(output=Output(in_place=True), trains_base=True) == 2 * states + chunk * 2 * 2 + gradient
    # Slopes are kept for as many rows as take the memory of the gradient: here 20, which are all or no whole chunk.
    few = working(output=Output(in_place=True), trains_base=True, predicted=20)
    assert few == 2 * 20 * 10 * 2 + 20 * 10_000_000 * 2 + gradient
    deep = replace(broad, hidden=600)
    kept_too = peak(deep, Work(tokens=2000, predicted=2000, longest=5, output=Output(in_place=True), trains_base=True))
    assert kept_too.working == 2 * 2000 * 600 * 2 + (4 + 2) * chunk * 2 + 600 * 10_000_000 * (4 + 2 * 2)


def test_copies_and_files_are_counted() -> None:
    """Breaks when a float32 parameter gets a master, or a checkpoint forgets the optimizer."""
    assert masters(10, 4) == 0 and masters(10, 2) == 40 and gradients(10) == 40 and staging(10, 80) == 120
    small, large = (checkpoint(count, 8 * count, tensors=2, rows=5) for count in (0, 1000))
    assert large - small == 12_000
    assert on_heap(1000) == 1300
    assert libraries(2, ours=True) < libraries(4) < libraries(2) < libraries(4, threads=2)
    assert libraries(4, ours=True) == libraries(4)
    assert kept_checkpoints(2, 100) == 5 and kept_checkpoints(2, 3) == 3
    assert token_cache(100, 10) == 1700 + 120 + 768



def peak_of_a_pass(recomputed: int, *, far: bool) -> tuple[int, Peak, int]:
    """The most that torch has allocated at once in a pass, what the formula says, and what went to the host.

    The host's end of the lane lies where torch does not count.
    """
    attention.register()
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 8})
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    model = LanguageModel(module, source="fresh", digest="", kernels="blocks")
    attachment = model.attach(LoRA(rank=1).attach(model.sites))
    lane = LateLane()
    model.recompute(recomputed, lane=lane if far else None)
    rows = [row_tree(np.arange(LENGTH, dtype=np.int32) + 3, np.ones(LENGTH, np.float32)) for _ in range(ROWS)]
    stepper = Stepper(model, attachment, SFT(), AdamW())
    stepper.forward_backward(rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stepper.forward_backward(rows)
    stepper.zero_grad()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]  # type: ignore[union-attr]
    sizes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    batch = MicroBatch(tuple(range(ROWS)), TOKENS, LENGTH)
    work = replace(work_of(model, attachment, batch, TOKENS - ROWS), recomputed=Recomputed(blocks=recomputed, far=far))
    decoder = decoder_of(model)
    assert lane.out_bytes // 2 == far_inputs(decoder, work) and UNDER_WAY == far_inputs_module.UNDER_WAY
    return max(accumulate(sizes)), peak(decoder, work), lane.out_bytes // 2


def test_inputs_that_lie_with_the_host_are_not_kept() -> None:
    """Breaks when a peak is planned as if inputs were on the device, or as if none of them came back."""
    found = {(again, far): peak_of_a_pass(again, far=far) for again in (2, 8) for far in (False, True)}
    for measured, formula, _ in found.values():
        assert formula.total == pytest.approx(measured, rel=0.06)
    assert found[2, True][1] == found[2, False][1], "two are on the device anyway"
    saved = found[8, False][1].total - found[8, True][1].total
    assert saved == found[8, True][2] * 6 // 8 > 0
