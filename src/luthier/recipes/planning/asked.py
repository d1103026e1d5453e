"""What is asked of a plan by a config, as knobs, and everything that is answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.recipe_file import DEFAULT, plain_layer, read_layers, validated
from luthier.quantizers import Quantizer
from luthier.recipes.planning.explained import explained
from luthier.recipes.planning.fits import advice, largest
from luthier.recipes.planning.inference import config_file
from luthier.recipes.planning.plan import Machine, PlanKnobs, cost, lay, plan_training
from luthier.recipes.schemas.presets import IN_CONTEXT, preset

DEFAULTS: dict[str, Any] = {
    "adapter": {"method": "lora"}, "quantizer": {"method": "none"}, "optimizer": {"method": "adamw"},
}  # fmt: skip


def asked(
    method: str, sets: Sequence[str] = (), memory: float | None = None, *, options: Mapping[str, Any] | None = None
) -> PlanKnobs:
    """The knobs of a method, as it is compared, with what was set. Raises RecipeError for what is none of both.

    `options` are knobs by their dotted keys that have options of their own: sets are stronger.
    """
    if method == IN_CONTEXT:
        raise RecipeError(
            f"{method} trains nothing", allowed="methods that train",
            do="plan answering, with texts that are longer by the examples: --inference --context N",
        )  # fmt: skip
    if memory is not None and not 1 <= memory < math.inf:
        raise RecipeError(f"a memory of {memory:g} bytes", allowed="1 or more", do="leave it out for what is free here")
    chosen = {key: value for key, value in preset(method).items() if key in DEFAULTS}
    known = tuple(PlanKnobs.model_fields)
    # By their own names: what is wrong with --sequence is not said of --set.
    own = plain_layer(options or {}, origin=DEFAULT)
    layered = read_layers(None, sets=sets, preset=own, defaults={**DEFAULTS, **chosen}, known=known)
    knobs = validated(PlanKnobs, layered)
    return knobs.model_copy(update={"memory_bytes": memory or knobs.memory_bytes})


def answered(
    config: Path, knobs: PlanKnobs, machine: Machine, *,
    tokens: float | None = None, price: float | None = None, explain: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What training by a config takes, the largest that fits, and what would fit instead; the formulas where asked.

    Of a run of so many tokens also its time, and what it costs at a price of a device and hour.
    """
    if price is not None and tokens is None:
        raise RecipeError(f"price is {price} of a run of no known length", do="give its tokens too, or leave price out")
    if tokens is not None and not 0 < tokens < math.inf:
        raise RecipeError(f"tokens is {tokens:g}", allowed="a number above 0", do="leave it out: then no time is told")
    if price is not None and not 0 <= price < math.inf:
        raise RecipeError(f"price is {price:g}", allowed="0 or more", do="leave it out: then no price is told")
    config = config_file(config)
    laid = lay(config, knobs)
    found = plan_training(laid, machine)
    if tokens is not None:
        found["cost"] = cost(found, tokens, price)
    # Before the advice, which puts other adapters on the model.
    formulas = {"formulas": dict(explained(laid, found))} if explain else {}
    return {**found, "largest": largest(laid), "advice": advice(config, laid), **formulas}


def packed_bytes(quantizer: str) -> Callable[[tuple[int, int]], int | None]:
    """What a quantizer says a matrix takes."""
    return choose("quantizers", Quantizer, quantizer).packed_bytes
