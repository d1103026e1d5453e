"""Adapters: what of a model is trained, as edits on sites.

The contract: an adapter sees sites (role, layer, sizes, weight) and returns edits. It never sees a model class, a
quantizer or an optimizer. It also says how its knobs are written in PEFT's `adapter_config.json`, and how many
parameters it trains, which is tested against what it makes. Saving, loading, disabling, undoing, merging and counting
are in `model/`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.core.knobs import Method
from luthier.model.edits import Edit
from luthier.model.sites import Sites


class Adapter(Method):
    """A way to adapt a model."""

    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method, or None when PEFT has no such file; the result is then a whole model."""

    @abstractmethod
    def attach(self, sites: Sites) -> list[Edit]:
        """The edits, with fresh parameters drawn from torch's default generator. Raises RecipeError for no match."""

    @abstractmethod
    def parameter_count(self, sites: Sites) -> int:
        """Trained parameters in closed form, without making them."""

    @abstractmethod
    def peft_config(self, sites: Sites) -> dict[str, Any]:
        """The method's own keys of `adapter_config.json`."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The adapter an `adapter_config.json` describes. Raises RecipeError for settings it does not have."""


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """The adapter that an `adapter_config.json` describes, whichever method wrote it."""
    kinds = {name: catalog.load("adapters", name) for name in catalog.names("adapters")}
    known = [kind for kind in kinds.values() if issubclass(kind, Adapter) and kind.peft_type is not None]
    for kind in known:
        if kind.peft_type == config.get("peft_type"):
            return kind.from_peft(config)
    raise RecipeError(
        f"adapter_config.json has peft_type {config.get('peft_type')!r}",
        allowed=", ".join(str(kind.peft_type) for kind in known),
    )
