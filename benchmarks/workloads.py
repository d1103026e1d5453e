"""What is measured, as a table: models by shape, workloads by model, rows and steps. Plain data, nothing is imported.

A workload is the same work for every system: which weights, what is trained, which rows, how many of them a step. Its
two tiers say how long to look: `quick` gives a first impression of all workloads in minutes, `full` the figures that
may be quoted. To add a workload, add an entry; to add a model, an entry of MODELS that `prepare.py` can build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_TOKENS = 512
Method = Literal["lora", "full"]
OURS = "luthier"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder by its sizes. `biases` are those of q, k and v; a `tied` head shares the weights of the embedding."""

    family: Literal["llama", "qwen2"]
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    tied: bool
    biases: bool
    positions: int
    rope_theta: float
    norm_epsilon: float

    @property
    def blocks(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a block, in the order in which a token passes them."""
        keys = self.hidden // self.heads * self.key_value_heads
        return {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, keys),
            "v": (self.hidden, keys),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.inner),
            "up": (self.hidden, self.inner),
            "down": (self.inner, self.hidden),
        }

    @property
    def widest(self) -> tuple[int, int]:
        """Inputs and outputs of the largest product of a block."""
        return max(self.blocks.values(), key=lambda sizes: sizes[0] * sizes[1])

    @property
    def parameters(self) -> int:
        """All weights, those of norms and biases included."""
        block = sum(inputs * outputs for inputs, outputs in self.blocks.values()) + 2 * self.hidden
        block += sum(self.blocks[name][1] for name in "qkv") if self.biases else 0
        return self.layers * block + self.hidden + (1 if self.tied else 2) * self.hidden * self.vocabulary


MODELS = {
    "m1": Shape(
        family="llama", hidden=512, layers=8, heads=8, key_value_heads=4, inner=1408, vocabulary=32000, tied=False,
        biases=False, positions=4096, rope_theta=10_000.0, norm_epsilon=1e-6,
    ),
    # The shape of Qwen2.5-0.5B.
    "m2": Shape(
        family="qwen2", hidden=896, layers=24, heads=14, key_value_heads=2, inner=4864, vocabulary=151936, tied=True,
        biases=True, positions=32768, rope_theta=1_000_000.0, norm_epsilon=1e-6,
    ),
    # The shape of Llama-3.1-8B: 16 GB, for a GPU.
    "m8": Shape(
        family="llama", hidden=4096, layers=32, heads=32, key_value_heads=8, inner=14336, vocabulary=128256, tied=False,
        biases=False, positions=131072, rope_theta=500_000.0, norm_epsilon=1e-5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tier:
    """How long one look takes: steps of a process, those of them that are not timed, processes of each system."""

    steps: int
    warm: int
    repetitions: int
    systems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of work. `rows` is a file beside the model, `batch` how many of its rows make a step.

    `longest` is the most tokens of a row, `device` where the work is measured unless somebody says otherwise. Where it
    is `packed`, the frozen weights of the blocks are in four bits (NF4, double quantization) and moments are paged, as
    in QLoRA.
    """

    title: str
    model: str
    method: Method
    rows: str
    batch: int
    quick: Tier
    full: Tier
    packed: bool = False
    longest: int = MAX_TOKENS
    device: Literal["cpu", "cuda"] = "cpu"

    def tier(self, name: str) -> Tier:
        return {"quick": self.quick, "full": self.full}[name]


# Grouping rows by length and turning checkpointing off were found to be the best settings of both peers.
_QUICK = (OURS, "trl-stock", "trl-tuned", "llamafactory-tuned")
_PACKED = (OURS, "trl-stock", "trl-tuned")
"""Who trains on weights in four bits here: LLaMA-Factory's way to do so asks for a GPU."""
_GPU = (OURS, "trl-stock", "trl-tuned")
_ALL = (*_QUICK, "trl-tuned-no-autocast", "llamafactory-stock", "llamafactory-tuned-no-autocast")

WORKLOADS = {
    "m1-lora": Workload(
        title="LoRA, a llama of 56 million parameters, rows of many lengths",
        model="m1", method="lora", rows="rows.jsonl", batch=16,
        quick=Tier(4, 1, 1, _QUICK), full=Tier(9, 1, 5, _ALL),
    ),
    "m1-full": Workload(
        title="all weights, the same model and rows",
        model="m1", method="full", rows="rows.jsonl", batch=16,
        quick=Tier(4, 1, 1, _QUICK), full=Tier(9, 1, 5, _ALL),
    ),
    "m2-lora": Workload(
        title="LoRA, the shape of Qwen2.5-0.5B, rows of many lengths",
        model="m2", method="lora", rows="rows.jsonl", batch=4,
        quick=Tier(4, 1, 1, _QUICK), full=Tier(9, 1, 5, _ALL),
    ),
    "m2-fixed": Workload(
        title="LoRA, the shape of Qwen2.5-0.5B, 512 tokens in every row and a loss on each",
        model="m2", method="lora", rows="fixed.jsonl", batch=4,
        quick=Tier(2, 1, 1, _QUICK), full=Tier(4, 1, 5, _ALL),
    ),
    "m2-qlora": Workload(
        title="QLoRA (NF4, double quantization, paged AdamW), the shape of Qwen2.5-0.5B, rows of many lengths",
        model="m2", method="lora", rows="rows.jsonl", batch=4, packed=True,
        quick=Tier(4, 1, 1, _PACKED), full=Tier(9, 1, 5, (*_PACKED, "trl-tuned-no-autocast")),
    ),
    # The first steps of a GPU compile kernels and record graphs.
    "m2-lora-64": Workload(
        title="LoRA, the shape of Qwen2.5-0.5B, 64 rows of many lengths",
        model="m2", method="lora", rows="rows.jsonl", batch=64, device="cuda",
        quick=Tier(10, 4, 1, _GPU), full=Tier(24, 4, 5, _GPU),
    ),
    "m8-lora-4096": Workload(
        title="LoRA, the shape of Llama-3.1-8B, 4,096 tokens in every row and a loss on each",
        model="m8", method="lora", rows="fixed.jsonl", batch=2, longest=4096, device="cuda",
        quick=Tier(6, 2, 1, (OURS, "trl-tuned")), full=Tier(12, 2, 5, _GPU),
    ),
}  # fmt: skip
