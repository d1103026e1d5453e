"""LoRA: low-rank updates of frozen linear layers.

Idea: the weight stays frozen; a product of two thin matrices is learned beside it and added to its output. After
training it can be folded into the weight, so it costs nothing at inference.
Equation: y = W x + b + s B A drop(x), A in R^{r x in}, B in R^{out x r}, s = alpha / r, or alpha / sqrt(r) with rslora.
    With a start from the weight (pissa, olora): y = W x + b + s (B A - B_0 A_0) drop(x), computed and saved as the
    low-rank term [B - B_0, B_0] [A; A - A_0] of rank 2 r, which is zero at the start to the bit.
    At the token embedding: e_t = W_t + s B A_t, A in R^{r x V} starts as zero, B in R^{d x r} normal; no dropout. A
    head that shares the weight stays as it is.
Source: Hu et al., arXiv 2106.09685, section 4.1; rank-stabilised scaling: Kalajdzievski, arXiv 2312.03732, theorem 3.2.
    Initialisation as in the reference implementation and PEFT (A uniform in +-1/sqrt(in), B zero), where the paper
    says Gaussian A; the others: see maths/low_rank.py. PiSSA's paper takes the start off the weight; here the weight
    stays as it is, so the file fits the base that everybody has (PEFT: path_initial_model_for_weight_conversion).
    LoRA+, the learning rate of B a multiple of A's: Hayou et al., arXiv 2402.12354, section 4 (16 there).
Cost: r (in + out) trained parameters a site; 6 r (in + out) FLOPs a token and site in training, twice that and twice
    the file with a start from the weight. A trained token adds its row, d, or 2 d with a head of its own (see
    trainable_tokens).
Use when: in doubt. It matches full tuning on most single tasks at a hundredth of the memory.
Not when: the task needs much new knowledge (continued pre-training on many tokens), or a fixed budget below 0.01 %.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.kernels.products import LowRankTerm
from luthier.maths import low_rank
from luthier.model.editing.edits import Edit, Kept, SiteEdit
from luthier.model.editing.sites import Site, Sites, said_of_ranks
from luthier.model.editing.token_rows import EVERYWHERE, checked_ids, lookup_scale, row_count, row_sites, token_rows
from luthier.model.files.adapter_config import require_plain_start

Names = Annotated[tuple[str, ...], Field(strict=False)]
Targets = str | Names
Tokens = Annotated[tuple[int | str, ...], Field(strict=False)]
Start = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
FROM_WEIGHT = ("pissa", "olora")
"""Starts whose product is no zero: it is taken off again."""
PEFT_STARTS: Mapping[object, Start] = {"gaussian": "gaussian", "orthogonal": "orthogonal"}
"""Starts that PEFT's `init_lora_weights` has a name for and that leave the base as it is."""


@final
class LoRA(Adapter):
    """Low-rank adapters on linear layers."""

    peft_type: ClassVar[str | None] = "LORA"
    tokens_knob: ClassVar[str] = "trainable_tokens"
    provides: ClassVar[frozenset[str]] = frozenset({"mergeable"})

    rank: int = Field(16, ge=1, description="inner dimension r of the two factors")
    alpha: float = Field(32.0, gt=0, description="scaling numerator; the update is multiplied by alpha / rank")
    rslora: bool = Field(False, description="divide alpha by sqrt(rank) instead of rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the adapter in training")
    targets: Targets = Field(
        "all-linear",
        description="all-linear, roles (q, k, v, o, gate, up, down, embed, head), module name endings, or a pattern",
    )
    rank_pattern: Annotated[Mapping[str, Annotated[int, Field(ge=1)]], Field(strict=False)] = Field(
        {}, description="another rank for sites whose name ends so, such as {down_proj: 32, layers.0.mlp.up_proj: 8}"
    )
    alpha_pattern: Annotated[Mapping[str, Annotated[float, Field(gt=0)]], Field(strict=False)] = Field(
        {}, description="another alpha for sites whose name ends so"
    )
    init: Start = Field(
        "kaiming", description="the factors' start: random, or the weight's principal (pissa) or first (olora) part"
    )
    plus_ratio: float = Field(1.0, gt=0, description="LoRA+: the learning rate of B is so many times the optimizer's")
    trainable_tokens: Tokens = Field(
        (), description="tokens, as texts or ids, whose rows are trained too: control tokens the base never learned"
    )
    trainable_token_targets: Names = Field(
        EVERYWHERE, description="where those rows are: embed, head, or module names; a tied head always follows"
    )

    @property
    def scale(self) -> float:
        """What an update is multiplied by where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def rank_of(self, site: Site) -> int:
        """The rank at a site: that of the first pattern that is its name, or the end of it."""
        return next((rank for ending, rank in self.rank_pattern.items() if _ends(site, ending)), self.rank)

    def scale_of(self, site: Site) -> float:
        """What the update of a site is multiplied by."""
        rank = self.rank_of(site)
        alpha = next((alpha for ending, alpha in self.alpha_pattern.items() if _ends(site, ending)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def start(self, site: Site) -> low_rank.Factors:
        """The factors of a site before the first step, on its device."""
        rank, inputs, outputs = self.rank_of(site), site.in_features, site.out_features
        if self.init in FROM_WEIGHT and rank > min(inputs, outputs):
            raise RecipeError(
                f"adapter.init {self.init} takes {rank} directions of {site.name}, which has {min(inputs, outputs)}",
                allowed=f"a rank of at most {min(inputs, outputs)} there",
                do="lower adapter.rank, or give the site its own in adapter.rank_pattern",
            )
        if self.init == "orthogonal" and rank % 2:
            raise RecipeError(
                f"adapter.init orthogonal halves the rank, which is {rank} at {site.name}", allowed="even ranks"
            )
        if self.init == "pissa":
            return low_rank.principal(site.weight(), rank, self.scale_of(site))
        if self.init == "olora":
            return low_rank.triangular(site.weight(), rank)
        draws = {"kaiming": low_rank.kaiming, "gaussian": low_rank.gaussian, "orthogonal": low_rank.orthogonal}
        down, up = draws[self.init](rank, inputs, outputs)
        return down.to(site.device), up.to(site.device)

    def attach(self, sites: Sites) -> list[Edit]:
        chosen = self._chosen(sites)
        for ending in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_ends(site, ending) for site in chosen):
                raise RecipeError(
                    f"no trained site ends in {ending!r}, which a pattern of lora names",
                    allowed=", ".join(sorted({site.name.rpartition(".")[2] for site in chosen})),
                )
        made: list[Edit] = [
            LookedUp(site, self) if "embed" in site.roles else LowRank(site, self) for site in chosen
        ]
        if not self.trainable_tokens:
            return made
        key = "token_adapter.trainable_tokens_delta"
        rows = token_rows(
            sites, self.trainable_tokens, self.trainable_token_targets, file_key=key, repeat_tied=False
        )
        return [*made, *rows]

    def parameter_count(self, sites: Sites) -> int:
        chosen = self._chosen(sites)
        low_rank = sum(self.rank_of(site) * (site.in_features + site.out_features) for site in chosen)
        if not self.trainable_tokens:
            return low_rank
        return low_rank + row_count(sites, self.trainable_tokens, self.trainable_token_targets)

    def remarks(self, sites: Sites) -> list[str]:
        return said_of_ranks([(site, self.rank_of(site)) for site in self._chosen(sites)])

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        chosen = self._chosen(sites)
        # A start from the weight is saved with what is taken off: twice the rank, at the same scale.
        times = 2 if self.init in FROM_WEIGHT else 1
        alphas = math.sqrt(times) if self.rslora else times
        return {
            "r": times * self.rank,
            "lora_alpha": _short(alphas * self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": any(site.transposed for site in chosen),
            "init_lora_weights": next((said for said, init in PEFT_STARTS.items() if init == self.init), True),
            "target_modules": sites.shortest_names(chosen),
            "exclude_modules": None,
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {ending: times * rank for ending, rank in self.rank_pattern.items()},
            "alpha_pattern": {ending: alphas * alpha for ending, alpha in self.alpha_pattern.items()},
            "trainable_token_indices": self._token_indices(sites),
        }

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        _refuse_unknown(config)
        targets = config["target_modules"]
        tokens, places = _tokens_of(config.get("trainable_token_indices"))
        return cls(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora", False)),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            rank_pattern=_pattern(config, "rank_pattern", int),
            alpha_pattern=_pattern(config, "alpha_pattern", float),
            init=PEFT_STARTS.get(config.get("init_lora_weights"), "kaiming"),
            trainable_tokens=tokens,
            trainable_token_targets=places,
        )

    def _chosen(self, sites: Sites) -> list[Site]:
        return sites.select(self.targets, embeddings=True)

    def _token_indices(self, sites: Sites) -> list[int] | dict[str, list[int]] | None:
        """PEFT's way to say it: a list means the embedding and a head tied to it, a mapping names the modules."""
        if not self.trainable_tokens:
            return None
        ids = list(checked_ids(sites, self.trainable_tokens))
        chosen = row_sites(sites, self.trainable_token_targets)
        if sites.tied or [site.roles for site in chosen] == [("embed",)]:
            return ids
        return {site.name: ids for site in chosen}


@final
class LowRank(SiteEdit):
    """The two factors at one site, in float32, and the start that is taken off again, if there is one."""

    def __init__(self, site: Site, lora: LoRA) -> None:
        super().__init__(site)
        self.scale = lora.scale_of(site)
        self.dropout = lora.dropout
        self.plus_ratio = lora.plus_ratio
        self.head_weight = site.weight if "head" in site.roles else None
        down, up = lora.start(site)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        # Kept in checkpoints: another machine's decomposition is another start.
        self.register_buffer("first_down", down.clone() if lora.init in FROM_WEIGHT else None)
        self.register_buffer("first_up", up.clone() if lora.init in FROM_WEIGHT else None)

    @property
    def factors(self) -> low_rank.Factors:
        """A and B of the whole term, as it is computed and saved."""
        first_down, first_up = self._buffers["first_down"], self._buffers["first_up"]
        if first_down is None or first_up is None:
            return self.down, self.up
        # Differences, and not [B, -B_0] [A; A_0]: rounded to bfloat16 those would not cancel.
        return torch.cat([self.down, self.down - first_down]), torch.cat([self.up - first_up, first_up], dim=1)

    def before(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return x

    def after(self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        return self.weighted(x, y, 1.0)

    def weighted(
        self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"], weight: float
    ) -> Float[Tensor, "*batch out"]:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        # The float32 factors are cast, not kept in the base's dtype: the cast is thin, and small updates are not lost.
        down, up = self.factors
        low = F.linear(dropped, down.to(x.dtype)) * (self.scale * weight)
        return y + F.linear(low, up.to(x.dtype)).to(y.dtype)

    def low_rank(self) -> LowRankTerm | None:
        # What is dropped differs from site to site: no wider product of several sites is possible then.
        return None if self.dropout and self.training else LowRankTerm(*self.factors, self.scale)

    def rate_factors(self) -> Mapping[str, float]:
        return {"up": self.plus_ratio}

    def keeps(self) -> Kept:
        return Kept(input=True, own=len(self.factors[0]))

    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        down, up = self.factors
        return weight + self.scale * (up.detach() @ down.detach()), bias

    def tensors(self) -> Mapping[str, Tensor]:
        down, up = self.factors
        return {"lora_A.weight": down, "lora_B.weight": up}

    def base_tensors(self) -> Mapping[str, Tensor]:
        return {} if self.head_weight is None else {"base_layer.weight": self.head_weight()}


@final
class LookedUp(SiteEdit):
    """The two factors at the token embedding, in float32: a column of A for each token, and B for all."""

    def __init__(self, site: Site, lora: LoRA) -> None:
        super().__init__(site)
        if lora.init in FROM_WEIGHT:
            raise RecipeError(
                f"adapter.init {lora.init} starts from a layer's weight, and {site.name} is an embedding",
                allowed="kaiming, gaussian or orthogonal where the embedding is a target",
                do="take the embedding out of adapter.targets, or train rows of it with adapter.trainable_tokens",
            )
        self.scale, self.lookup = lora.scale_of(site), lookup_scale(site)
        self.weight = site.weight
        rank = lora.rank_of(site)
        self.down = nn.Parameter(torch.zeros(rank, site.in_features, device=site.device))
        self.up = nn.Parameter(torch.randn(site.out_features, rank).to(site.device))

    def before(self, x: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        return x

    def after(self, x: Int[Tensor, "*batch"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        low = F.embedding(x, self.down.t()) * (self.scale * self.lookup)
        return y + F.linear(low, self.up).to(y.dtype)

    def keeps(self) -> Kept:
        return Kept(own=len(self.down))

    def merged(
        self, weight: Float[Tensor, "V d"], bias: Float[Tensor, " d"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        return weight + self.scale * (self.up.detach() @ self.down.detach()).t(), bias

    def tensors(self) -> Mapping[str, Tensor]:
        return {"lora_embedding_A": self.down, "lora_embedding_B": self.up}

    def base_tensors(self) -> Mapping[str, Tensor]:
        return {"base_layer.weight": self.weight()}


def combined(parts: Sequence[tuple[Sequence[Edit], float]], sites: Sites) -> tuple[LoRA, list[Edit]]:
    """One adapter that adds up several, each times a weight: sum_j w_j s_j B_j A_j, exactly.

    Factors are laid side by side, so ranks add up; adding factor to factor would multiply A of one by B of another. The
    parts are edits of LoRA adapters as `attach` made them; a site that a part does not have gets zeros from it. Raises
    RecipeError for other edits, and when there is none.
    """
    terms: dict[str, list[tuple[LowRank, float]]] = {}
    for edits, weight in parts:
        for edit in edits:
            if not isinstance(edit, LowRank):
                raise RecipeError(f"{type(edit).__name__} is no low-rank term", allowed="plain LoRA adapters")
            terms.setdefault(edit.site_name, []).append((edit, weight))
    if not terms:
        raise RecipeError("no adapter was given to combine", allowed="at least one LoRA adapter")
    rank = max(sum(len(edit.factors[0]) for edit, _ in own) for own in terms.values())
    # Its scale is one: those of the parts are in the factors.
    whole = LoRA(rank=rank, alpha=float(rank), targets=tuple(sorted(terms)))
    made: list[Edit] = []
    for site in sites.select(whole.targets):
        edit, start = LowRank(site, whole), 0
        with torch.no_grad():
            edit.down.zero_()
            for part, weight in terms[site.name]:
                down, up = part.factors
                own = slice(start, start + len(down))
                edit.down[own] = down
                edit.up[:, own] = weight * part.scale * up
                start = own.stop
        made.append(edit)
    return whole, made


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    """Settings that would make the file compute something else than we do."""
    for key in ("use_dora", "modules_to_save", "layers_to_transform", "lora_bias",
                "target_parameters", "megatron_config", "exclude_modules"):
        if config.get(key):
            raise RecipeError(f"the LoRA file uses {key} = {config[key]!r}", allowed="plain LoRA and rslora")
    require_plain_start(config)
    if config.get("bias", "none") != "none":
        raise RecipeError(f"the LoRA file trains biases (bias = {config['bias']!r})", allowed="none")


def _short(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _ends(site: Site, ending: str) -> bool:
    return site.name == ending or site.name.endswith(f".{ending}")


def _pattern(config: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> dict[str, Any]:
    """Names and numbers of a PEFT pattern. A regular expression is refused: one from a file could run for ever."""
    found = config.get(key) or {}
    if not isinstance(found, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in found):
        raise RecipeError(f"the LoRA file has {key} = {found!r}"[:200], allowed="names of modules, or ends of names")
    return {name: kind(value) for name, value in found.items()}


def _tokens_of(indices: object) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The trained tokens of a PEFT config, and where their rows are."""
    if not indices:
        return (), EVERYWHERE
    if isinstance(indices, list):
        return tuple(int(token) for token in indices), ("embed",)
    if not isinstance(indices, dict) or len({tuple(ids) for ids in indices.values()}) != 1:
        raise RecipeError(
            f"the LoRA file trains rows of tokens as {indices!r}"[:200], allowed="the same tokens in every module"
        )
    return tuple(int(token) for token in next(iter(indices.values()))), tuple(sorted(indices))
