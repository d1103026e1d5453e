"""What a command line asks of a plan, as knobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.core.chosen import choose
from luthier.core.recipe_file import read_layers, validated
from luthier.quantizers import Quantizer
from luthier.recipes.plan import PlanKnobs
from luthier.recipes.presets import IN_CONTEXT, preset

DEFAULTS: dict[str, Any] = {
    "adapter": {"method": "lora"}, "quantizer": {"method": "none"}, "optimizer": {"method": "adamw"},
}  # fmt: skip


def asked(method: str, sets: Sequence[str] = (), memory: float | None = None) -> PlanKnobs:
    """The knobs of a method, as it is compared, with what was set. Raises RecipeError for what is none of both."""
    chosen = {key: value for key, value in preset(method).items() if key in DEFAULTS and method != IN_CONTEXT}
    known = tuple(PlanKnobs.model_fields)
    layered = read_layers(None, sets=sets, defaults={**DEFAULTS, **chosen}, known=known)
    knobs = validated(PlanKnobs, layered)
    return knobs.model_copy(update={"memory_bytes": memory or knobs.memory_bytes})


def packed_bytes(quantizer: str) -> Callable[[tuple[int, int]], int | None]:
    """What a quantizer says a matrix takes."""
    return choose("quantizers", Quantizer, quantizer).packed_bytes
