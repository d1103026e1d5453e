"""(IA)^3: learned rescaling of keys, values and feed-forward activations.

Idea: three vectors a block multiply the keys, the values and the hidden activations of the feed-forward layer. They
start at one, so training starts at the base model.
Equation: k' = l_k * (W_k x + b_k), v' = l_v * (W_v x + b_v), y = W_down (l_ff * h).
Source: Liu et al., arXiv 2205.05638, section 3.3. The feed-forward vector scales the input of the down projection, as
    in PEFT. Targets default to the paper's k, v and down; PEFT's own defaults for several families are q and v instead.
Cost: d_k + d_v + d_ff trained parameters a block; no extra matrix product.
Use when: a few hundred examples, many adapters to keep, or the smallest possible file.
Not when: the task moves far from what the base can do; rescaling adds no new directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit, Kept, SiteEdit
from luthier.model.editing.sites import Site, Sites

Names = str | Annotated[tuple[str, ...], Field(strict=False)]


@final
class IA3(Adapter):
    """Learned rescaling vectors."""

    peft_type: ClassVar[str | None] = "IA3"
    provides: ClassVar[frozenset[str]] = frozenset({"mergeable"})

    targets: Names = Field(("k", "v"), description="sites whose output is rescaled: roles, names or a pattern")
    feedforward: Names = Field(("down",), description="sites whose input is rescaled: roles, names or a pattern")

    def attach(self, sites: Sites) -> list[Edit]:
        outputs, inputs = self._sites(sites)
        made: list[Edit] = [Rescale(site, on_input=False) for site in outputs]
        return [*made, *(Rescale(site, on_input=True) for site in inputs)]

    def parameter_count(self, sites: Sites) -> int:
        outputs, inputs = self._sites(sites)
        return sum(site.out_features for site in outputs) + sum(site.in_features for site in inputs)

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        outputs, inputs = self._sites(sites)
        return {
            "target_modules": sorted(site.name for site in [*outputs, *inputs]),
            "feedforward_modules": sorted(site.name for site in inputs),
            "exclude_modules": None,
            "fan_in_fan_out": any(site.transposed for site in [*outputs, *inputs]),
            "modules_to_save": None,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        if config.get("modules_to_save") or config.get("exclude_modules"):
            raise RecipeError("the IA3 file saves or excludes whole modules", allowed="rescaling vectors only")
        targets, feedforward = config["target_modules"], config.get("feedforward_modules") or []
        if isinstance(targets, str) or isinstance(feedforward, str):
            raise RecipeError("the IA3 file selects modules by a pattern", allowed="lists of module names")
        outputs = tuple(sorted(set(targets) - set(feedforward)))
        return cls(targets=outputs, feedforward=tuple(sorted(feedforward)))

    def _sites(self, sites: Sites) -> tuple[list[Site], list[Site]]:
        inputs = sites.select(self.feedforward) if self.feedforward else []
        names = {site.name for site in inputs}
        outputs = sites.select(self.targets) if self.targets else []
        return [site for site in outputs if site.name not in names], inputs


@final
class Rescale(SiteEdit):
    """A vector that multiplies the input or the output of one site."""

    def __init__(self, site: Site, *, on_input: bool) -> None:
        super().__init__(site)
        self.on_input = on_input
        size = site.in_features if on_input else site.out_features
        self.vector = nn.Parameter(torch.ones(size, device=site.device))

    def before(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return x * self.vector.to(x.dtype) if self.on_input else x

    def after(self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        return y if self.on_input else y * self.vector.to(y.dtype)

    def keeps(self) -> Kept:
        return Kept(input=self.on_input, output=not self.on_input)

    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        vector = self.vector.detach()
        if self.on_input:
            return weight * vector[None, :], bias
        return weight * vector[:, None], None if bias is None else bias * vector

    def tensors(self) -> Mapping[str, Tensor]:
        # PEFT keeps output vectors as columns and input vectors as rows.
        return {"ia3_l": self.vector[None, :] if self.on_input else self.vector[:, None]}
