"""Sites: any architecture as places with roles.

Idea: an adapter never sees a model class. It sees sites: a name, a role (q, k, v, o, gate, up, down, ...), a layer and
sizes. Roles come from the names the field uses for its modules, and from what a module is; a fused projection carries
several roles. Names are those of the live module tree, which is what PEFT files use too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean, nearest
from luthier.model.editing.role_names import linear_roles
from luthier.model.zoo import is_conv1d

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "linear", "embed", "table", "head", "norm", "feed", "block", "apart")

_LAYER_COUNTS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Site:
    """A place in a model. `in_features` and `out_features` are 0 where they have no meaning (norms, blocks)."""

    name: str
    roles: tuple[str, ...]
    layer: int | None
    module: nn.Module
    in_features: int = 0
    out_features: int = 0

    @property
    def is_linear(self) -> bool:
        return self.in_features > 0 and not {"embed", "table"} & set(self.roles)

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as (in, out), as GPT-2's Conv1D does."""
        return is_conv1d(self.module)

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight as (out, in), whatever way the module keeps it."""
        weight = self.weight_parameter.detach()
        return weight.t() if self.transposed else weight

    @property
    def weight_parameter(self) -> nn.Parameter:
        """The weight as the module keeps it: sites that share it are tied."""
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias, if the module has one, without a gradient."""
        bias = self.module._parameters.get("bias")
        return None if bias is None else bias.detach()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


@dataclass(frozen=True)
class Sites:
    """All sites of a model, in module order, with what an adapter may need to know of the whole.

    `layers` are those of all stacks together. `heads`, `key_value_heads` and `head_size` are 0 in a model without
    attention. `root_layers` are those whose attention sees learned keys and values: all, or a decoder's where there are
    `two_stacks`, an encoder and a decoder. `stop_ids` are the tokens at which
    the model's own config says that a text ends.
    """

    all: tuple[Site, ...]
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    root_layers: int = 0
    two_stacks: bool = False
    stop_ids: tuple[int, ...] = ()

    @property
    def tied(self) -> bool:
        """Whether the output head and the token embedding are one matrix."""
        ends = self.role("embed", "head")
        return len(ends) > 1 and len({id(site.weight_parameter) for site in ends}) == 1

    def __iter__(self) -> Iterator[Site]:
        return iter(self.all)

    def role(self, *roles: str) -> list[Site]:
        """The sites that carry any of `roles`."""
        return [site for site in self.all if set(roles) & set(site.roles)]

    def linear(self) -> list[Site]:
        """Every linear site but the output head: what `all-linear` means in PEFT."""
        return [site for site in self.all if site.is_linear and not {"head", "apart"} & set(site.roles)]

    def shortest_names(self, chosen: Sequence[Site]) -> list[str]:
        """Name endings if they select exactly these sites, else full names; sorted, so that files are reproducible."""
        endings = sorted({site.name.rpartition(".")[2] for site in chosen})
        looked_up = any("embed" in site.roles for site in chosen)
        if {site.name for site in self.select(tuple(endings), embeddings=looked_up)} == {site.name for site in chosen}:
            return endings
        return sorted(site.name for site in chosen)

    def select(self, targets: str | Sequence[str], *, embeddings: bool = False) -> list[Site]:
        """The linear sites meant by `targets`: "all-linear", roles, name endings, or a regular expression.

        A list holds roles (`q`) and name endings (`q_proj`, `layers.3.mlp.down_proj`); a single string that is none of
        these must match whole names as a regular expression. Raises RecipeError that names each target without a
        match, and the nearest names. With `embeddings` the token embedding may be meant too (`embed`, or its name).
        """
        linear = self.linear()
        if targets == "all-linear":
            return linear
        wanted = [targets] if isinstance(targets, str) else list(targets)
        chosen: set[str] = set()
        possible = [site for site in self.all if site.is_linear or (embeddings and "embed" in site.roles)]
        for target in wanted:
            found = [site.name for site in possible if _matches(site, target)]
            if not found and isinstance(targets, str):
                found = [site.name for site in possible if _full_match(target, site.name)]
            if not found:
                raise RecipeError(f"no site matches the target {target!r}", do=_advice(target, self.all))
            chosen.update(found)
        return [site for site in self.all if site.name in chosen]


def said_of_ranks(ranks: Sequence[tuple[Site, int]]) -> list[str]:
    """What there is to say of ranks at sites: nothing, unless one is above the smaller side of its matrix."""
    over = [(min(site.in_features, site.out_features), site, rank) for site, rank in ranks]
    over = [each for each in over if each[2] > each[0]]
    if not over:
        return []
    least, site, rank = min(over, key=lambda each: each[0])
    others = f" (and at {len(over) - 1:,} other sites)" if len(over) > 1 else ""
    return [
        f"adapter: a rank of {rank:,} at {site.name}{others}: one above {least:,}, the smaller side of that matrix, "
        "has no more to say and takes more memory"
    ]


def _matches(site: Site, target: str) -> bool:
    return target in site.roles or site.name == target or site.name.endswith(f".{target}")


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _advice(target: str, sites: Iterable[Site]) -> str:
    linear = [site for site in sites if site.is_linear]
    endings = sorted({site.name.rpartition(".")[2] for site in linear})
    roles = sorted({role for site in linear for role in site.roles})
    close = nearest(target, [*endings, *roles])
    hint = did_you_mean(target, close) if close else f"names here: {', '.join(endings)}"
    return f"{hint} (roles here: {', '.join(roles)}; or all-linear)"


def find_sites(model: nn.Module, *, apart: tuple[str, ...] = ()) -> Sites:
    """The sites of a transformers model. The modules `apart` are sites as a whole: they are trained in any case."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    block_lists = _block_lists(model)
    within = tuple(f"{name}." for name in apart)
    sites = [
        site
        for name, module in model.named_modules()
        if (site := _site(name, module, ends=(embed, head), is_block=name in block_lists, apart=name in apart))
        is not None
        and not name.startswith(within)
    ]
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    own_size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    two_stacks = bool(getattr(config, "is_encoder_decoder", False))
    layers = len([site for site in sites if "block" in site.roles]) or int(config.num_hidden_layers)
    decoders = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    return Sites(
        all=tuple(_with_feeds(model, sites)),
        layers=layers,
        hidden=int(config.hidden_size),
        heads=heads,
        key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(own_size or config.hidden_size // heads) if heads else 0,
        root_layers=int(decoders or config.num_hidden_layers) if two_stacks else layers,
        two_stacks=two_stacks,
        stop_ids=_stop_ids(config),
    )


def _with_feeds(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The sites with the feed-forward modules among them: those that hold the way up and the way down of a block."""
    holders = {role: {site.name.rpartition(".")[0] for site in sites if role in site.roles} for role in ("up", "down")}
    known = {site.name: site for site in sites}
    for name in holders["up"] & holders["down"]:
        if name not in known and _layer(name) is not None:
            known[name] = Site(name, ("feed",), _layer(name), model.get_submodule(name))
    return [known[name] for name, _ in model.named_modules() if name in known]


def _stop_ids(config: object) -> tuple[int, ...]:
    found = getattr(config, "eos_token_id", None)
    return tuple(int(token) for token in (found if isinstance(found, (list, tuple)) else [found]) if token is not None)


def _block_lists(model: nn.Module) -> set[str]:
    """The names of the transformer blocks: the children of module lists with one entry for each layer of a stack.

    A list within a block is none of these, though it may be as long: a block of T5 is a list of two or three parts.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    stacks = {int(getattr(config, name, None) or config.num_hidden_layers) for name in _LAYER_COUNTS}
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in stacks and not name.startswith(tuple(names)):
            names.update(f"{name}.{index}." for index in range(len(module)))
    return {name.removesuffix(".") for name in names}


def _site(
    name: str, module: nn.Module, *, ends: tuple[object, object], is_block: bool, apart: bool
) -> Site | None:
    """The site of a module, if it is one; `ends` are the token embedding and the output head."""
    layer = _layer(name)
    if apart:
        return Site(name, ("apart",), None, module)
    if is_block:
        return Site(name, ("block",), layer, module)
    if isinstance(module, nn.Embedding):
        # A table of positions or types is looked up too, but not by tokens.
        role = "embed" if module is ends[0] else "table"
        return Site(name, (role,), layer, module, module.num_embeddings, module.embedding_dim)
    if isinstance(module, nn.Linear):
        roles = ("head",) if module is ends[1] else linear_roles(name)
        return Site(name, roles, layer, module, module.in_features, module.out_features)
    if is_conv1d(module):
        inputs, outputs = module.get_parameter("weight").shape
        return Site(name, linear_roles(name), layer, module, inputs, outputs)
    if "norm" in type(module).__name__.lower():
        return Site(name, ("norm",), layer, module)
    return None


def _layer(name: str) -> int | None:
    number = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(number.group(1)) if number else None
