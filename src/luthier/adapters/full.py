"""Full fine-tuning: train the model's own weights.

Idea: no adapter at all; the chosen parameters of the base are trained and the result is a model of its own. The
original parameters are kept aside, so that before and after can be compared and the base comes back on undo.
Equation: theta' = theta + optimizer steps on the gradient of the loss.
Source: the reference point of every adapter comparison; e.g. Hu et al., arXiv 2106.09685, tables 2 and 3. Biases alone
    are BitFit: Ben Zaken et al., arXiv 2106.10199, section 3.
Cost: every parameter of the chosen sites is trained; with AdamW 16 bytes a parameter beside the frozen copy
    (float32 master, gradient and two moments), and 6 N instead of 4 N FLOPs a token.
Use when: continued pre-training on many tokens, or a small model and enough memory.
Not when: memory is short, or many variants of one base shall be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import Field

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit, TrainedParameters, base_parameters, inner_module
from luthier.model.editing.sites import Site, Sites


@final
class Full(Adapter):
    """All weights of the model, or of some of its layers."""

    peft_type: ClassVar[str | None] = None
    provides: ClassVar[frozenset[str]] = frozenset({"trains-base"})

    layers: Annotated[tuple[int, ...], Field(strict=False)] | None = Field(
        None, description="layer numbers to train; empty means all, and then embeddings, final norm and head too"
    )

    parts: Literal["all", "biases", "norms"] = Field(
        "all", description="which parameters of those layers: all, only biases (BitFit), or only norms"
    )

    def attach(self, sites: Sites) -> list[Edit]:
        return [TrainedParameters(site, names) for site, names in self._parameters(sites)]

    def parameter_count(self, sites: Sites) -> int:
        counts: dict[int, int] = {}
        for site, names in self._parameters(sites):
            for name in names:
                parameter = base_parameters(site.module)[name]
                counts[id(parameter)] = parameter.numel()
        return sum(counts.values())

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        raise RecipeError("all weights were trained, and PEFT has no file for that", do="save the model instead")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        raise RecipeError("PEFT has no adapter file for full fine-tuning", do="load the folder as a model")

    def _parameters(self, sites: Sites) -> list[tuple[Site, tuple[str, ...]]]:
        """Each chosen site with the names of all parameters at and below it that no deeper site owns."""
        blocks = sites.role("block")
        known = {site.layer for site in blocks}
        if self.layers is not None and (unknown := set(self.layers) - known):
            raise RecipeError(f"layers {sorted(unknown)} do not exist", allowed=f"0 to {len(known) - 1}")
        outside = [site for site in sites if site.layer is None and self.layers is None]
        chosen = [site for site in blocks if self.layers is None or site.layer in self.layers]
        present = [(site, base_parameters(site.module)) for site in [*chosen, *outside]]
        found = [(site, tuple(filter(self._is_meant(site), names))) for site, names in present]
        kept = [(site, names) for site, names in found if names]
        if not kept:
            raise RecipeError(f"the model has no {self.parts}", allowed="all, biases, norms", do="set adapter.parts")
        return kept

    def _is_meant(self, site: Site) -> Callable[[str], bool]:
        """Whether a parameter at or below a site is one of the chosen parts."""

        def is_meant(name: str) -> bool:
            owner, _, leaf = name.rpartition(".")
            kind = type(inner_module(site.module, owner)).__name__.lower()
            return self.parts == "all" or (leaf == "bias" if self.parts == "biases" else "norm" in kind)

        return is_meant
