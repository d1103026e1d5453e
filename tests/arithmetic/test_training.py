"""Closed formulas of training against autograd, torch's own counters and the states of optimizers."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from luthier.arithmetic import training
from luthier.arithmetic.shapes import shape_of
from luthier.core import catalog
from luthier.optimizers import Optimizer


class Block(nn.Module):
    """The block that Korthikanti counts: GPT's, attention written out, dropout on weights and on both outputs."""

    def __init__(self, hidden: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, hidden = x.shape
        cut = self.qkv(self.norms[0](x)).view(rows, length, 3, self.heads, hidden // self.heads)
        query, key, value = cut.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        weights = F.dropout(torch.softmax(query @ key.transpose(-1, -2), -1), self.dropout)
        heads = (weights @ value).transpose(1, 2).reshape(rows, length, hidden)
        x = x + F.dropout(self.out(heads), self.dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norms[1](x)))), self.dropout)


def kept(block: Block, x: Tensor) -> int:
    """Bytes that autograd keeps: each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            found[place] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(("s", "b", "h", "a"), [(64, 2, 128, 4), (24, 3, 32, 2)])
def test_korthikantis_block_keeps_what_the_formula_says(s: int, b: int, h: int, a: int) -> None:
    """Breaks when the formula is another one than autograd's account of the same block.

    On a CPU a mask takes two bytes and not one (2 s b h + a s s b more), and norms keep 8 bytes a token.
    """
    torch.manual_seed(0)
    block = Block(h, a, dropout=0.1).bfloat16()
    x = torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True)
    formula = training.activation_bytes(sequence=s, batch=b, hidden=h, heads=a, layers=1)
    assert formula == 34 * s * b * h + 5 * a * s * s * b
    masks, statistics = 2 * s * b * h + a * s * s * b, 8 * s * b
    assert kept(block, x) == formula + masks + statistics == 36 * s * b * h + 6 * a * s * s * b + 8 * s * b


def test_activations_by_what_is_made_again_and_shared() -> None:
    """Equations 1, 2, 4 and the rows of table 2."""
    sizes: dict[str, int] = {"sequence": 2048, "batch": 1, "hidden": 12288, "heads": 96, "layers": 96}
    s, b, h, a, layers = sizes.values()
    plain = training.activation_bytes(**sizes)
    assert plain == s * b * h * layers * (34 + 5 * a * s / h)
    shared = training.activation_bytes(**sizes, tensor_parallel=8)
    assert shared == s * b * h * layers * (10 + 24 / 8 + 5 * a * s / h / 8)
    light = training.activation_bytes(**sizes, recompute="selective")
    assert light == 34 * s * b * h * layers
    full = training.activation_bytes(**sizes, recompute="full")
    assert full == 2 * s * b * h * layers + plain / layers
    # "5as/h = 80" for GPT-3: selective recomputation saves 70 % there.
    assert 5 * a * s / h == 80 and round(1 - light / plain, 2) == 0.70


@pytest.mark.parametrize(
    ("frozen", "expected"), [(False, 6), (True, 4)], ids=["all is trained", "the base is frozen"]
)
def test_flops_are_those_that_torch_counts(frozen: bool, expected: int) -> None:
    """Breaks when a frozen layer is counted with a gradient of its weight, or attention with half of its products."""
    h, a, s = 32, 2, 16
    block = Block(h, a, dropout=0.0).requires_grad_(not frozen)
    x = torch.randn(1, s, h, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    products = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
    told = training.model_flops(products, layers=1, width=h, sequence=s, trained_base=not frozen, causal=False)
    assert told == expected * products + 12 * h * s
    assert counter.get_total_flops() == told * s


def test_what_is_made_again_costs_a_forward_pass_more() -> None:
    args: dict[str, Any] = {"layers": 2, "width": 8, "sequence": 4, "causal": True}
    assert training.model_flops(10, **args) == 60 + 12 * 2 * 8 * 4 / 2
    assert training.model_flops(10, **args, recompute="full") == 80 + 16 * 2 * 8 * 4 / 2
    assert training.model_flops(10, **args, recompute="selective") == 60 + 16 * 2 * 8 * 4 / 2


def test_the_states_that_handbooks_give() -> None:
    """16 and 18 bytes of mixed Adam, 8 of pure bfloat16, 6 of 8-bit moments beside a master."""
    assert training.State(gradient=2).total == 16 and training.State().total == 18
    assert training.State(gradient=2, master=0, optimizer=4).total == 8
    assert training.State(weight=0, gradient=0, optimizer=2).total == 6
    parts = training.state_bytes(10, training.State(), frozen=100)
    assert parts == {"weights": 120, "gradients": 40, "masters": 40, "optimizer": 80}


def test_zero_divides_one_part_after_another() -> None:
    """Breaks when a stage divides what it leaves whole, or the other way round (ZeRO's figure 1: 120, 31.4, 16.6, 1.9
    GB for 7.5B parameters on 64 devices)."""
    state = training.State(gradient=2)
    told = {way: sum(training.state_bytes(7_500_000_000, state, devices=64, sharding=way).values()) / 1e9
            for way in get_args(training.Sharding)}  # fmt: skip
    assert {way: round(size, 1) for way, size in told.items()} == {
        "none": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9, "fsdp": 1.9,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw", 8), ("lion", 4), ("sgd", 4), ("paged_adamw", 8)])
def test_optimizers_say_what_the_handbook_says(name: str, bytes_each: int) -> None:
    """The methods' own statements, which tests/contracts compare with their state dicts, are the known numbers."""
    kind = catalog.load("optimizers", name)
    assert issubclass(kind, Optimizer)
    shapes = {"a": (256, 512), "b": (512,)}
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    assert kind(**momentum).state_bytes(shapes) == bytes_each * (256 * 512 + 512)


def test_logits_are_often_the_largest_part() -> None:
    shape = shape_of({"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
                      "num_attention_heads": 14})  # fmt: skip
    assert training.logit_bytes(tokens=4096, vocabulary=shape.vocabulary) == 8 * 4096 * 151936
