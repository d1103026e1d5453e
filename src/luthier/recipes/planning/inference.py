"""What answering takes: weights, a cache for each client, and how fast that can be; from a config, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.arithmetic import inference
from luthier.arithmetic.shapes import Shape, shape_of
from luthier.core.errors import RecipeError
from luthier.core.nearest import nearest
from luthier.data.hub import in_cache, read_json
from luthier.model.files.sources import FRESH, SEEDLING, resolve_source

NUMBERS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by precision."""
MOST_TOKENS = 2**24
"""The longest text that is tried where a config does not say how long one may be."""


def config_file(place: Path) -> Path:
    """The config.json that a path means, or a model's name; that of a hub id from the hub cache: none is fetched."""
    name = str(place).removeprefix(FRESH)
    folder = Path(resolve_source(name)) if name == SEEDLING else Path(name)
    found = folder / "config.json" if folder.is_dir() else folder
    if found.is_file():
        return found
    if not folder.exists() and (kept := in_cache(name, "config.json")) is not None:
        return kept
    raise RecipeError(
        f"there is no {found}", allowed="the config.json of a model, or a folder with one; seedling; or a hub id whose "
        "files are here already",
        do="did you mean seedling?" if nearest(name, [SEEDLING], cutoff=0.8) else
        "check the path, or download that file from the model's page; its weights are not needed",
    )  # fmt: skip


def plan_inference(
    config: Path,
    *,
    clients: int = 1,
    context: int = 2048,
    precision: str = "bfloat16",
    packed: Callable[[tuple[int, int]], int | None] | None = None,
    memory: float | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Memory and least time of answering so many clients, each with a text of so many tokens, by a config.json.

    `packed` says what a packed matrix takes; `memory`, `flops` and `bandwidth` are those of the device.
    """
    rates = {"tflops": (flops, 1e12), "bandwidth": (bandwidth, 1e9)}
    _require(precision, {"clients": clients, "context": context}, rates)
    shape, number = shape_of(read_json(config_file(config))), NUMBERS[precision]
    weights = inference.weight_bytes(shape, number, packed)
    each = inference.cache_bytes(shape, context, number)
    total = weights + clients * each
    return {
        "parameters": {"total": shape.parameters, **shape.parts},
        "memory": {
            "weights": weights,
            "cache": clients * each,
            "total": total,
            "rule_of_thumb": round(inference.rule_of_thumb(weights)),
            "cache_per_token": inference.cache_bytes_per_token(shape, number),
            "cache_per_client": each,
            "available": None if memory is None else int(memory),
        },
        "flops_per_token": inference.decode_flops(shape, context),
        "seconds_per_1k_tokens": _seconds(shape, weights, clients, context, number, flops, bandwidth),
        "fits": None if memory is None else total <= memory,
        "largest": _largest(shape, weights, memory, clients, each, number),
        "prefill_flops": inference.prefill_flops(shape, context),
        "ridge_rows": inference.ridge(flops, bandwidth, number=number) if flops and bandwidth else None,
        "notices": longer_than(shape, context, "texts", "what a model says past them is noise"),
    }


def longer_than(shape: Shape, tokens: int, what: str, then: str) -> list[str]:
    """What is to be known of `what` has more tokens than the model has positions, and what comes of it."""
    if shape.context is None or tokens <= shape.context:
        return []
    return [f"{what} of {tokens:,} tokens are longer than the model's {shape.context:,} positions: {then}"]


def _require(precision: str, counts: Mapping[str, int], rates: Mapping[str, tuple[float | None, float]]) -> None:
    """Raise RecipeError for a precision that is none, for counts of nothing and for rates that are no speed."""
    if precision not in NUMBERS:
        raise RecipeError(f"precision is {precision!r:.60}", allowed=", ".join(NUMBERS), do="leave it out for bfloat16")
    for name, count in counts.items():
        if count < 1:
            raise RecipeError(f"{name} is {count}", allowed="1 or more", do=f"leave {name} out for the usual")
    for name, (rate, unit) in rates.items():
        if rate is not None and not 0 < rate < math.inf:
            raise RecipeError(
                f"{name} is {rate / unit:g}", allowed="a rate above 0",
                do=f"leave {name} out if you do not know it: then no time is told",
            )  # fmt: skip


def _seconds(
    shape: Shape, weights: int, clients: int, context: int, number: int, flops: float | None, bandwidth: float | None
) -> float | None:
    """The least time for a thousand tokens of all clients together."""
    if not flops or not bandwidth:
        return None
    step = inference.decode_seconds(
        shape, weights=weights, rows=clients, context=context, flops_per_second=flops, bytes_per_second=bandwidth,
        number=number,
    )  # fmt: skip
    return 1000 * step / clients


def _largest(
    shape: Shape, weights: int, memory: float | None, clients: int, each: int, number: int
) -> dict[str, Any]:
    """The most clients with texts of this length, and the longest texts of so many clients, that fit.

    `at_least` names what may be more than the most that is tried.
    """
    if memory is None:
        return {"clients": None, "context": None, "at_least": []}
    most = shape.context or MOST_TOKENS
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        enough = weights + clients * inference.cache_bytes(shape, middle, number) <= memory
        low, high = (middle, high) if enough else (low, middle - 1)
    ended = ["context"] if low == most != shape.context else []
    return {
        "clients": inference.most_rows(memory, weights=weights, cache=each), "context": low, "at_least": ended,
    }  # fmt: skip
