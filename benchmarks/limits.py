"""The speed that cannot be exceeded: the products that a token needs, at the rate the machine showed meanwhile.

The work is that of a token of these rows, whoever does it: no padding, nothing computed twice, logits where there is a
label. The rate is the highest that its process has probed, for a large square product and for the widest product of the
model's own blocks, before and after, so that no system looks better because a probe was disturbed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from results import matrix_rate
from workloads import MODELS, WORKLOADS, Method, Shape

from luthier.arithmetic import inference
from luthier.arithmetic.compute import Attention, Linear, flops_per_token
from luthier.arithmetic.shapes import Shape as ModelShape


def percent_of_limit(line: Mapping[str, Any], *, rank: int) -> float:
    """The speed of a line as a share of what its products must take."""
    workload, tokens = WORKLOADS[line["workload"]], line["tokens"]
    flops = token_flops(
        MODELS[workload.model],
        workload.method,
        rank=rank,
        share=tokens["supervised"] / tokens["real"],
        context=tokens["pairs"] / tokens["real"],
    )
    return round(100 * line["tokens_per_second"] * flops / (matrix_rate(line["probes"]) * 1e9), 1)


def token_flops(shape: Shape, method: Method, *, rank: int, share: float, context: float) -> float:
    """FLOPs of an average token: `share` of all tokens have a label, and each attends to `context` positions.

    Under LoRA nothing below the first q, k and v is trained, so their inputs need no gradient; embedding and head are
    frozen, and the head costs a product forward and one backward whether it is tied or not. When all weights are
    trained, each product is made a third time, for the gradient of its weights.
    """
    full = method == "full"
    linears = []
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.blocks.items():
            below = full or layer > 0 or name not in "qkv"
            linears.append(
                Linear(inputs=inputs, outputs=outputs, rank=0 if full else rank, trained=full, below=below)
            )
    linears.append(Linear(inputs=shape.hidden, outputs=shape.vocabulary, trained=full, share=share))
    return flops_per_token(linears, [Attention(width=shape.hidden, context=context)] * shape.layers)


def generation_seconds(
    shape: ModelShape,
    lengths: Sequence[tuple[int, int]],
    *,
    shared: bool,
    weights: float,
    flops_per_second: float,
    bytes_per_second: float,
) -> float:
    """The least time for requests that are there at once, of so many tokens of prompt and answer, numbers of 2 bytes.

    Prompts are read at the rate of products, one that is `shared` once. Then each step reads all weights and the keys
    and values of those that still speak, or multiplies, whichever takes longer; nothing else takes any time.
    """
    read = sum(inference.prefill_flops(shape, prompt) for prompt, _ in (lengths[:1] if shared else lengths))
    seconds = max(read / flops_per_second, weights / bytes_per_second)
    for step in range(1, max(answer for _, answer in lengths)):
        seen = [prompt + step for prompt, answer in lengths if answer > step]
        seconds += inference.decode_seconds(
            shape, weights=weights, rows=len(seen), context=sum(seen) // len(seen),
            flops_per_second=flops_per_second, bytes_per_second=bytes_per_second,
        )  # fmt: skip
    return seconds
