"""What the gate lets through of a config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from luthier.model.zoo import ZooConfig


@final
@dataclass(frozen=True, slots=True)
class Checked:
    """A config made from what the gate let through, and what a user should know about the rest."""

    config: ZooConfig
    notices: tuple[str, ...]
    quantization: dict[str, object]
