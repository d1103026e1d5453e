"""Bottleneck adapters: small residual networks inside each block.

Idea: after a part of a block stands a narrow network that reads its output, bends it, and adds to it. It can compute
what no change of a weight could; so it cannot be merged, and costs time whenever the model runs.
Equation: after a part with output y: y + s (W_up f(W_down y + b_d) + b_u); in parallel, with the part's input x:
    y + s (W_up f(W_down x + b_d) + b_u).
Source: Houlsby et al., arXiv 1902.00751, section 2.1 (after attention and after the feed-forward); Pfeiffer et al.,
    arXiv 2005.00052, section 4 (after the feed-forward only); He et al., arXiv 2110.04366, section 3.3 (parallel to
    the feed-forward). Names of presets and tensors are AdapterHub's. W_up starts at zero, as in He et al.; the older
    papers start near zero.
Cost: 2 d m + m + d trained parameters for each of them, two (houlsby) or one a block.
Use when: tasks come one by one and shall be kept apart, or a change of function is wanted that is no low-rank update.
Not when: latency counts: it can never be folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Literal, Self, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit, Kept, SiteEdit
from luthier.model.editing.sites import Site, Sites

Preset = Literal["houlsby", "pfeiffer", "parallel"]
Bend = Literal["relu", "gelu", "silu", "tanh"]

_HUB_NAMES: Final[dict[Preset, str]] = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn", "parallel": "par_bn"}
_BENDS: Final[dict[Bend, Callable[[Tensor], Tensor]]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


@final
class Bottleneck(Adapter):
    """Narrow residual networks after, or beside, the parts of a block."""

    peft_type: ClassVar[str | None] = "BOTTLENECK"

    preset: Preset = Field("pfeiffer", description="where: after both halves of a block, after or beside the second")
    size: int = Field(64, ge=1, description="width m of the narrow layer")
    activation: Bend = Field("relu", description="what bends the narrow layer")
    scale: float = Field(1.0, gt=0, description="factor of what is added; He et al. use 4 in parallel")
    init_std: float = Field(
        0.0, ge=0, description="standard deviation of the start of both matrices; 0 starts W_up at zero exactly"
    )

    def attach(self, sites: Sites) -> list[Edit]:
        return [Narrow(site, self, sites.hidden) for site in self._sites(sites)]

    def parameter_count(self, sites: Sites) -> int:
        return len(self._sites(sites)) * (2 * sites.hidden * self.size + self.size + sites.hidden)

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        return {
            "architecture": _HUB_NAMES[self.preset],
            "mh_adapter": self.preset == "houlsby",
            "output_adapter": True,
            "is_parallel": self.preset == "parallel",
            "bottleneck_size": self.size,
            "reduction_factor": sites.hidden / self.size,
            "non_linearity": self.activation,
            "scaling": self.scale,
            "init_std": self.init_std,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        names = {hub: preset for preset, hub in _HUB_NAMES.items()}
        if config["architecture"] not in names or config["non_linearity"] not in _BENDS:
            raise RecipeError(
                f"the bottleneck file is a {config['architecture']!r} with {config['non_linearity']!r}",
                allowed=f"{', '.join(names)} with {', '.join(_BENDS)}",
            )
        return cls(
            preset=names[config["architecture"]],
            size=int(config["bottleneck_size"]),
            activation=config["non_linearity"],
            scale=float(config["scaling"]),
            init_std=float(config.get("init_std", 0.0)),
        )

    def _sites(self, sites: Sites) -> list[Site]:
        roles = {"houlsby": ("o", "down"), "pfeiffer": ("down",), "parallel": ("feed",)}[self.preset]
        found = [site for site in sites.role(*roles) if site.layer is not None]
        if missing := [role for role in roles if not any(role in site.roles for site in found)]:
            raise RecipeError(
                f"the model has no place with role {missing[0]!r}, which the preset {self.preset!r} needs",
                allowed=", ".join(_HUB_NAMES),
                do="choose another preset, or lora",
            )
        return found


@final
class Narrow(SiteEdit):
    """One of them, in float32."""

    def __init__(self, site: Site, method: Bottleneck, hidden: int) -> None:
        super().__init__(site)
        self.beside = method.preset == "parallel"
        self.scale, self.bend = method.scale, _BENDS[method.activation]
        down, up = nn.Linear(hidden, method.size), nn.Linear(method.size, hidden)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        nn.init.zeros_(up.weight)
        if method.init_std:
            nn.init.normal_(down.weight, std=method.init_std)
            nn.init.normal_(up.weight, std=method.init_std)
        self.down, self.up = down.to(site.device), up.to(site.device)

    def before(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return x

    def after(self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        seen = x if self.beside else y
        narrow = self.bend(F.linear(seen, self.down.weight.to(y.dtype), self.down.bias.to(y.dtype)))
        return y + F.linear(narrow, self.up.weight.to(y.dtype), self.up.bias.to(y.dtype)) * self.scale

    def keeps(self) -> Kept:
        return Kept(input=self.beside, output=not self.beside, own=2 * len(self.down.bias))

    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        return None

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            "adapter_down.0.weight": self.down.weight,
            "adapter_down.0.bias": self.down.bias,
            "adapter_up.weight": self.up.weight,
            "adapter_up.bias": self.up.bias,
        }
