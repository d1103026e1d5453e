"""Presets: what a method is compared as, and QLoRA as the recipe it is.

A preset is a few keys of a recipe: the adapter, what goes with it, and a learning rate that suits it. Rates are
starting points, found on small models; `--set` overrules every one of them. An adapter without a preset is compared
with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.core.nearest import choice

IN_CONTEXT: Final = "in_context"
"""No training: examples are put before each question."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "full": {"adapter": {"method": "full"}, "optimizer": {"method": "adamw", "learning_rate": 2.0e-4}},
    "bitfit": {
        "adapter": {"method": "full", "parts": "biases"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-3},
    },
    "lora": {"adapter": {"method": "lora"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-3}},
    "dora": {"adapter": {"method": "dora"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-3}},
    "ia3": {"adapter": {"method": "ia3"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-2}},
    "bottleneck": {"adapter": {"method": "bottleneck"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-3}},
    "prompt_tuning": {
        "adapter": {"method": "prompt_tuning"}, "optimizer": {"method": "adamw", "learning_rate": 0.1},
    },
    "p_tuning": {"adapter": {"method": "p_tuning"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-3}},
    "prefix_tuning": {
        "adapter": {"method": "prefix_tuning", "projection": True},
        "optimizer": {"method": "adamw", "learning_rate": 1.0e-3},
    },
    # Deep prompts without a network before them; its head for classes belongs to encoders.
    "p_tuning_v2": {"adapter": {"method": "prefix_tuning"}, "optimizer": {"method": "adamw", "learning_rate": 1.0e-2}},
    "galore": {
        "adapter": {"method": "full"},
        "optimizer": {"method": "galore", "learning_rate": 1.0e-3, "rank": 64, "scale": 0.25},
    },
    "qlora": {
        "adapter": {"method": "lora", "rank": 64, "alpha": 16.0, "targets": "all-linear"},
        "quantizer": {"method": "nf4"},
        "optimizer": {"method": "paged_adamw", "learning_rate": 1.0e-3},
        "max_grad_norm": 0.3,
    },
    IN_CONTEXT: {},
}  # fmt: skip


def preset(name: str) -> Mapping[str, Any]:
    """The keys of a method. Raises RecipeError for a name that is neither a preset nor an adapter."""
    if name in PRESETS:
        return PRESETS[name]
    adapters = catalog.names("adapters")
    if name in adapters:
        return {"adapter": {"method": name}}
    known = sorted({*PRESETS, *adapters})
    raise RecipeError(f"there is no method {name!r}", do=choice(name, known))
