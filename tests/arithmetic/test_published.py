"""Published tables: every row that follows from shapes alone, within the rounding in which it was printed.

Rows that do not follow from shapes are listed with their difference in docs/plan.md.
"""

from __future__ import annotations

import pytest

from luthier.arithmetic import inference, training
from luthier.arithmetic.compute import Attention, Linear, flops_per_token, forward_flops
from luthier.arithmetic.shapes import Shape, shape_of
from luthier.quantizers.nf4 import NF4
from tests.arithmetic.published import config

GIB, MIB = 2**30, 2**20


def rounded(value: float, printed: str) -> bool:
    """Whether a value is what was printed, in as many digits."""
    digits = len(printed.partition(".")[2])
    return f"{value:.{digits}f}" == printed


def shape(name: str) -> Shape:
    return shape_of(config(name))


def low_rank(name: str, rank: int, sites: slice = slice(None)) -> int:
    return sum(each.count * rank * (each.inputs + each.outputs) for each in shape(name).matrices[sites])


def test_lora_counts() -> None:
    """q and v of LLaMA-7B at r = 8; QLoRA's r = 64 on all linear layers (reference/methods.md, card 10)."""
    llama = shape("LLaMA-7B")
    assert 32 * 2 * 8 * (llama.hidden + llama.query) == 4_194_304
    assert low_rank("LLaMA-7B", 64) == 159_907_840


def test_weights_of_llama_2_70b() -> None:
    """Card 46: 137.95 GB in bfloat16, 165.5 GB by the rule of thumb; 138 and 166 with all parameters, not 70e9."""
    weights = inference.weight_bytes(shape("Llama-2-70B"), 2)
    assert rounded(weights / 1e9, "137.95")
    assert rounded(inference.rule_of_thumb(weights) / 1e9, "165.5")


def test_bits_of_nf4() -> None:
    """QLoRA, section 3: 0.5 and 0.127 bits a parameter for scales, 0.373 saved; 4.127 in all; 3 GB saved at 65B."""
    llama = shape("LLaMA-65B")
    double = inference.weight_bytes(llama, 2, NF4().packed_bytes)
    single = inference.weight_bytes(llama, 2, NF4(double=False).packed_bytes)
    rest = 2 * (llama.parameters - llama.blocks)
    assert rounded(8 * (double - rest) / llama.blocks, "4.127")
    assert rounded(8 * (single - rest) / llama.blocks, "4.500")
    assert rounded(8 * (single - double) / llama.blocks, "0.373")
    assert rounded((single - double) / 1e9, "3")


def test_nf4_with_and_without_double_quantization_in_litgpt() -> None:
    """LitGPT's resource tables, Llama-2-7B LoRA: 14.1 GB with nf4, 13.8 GB with nf4-dq."""
    llama = shape("LLaMA-7B")
    saved = inference.weight_bytes(llama, 2, NF4(double=False).packed_bytes)
    saved -= inference.weight_bytes(llama, 2, NF4().packed_bytes)
    assert rounded(saved / 1e9, "0.3")


@pytest.mark.parametrize(
    ("state", "bytes_each"),
    [
        (training.State(), 18),
        (training.State(gradient=2, master=0, optimizer=4), 8),
        (training.State(gradient=0, master=0, optimizer=0), 2),
    ],
    ids=["full mixed", "pure bf16", "LoRA"],
)
def test_llama_factorys_bytes_a_parameter(state: training.State, bytes_each: int) -> None:
    """LLaMA-Factory's README: 18 x, 8 x and 2 x GB for x billion parameters."""
    assert sum(training.state_bytes(10**9, state).values()) == bytes_each * 10**9


def test_full_tuning_of_65b_takes_more_than_780_gb() -> None:
    """QLoRA's abstract: 16-bit tuning with Adam, 12 bytes a parameter."""
    parts = training.state_bytes(shape("LLaMA-65B").parameters, training.State(gradient=2, master=0))
    assert rounded(sum(parts.values()) / 1e9, "783")


@pytest.mark.parametrize(
    ("copies", "number", "printed"), [(3, 4, 24_000), (2, 4, 16_000)], ids=["baseline, loss", "torch.compile"]
)
def test_logits_of_cut_cross_entropy(copies: int, number: int, printed: int) -> None:
    """Cut Cross-Entropy, table 1 (Gemma 2 2B, 8,192 tokens), in MiB: whole copies of float32 logits."""
    gemma = shape("gemma-2-2b")
    held = training.logit_bytes(tokens=8192, vocabulary=gemma.vocabulary, number=number, copies=copies)
    assert held / MIB == printed


def test_what_is_left_of_the_logits_of_cut_cross_entropy() -> None:
    """The same table: 28,000 MiB with the gradient of the logits in 16 bits; ours would keep gradients alone: 1,161."""
    gemma, tokens = shape("gemma-2-2b"), 8192
    assert (3 * 4 + 2) * tokens * gemma.vocabulary / MIB == 28_000
    assert rounded(2 * (gemma.table + tokens * gemma.hidden) / MIB, "1161")


def test_unsloths_grpo_table() -> None:
    """Llama-3.1-8B, 20k tokens (20,480), 8 answers: logits 78.3 GB, 9.8 one after another, the cache 2.5; GiB all."""
    llama, length = shape("Llama-3.1-8B"), 20_480
    one = training.logit_bytes(tokens=length, vocabulary=llama.vocabulary, copies=1)
    assert rounded(8 * one / GIB, "78.3") and rounded(one / GIB, "9.8")
    assert rounded(inference.cache_bytes(llama, length) / GIB, "2.5")


def test_the_cache_of_a_13b_model() -> None:
    """kipply: 2 x 2 x 40 x 5120 bytes; what reference/performance.md 3.2 gives for models with grouped heads."""
    assert inference.cache_bytes_per_token(shape("LLaMA-13B")) == 819_200
    told = {"Qwen2.5-0.5B": 12_288, "Qwen3-0.6B": 114_688, "Llama-3.2-1B": 32_768, "Llama-3.1-8B": 131_072}
    assert {name: inference.cache_bytes_per_token(shape(name)) for name in told} == told


def test_ridges() -> None:
    """kipply: 208 on an A100; reference/performance.md 3.2: about 183 on an H200 and 9 on the reference CPU box."""
    assert inference.ridge(312e12, 1.5e12) == 208
    assert rounded(inference.ridge(788e12, 4.3e12), "183") and rounded(inference.ridge(400e9, 46e9), "9")


def test_zero_of_korthikanti_and_mt_nlg() -> None:
    """Korthikanti, section 5: what selective recomputation saves, GPT-3 (70 %) and MT-NLG 530B (65 %)."""
    for hidden, heads, layers, printed in ((12288, 96, 96, "0.70"), (20480, 128, 105, "0.65")):
        each = {"sequence": 2048, "batch": 1, "hidden": hidden, "heads": heads, "layers": layers}
        light = training.activation_bytes(**each, recompute="selective")
        assert rounded(1 - light / training.activation_bytes(**each), printed)


CEILINGS = (
    # shape, N_b, H, share of the head, LoRA (M); GFLOP a token at 2048 without and with recomputation
    ("Qwen2.5-0.5B", "357.8", "136.1", "28", "8.8", "2.34", "3.16"),
    ("Qwen3-0.6B", "440.4", "155.6", "26", "10.1", "3.27", "4.40"),
    ("Llama-3.2-1B", "973.1", "262.7", "21", "11.3", "5.48", "7.58"),
    ("Qwen2.5-7B", "6525", "545", "8", "40.4", "29.96", "43.5"),
    ("Llama-3.1-8B", "6979", "525", "7", "41.9", "32.15", "46.7"),
)
RATES = {
    # thousand tokens/s on an H200 (788 TFLOP/s) at 2048: full, LoRA, LoRA with recomputation
    "Qwen2.5-0.5B": ("241", "337", "250"), "Qwen3-0.6B": ("179", "241", "179"), "Llama-3.2-1B": ("100", "144", "104"),
    "Qwen2.5-7B": ("18.0", "26.3", "18.1"), "Llama-3.1-8B": ("16.8", "24.5", "16.9"),
}  # fmt: skip
CPU_RATES = {
    # tokens/s at 400 GFLOP/s and 512 tokens: full, LoRA, LoRA where 3 of 10 tokens are asked for
    "Qwen2.5-0.5B": ("132", "190", "232"), "Qwen3-0.6B": ("106", "151", "181"), "Llama-3.2-1B": ("53", "78", "91"),
    "Qwen2.5-7B": ("9", "14", "15"), "Llama-3.1-8B": ("9", "13", "14"),
}  # fmt: skip


def products(name: str, *, rank: int = 0, asked: float = 1.0, length: int) -> tuple[list[Linear], list[Attention]]:
    """All products of a model, LoRA on every one of the blocks' where `rank` says so."""
    one = shape(name)
    linears = [
        Linear(inputs=each.inputs, outputs=each.outputs, rank=rank, trained=not rank)
        for each in one.matrices for _ in range(each.count)
    ]  # fmt: skip
    head = Linear(inputs=one.hidden, outputs=one.vocabulary, trained=not rank, share=asked)
    return [*linears, head], [Attention(width=one.query, context=length / 2) for _ in range(one.layers)]


@pytest.mark.parametrize("row", CEILINGS, ids=[row[0] for row in CEILINGS])
def test_ceilings_of_training(row: tuple[str, ...]) -> None:
    """reference/performance.md 3.1, with the formulas that a run's limit is told by (compute.py)."""
    name, blocks, head, share, adapter, flops, again = row
    one = shape(name)
    assert rounded(one.blocks / 1e6, blocks) and rounded(one.table / 1e6, head)
    assert rounded(100 * one.table / (one.blocks + one.table), share)
    assert rounded(low_rank(name, 16) / 1e6, adapter)
    linears, attentions = products(name, rank=16, length=2048)
    lora = flops_per_token(linears, attentions)
    # Of the head nothing is made again.
    more = forward_flops(linears[:-1], attentions)
    assert rounded(lora / 1e9, flops) and rounded((lora + more) / 1e9, again)
    full = flops_per_token(*products(name, length=2048))
    for cost, printed in zip((full, lora, lora + more), RATES[name], strict=True):
        assert rounded(788e12 / cost / 1e3, printed)
    costs = (
        flops_per_token(*products(name, length=512)),
        flops_per_token(*products(name, rank=16, length=512)),
        flops_per_token(*products(name, rank=16, asked=0.3, length=512)),
    )
    for cost, printed in zip(costs, CPU_RATES[name], strict=True):
        assert rounded(400e9 / cost, printed)


DECODE = {
    # H200 at 1, 64 and 256 rows; CPU in bfloat16, int8 and NF4 with one row, in bfloat16 with 8
    "Qwen2.5-0.5B": (4326, 197_921, 423_643, "46", "92", "99", "354"),
    "Qwen3-0.6B": (3438, 55_595, 67_848, "37", "70", "77", "221"),
    "Llama-3.2-1B": (1728, 77_623, 162_682, "18", "37", "44", "141"),
    "Llama-3.1-8B": (285, 14_256, 34_198, "3", "6", "10", "24"),
}


@pytest.mark.parametrize("name", DECODE)
def test_ceilings_of_decoding(name: str) -> None:
    """reference/performance.md 3.2, to half a per mille: the table leaves norms and biases out, which are read."""
    one, told = shape(name), DECODE[name]

    def rate(rows: int, flops: float, bandwidth: float, weights: float) -> float:
        seconds = inference.decode_seconds(
            one, weights=weights, rows=rows, context=512, flops_per_second=flops, bytes_per_second=bandwidth
        )
        return rows / seconds

    for rows, printed in zip((1, 64, 256), told[:3], strict=True):
        found = rate(rows, 788e12, 4.3e12, inference.weight_bytes(one, 2))
        assert abs(found - printed) <= 0.5 + 5e-4 * printed
    looked_up = 0 if one.tied else 2 * one.table
    weights = (
        inference.weight_bytes(one, 2),
        one.blocks + one.table + looked_up,
        inference.weight_bytes(one, 2, NF4().packed_bytes),
    )
    for size, printed in zip(weights, told[3:6], strict=True):
        assert rounded(rate(1, 1e15, 46e9, size), str(printed))
    assert rounded(rate(8, 1e15, 46e9, weights[0]), str(told[6]))
