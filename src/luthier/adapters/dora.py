"""DoRA: a low-rank update of directions, and a length for each of them.

Idea: a weight is taken apart into the directions of its rows and their lengths. LoRA turns the directions; the lengths
are a vector of their own. So a row can grow without turning, which LoRA alone does badly.
Equation: y = (m / ||W + s B A||_row) (W x + s B A x) + b, s = alpha / r; the norm is a constant to the gradient.
Source: Liu et al., arXiv 2402.09353, sections 4.1 and 4.3 (the constant); m starts at ||W||_row, B at zero. As in PEFT
    a row is one output, where the paper writes columns of the transposed matrix.
Cost: r (in + out) + out trained parameters a site; beyond LoRA the product W A^T at each pass, 2 r in out FLOPs.
Use when: LoRA's rank has to be small and full tuning is still better.
Not when: speed counts: it does not go through the fused operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit, Kept, SiteEdit
from luthier.model.editing.sites import Site, Sites, said_of_ranks
from luthier.model.files.adapter_config import require_plain_start

Targets = str | Annotated[tuple[str, ...], Field(strict=False)]


@final
class DoRA(Adapter):
    """Low-rank directions and learned lengths."""

    peft_type: ClassVar[str | None] = "LORA"
    provides: ClassVar[frozenset[str]] = frozenset({"mergeable"})

    rank: int = Field(16, ge=1, description="inner dimension r of the two factors")
    alpha: float = Field(32.0, gt=0, description="scaling numerator; the update is multiplied by alpha / rank")
    rslora: bool = Field(False, description="divide alpha by sqrt(rank) instead of rank")
    targets: Targets = Field(
        "all-linear", description="all-linear, roles (q, k, v, o, gate, up, down), module name endings, or a pattern"
    )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def attach(self, sites: Sites) -> list[Edit]:
        return [Directed(site, self) for site in sites.select(self.targets)]

    def parameter_count(self, sites: Sites) -> int:
        chosen = sites.select(self.targets)
        return sum(self.rank * (site.in_features + site.out_features) + site.out_features for site in chosen)

    def remarks(self, sites: Sites) -> list[str]:
        return said_of_ranks([(site, self.rank) for site in sites.select(self.targets)])

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        chosen = sites.select(self.targets)
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.rslora,
            "use_dora": True,
            "bias": "none",
            "fan_in_fan_out": any(site.transposed for site in chosen),
            "init_lora_weights": True,
            "target_modules": sites.shortest_names(chosen),
            "exclude_modules": None,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias",
                    "exclude_modules", "lora_dropout", "trainable_token_indices"):  # fmt: skip
            if config.get(key):
                raise RecipeError(f"the DoRA file uses {key} = {config[key]!r}"[:200], allowed="plain DoRA and rslora")
        require_plain_start(config)
        if config.get("bias", "none") != "none":
            raise RecipeError(f"the DoRA file trains biases (bias = {config['bias']!r})", allowed="none")
        targets = config["target_modules"]
        return cls(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora", False)),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        )


@final
class Directed(SiteEdit):
    """Factors and lengths at one site, in float32."""

    def __init__(self, site: Site, dora: DoRA) -> None:
        super().__init__(site)
        self.site = site
        self.scale = dora.scale
        bound = 1 / math.sqrt(site.in_features)
        self.down = nn.Parameter(torch.empty(dora.rank, site.in_features).uniform_(-bound, bound).to(site.device))
        self.up = nn.Parameter(torch.zeros(site.out_features, dora.rank, device=site.device))
        self.length = nn.Parameter(self._lengths(site.weight()))

    def before(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return x

    def after(self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        ratio = (self.length / self._lengths(self.site.weight())).to(y.dtype)
        low = F.linear(x, self.down.to(x.dtype)) * self.scale
        turned = F.linear(low, self.up.to(x.dtype)).to(y.dtype)
        bias = self.site.bias
        # Written so that a ratio of one and an update of zero leave y as it is, to the bit.
        rest = y if bias is None else y - bias
        return y + (ratio - 1) * rest + ratio * turned

    def keeps(self) -> Kept:
        return Kept(input=True, own=len(self.down) + 2 * len(self.length))

    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        ratio = self.length.detach() / self._lengths(weight)
        return (weight + self.scale * (self.up.detach() @ self.down.detach())) * ratio[:, None], bias

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            "lora_A.weight": self.down,
            "lora_B.weight": self.up,
            "lora_magnitude_vector": self.length,
        }

    @torch.no_grad()
    def _lengths(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """||W + s B A|| of each row, without making that matrix."""
        wide = weight.float()
        crossed = (wide @ self.down.t()).mul_(self.up).sum(1)
        own = (self.up @ (self.down @ self.down.t())).mul_(self.up).sum(1)
        squares = wide.square().sum(1) + 2 * self.scale * crossed + self.scale**2 * own
        return squares.clamp_min_(1e-12).sqrt_()
