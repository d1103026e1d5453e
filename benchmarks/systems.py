"""Who is measured: our own engine and the peers, each with the script that runs it and the settings it runs with.

A peer appears *stock*, as its documentation starts, and *tuned*, with the settings found to be fastest here. Quote
stock and the fastest of the tuned ones, never one alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workloads import OURS

BASELINE = "trl-stock"
REFERENCE = "reference"


@dataclass(frozen=True)
class System:
    """How one system is started.

    `environment` names the peer's virtual environment, None is our own interpreter; `variables` are set for it.
    `grouped` gives it the rows of the timed steps sorted by length. `rounds` is for settings that only differ where
    the machine multiplies in bfloat16.
    """

    script: str
    kind: Literal["ours", "stock", "tuned"]
    environment: str | None = None
    grouped: bool = False
    rounds: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


_TRL, _TRL_TUNED = "sft_trl.py", {"gradient_checkpointing": False}
# Under autocast it is the faster of its two, and its examples for GPUs turn it on; its default is off.
_FACTORY, _FACTORY_TUNED = "sft_llamafactory.py", {"disable_gradient_checkpointing": True}
SYSTEMS = {
    OURS: System("sft_luthier.py", "ours"),
    "luthier-unfused": System("sft_luthier.py", "ours", variables={"LUTHIER_KERNELS": "torch"}),
    "trl-stock": System(_TRL, "stock", "trl"),
    "trl-tuned": System(_TRL, "tuned", "trl", True, settings=_TRL_TUNED),
    "trl-stock-no-autocast": System(_TRL, "tuned", "trl", False, True, settings={"bf16": False}),
    "trl-tuned-no-autocast": System(_TRL, "tuned", "trl", True, True, settings=_TRL_TUNED | {"bf16": False}),
    "llamafactory-stock": System(_FACTORY, "stock", "llamafactory"),
    "llamafactory-tuned": System(
        _FACTORY, "tuned", "llamafactory", True, settings=_FACTORY_TUNED | {"bf16": True}
    ),
    "llamafactory-tuned-no-autocast": System(
        _FACTORY, "tuned", "llamafactory", True, True, settings=_FACTORY_TUNED | {"bf16": False}
    ),
}
REFERENCE_SYSTEM = System("sft_reference.py", "ours")


def kind(name: str) -> str:
    """What sort of system a line is of; one that is no longer known counts as a tuned peer."""
    return SYSTEMS[name].kind if name in SYSTEMS else "tuned"
