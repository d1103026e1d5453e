"""The shape of a decoder, read off its config alone: every matrix, and how many parameters that makes.

Idea: a config names a family of models whose blocks are known, and their sizes. So all tensors of a model can be told
without making one. A key that a config leaves out has the default of its family.
Equation: N = V d (token table) + V d (head, if it is not the table) + L (matrices + vectors of a block) + last norm +
    learned positions; a block has q (d x a), k and v (d x c each), o (a x d), and way up, gate and way down of d x f;
    a = heads head_size, c = key-value heads head_size. With E experts the feed-forward is there E times, beside a
    router (d x E).
Source: the modules of transformers 5.23; tests/arithmetic/test_shapes.py compares with models on its meta device, and
    with the counts that papers and model cards give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from luthier.core.errors import RecipeError

MOST_SIZE: Final = 2**40
"""No size of a model is as large."""
MOST_LAYERS: Final = 10_000
_SLIDING: Final = "sliding_attention"
_OPTIONAL: Final = {
    "max_position_embeddings": 1, "sliding_window": 1, "sliding_window_pattern": 1, "max_window_layers": 0,
    "num_local_experts": 1, "num_experts_per_tok": 1,
}  # fmt: skip
"""Sizes that a config may leave empty, and the least that each can be."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Equal matrices of all blocks: how many, their sizes, and the share of them that one token goes through.

    `linear` is whether each is a layer of its own, which a quantizer can pack; experts are slices of one tensor.
    """

    count: int
    outputs: int
    inputs: int
    active: float = 1.0
    linear: bool = True

    @property
    def parameters(self) -> int:
        return self.count * self.outputs * self.inputs


@dataclass(frozen=True)
class Heads:
    """Heads of attention: how many of queries, how many of keys and values, and the numbers of each."""

    count: int
    groups: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder in numbers. `vectors` are norms and biases; `windows` are what layers see of the past, None for all.

    `positions` are rows of a learned table. `matrices` are those of the blocks.
    """

    layers: int
    hidden: int
    inner: int
    heads: Heads
    vocabulary: int
    gated: bool
    tied: bool
    windows: tuple[int | None, ...]
    matrices: tuple[Matrix, ...]
    vectors: int
    positions: int = 0
    context: int | None = None

    @property
    def query(self) -> int:
        """Width of queries."""
        return self.heads.count * self.heads.size

    @property
    def key_value(self) -> int:
        """Width of keys, and of values."""
        return self.heads.groups * self.heads.size

    @property
    def blocks(self) -> int:
        """Parameters of the matrices in the blocks: what quantizers pack, and adapters adapt."""
        return sum(matrix.parameters for matrix in self.matrices)

    @property
    def active(self) -> float:
        """Of these, the ones that a token goes through."""
        return sum(matrix.active * matrix.parameters for matrix in self.matrices)

    @property
    def table(self) -> int:
        """Parameters of the token table, which are also those of the head."""
        return self.vocabulary * self.hidden

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part."""
        return {
            "embedding": self.table + self.positions * self.hidden,
            "blocks": self.blocks,
            "vectors": self.vectors,
            "head": 0 if self.tied else self.table,
        }

    @property
    def parameters(self) -> int:
        """All parameters; those of a head that is the token table count once."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the config of a family does not say: the names of its keys, its defaults, and its small tensors.

    `norms` are vectors of d a block, `norm_biases` whether each has a bias, `head_norms` whether queries and keys of a
    head are normed. `biases` names the linear layers with one: of q, k, v (qkv), o, the feed-forward (mlp), the head.
    `fused` names products that are one matrix. `whole_heads` is whether heads have to divide d, whatever the size of
    each: transformers makes no other model of such a family.
    """

    gated: bool = True
    norms: int = 2
    norm_biases: bool = False
    head_norms: bool = False
    biases: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    whole_heads: bool = False
    learned_positions: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: Callable[[Mapping[str, Any], int], Sequence[int | None]] | None = None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` describes. Raises RecipeError for an unknown family or a missing size."""
    found: Mapping[str, Any] = config
    if isinstance(inner := config.get("text_config"), Mapping):
        # Of a model that also sees, what reads is planned.
        found = inner
    name = str(found.get("model_type"))
    if name not in FAMILIES:
        raise RecipeError(
            f"model_type is {name!r:.60}, whose blocks are not known here",
            allowed=", ".join(sorted(FAMILIES)),
            # The nearest name would be another model's, and changing the config to it a plan of that one.
            do="training is planned for any family by a recipe, from the model itself: luthier plan RECIPE.yaml",
        )
    family = FAMILIES[name]
    # No window is a choice; no other size can be left empty.
    values = {**family.defaults, **{k: v for k, v in found.items() if v is not None or k == "sliding_window"}}
    return _shape(name, family, values)


def _shape(name: str, family: Family, values: Mapping[str, Any]) -> Shape:
    names = family.names

    def size(key: str, default: int | None = None, *, least: int = 1, most: int = MOST_SIZE) -> int:
        value = values.get(names.get(key, key), default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise RecipeError(
                f"the config says {names.get(key, key)}: {value!r:.60}", allowed=_span(least, most),
                do=f"give the config.json of a {name} model",
            )  # fmt: skip
        return value

    told = {
        key: size(key, least=least) for key, least in _OPTIONAL.items() if values.get(names.get(key, key)) is not None
    }
    layers, hidden = size("num_hidden_layers", most=MOST_LAYERS), size("hidden_size")
    heads = size("num_attention_heads", most=hidden)
    if family.whole_heads and hidden % heads:
        wide, many = (names.get(key, key) for key in ("hidden_size", "num_attention_heads"))
        raise RecipeError(
            f"the config says {wide}: {hidden} and {many}: {heads}", allowed=f"a {wide} that is a multiple of {many}",
            do=f"give the config.json of a {name} model",
        )  # fmt: skip
    shape = Shape(
        layers=layers,
        hidden=hidden,
        inner=size("intermediate_size", 4 * hidden),
        heads=Heads(heads, size("num_key_value_heads", heads), size("head_dim", hidden // heads)),
        vocabulary=size("vocab_size"),
        gated=family.gated,
        tied=bool(values.get("tie_word_embeddings", False)),
        windows=tuple(family.windows(values, layers)) if family.windows else (None,) * layers,
        matrices=(),
        vectors=0,
        positions=size("max_position_embeddings") if family.learned_positions else 0,
        context=told.get("max_position_embeddings"),
    )
    experts, each = told.get("num_local_experts"), told.get("num_experts_per_tok")
    if experts and each and each > experts:
        raise RecipeError(
            f"the config says num_experts_per_tok: {each}, of {experts} experts", allowed=f"1 to {experts}",
            do=f"give the config.json of a {name} model",
        )  # fmt: skip
    matrices = (*_attention(shape, family), *_feed_forward(shape, family, experts, each))
    return replace(shape, matrices=matrices, vectors=_vectors(shape, family, values))


def _span(least: int, most: int) -> str:
    """What a size may be, without the end that only damage reaches."""
    return f"a whole number, {least} or more" if most == MOST_SIZE else f"whole numbers, {least} to {most}"


def _attention(shape: Shape, family: Family) -> list[Matrix]:
    layers, hidden = shape.layers, shape.hidden
    out = Matrix(count=layers, outputs=hidden, inputs=shape.query)
    if "qkv" in family.fused:
        return [Matrix(count=layers, outputs=shape.query + 2 * shape.key_value, inputs=hidden), out]
    return [
        Matrix(count=layers, outputs=shape.query, inputs=hidden),
        Matrix(count=2 * layers, outputs=shape.key_value, inputs=hidden),
        out,
    ]


def _feed_forward(shape: Shape, family: Family, experts: int | None, each: int | None) -> list[Matrix]:
    count, share = shape.layers * (experts or 1), (each or 1) / (experts or 1)
    up, alone = 1 + shape.gated, not experts
    wide = 2 if "gate_up" in family.fused else 1
    made = [
        Matrix(count=up // wide * count, outputs=wide * shape.inner, inputs=shape.hidden, active=share, linear=alone),
        Matrix(count=count, outputs=shape.hidden, inputs=shape.inner, active=share, linear=alone),
    ]
    return [*made, Matrix(count=shape.layers, outputs=experts, inputs=shape.hidden, linear=False)] if experts else made


def _vectors(shape: Shape, family: Family, values: Mapping[str, Any]) -> int:
    """Norms and biases of all blocks, of the last norm, and of the head."""
    biases = set(family.biases)
    # Where a family has the choice, its config says it.
    biases |= {"qkv", "o"} if values.get("attention_bias") is True else set()
    biases |= {"mlp"} if values.get("mlp_bias") is True else set()
    if values.get("attention_bias") is False:
        biases -= {"qkv", "o"}
    norm = shape.hidden * (1 + family.norm_biases)
    block = family.norms * norm + 2 * shape.heads.size * family.head_norms
    block += (shape.query + 2 * shape.key_value) * ("qkv" in biases) + shape.hidden * ("o" in biases)
    block += ((1 + shape.gated) * shape.inner + shape.hidden) * ("mlp" in biases)
    return shape.layers * block + norm + shape.vocabulary * ("head" in biases)


def _everywhere(default: int | None) -> Callable[[Mapping[str, Any], int], Sequence[int | None]]:
    """One window for all layers, if the config has one."""

    def windows(values: Mapping[str, Any], layers: int) -> Sequence[int | None]:
        return (values.get("sliding_window", default),) * layers

    return windows


def _some(period: int, default: int) -> Callable[[Mapping[str, Any], int], Sequence[int | None]]:
    """A window in all layers but each `period`-th, unless the config names the kind of each."""

    def windows(values: Mapping[str, Any], layers: int) -> Sequence[int | None]:
        window = values.get("sliding_window", default)
        every = values.get("sliding_window_pattern", period)
        kinds = _kinds(values, layers) or [_SLIDING if (layer + 1) % every else "" for layer in range(layers)]
        return [window if kind == _SLIDING else None for kind in kinds]

    return windows


def _qwen(values: Mapping[str, Any], layers: int) -> Sequence[int | None]:
    """Windows only where they are switched on, and from some layer up."""
    if not values.get("use_sliding_window"):
        return (None,) * layers
    window, first = values.get("sliding_window", 4096), values.get("max_window_layers", 28)
    kinds = _kinds(values, layers) or [_SLIDING if layer >= first else "" for layer in range(layers)]
    return [window if kind == _SLIDING else None for kind in kinds]


def _kinds(values: Mapping[str, Any], layers: int) -> Sequence[object]:
    """The kind of each layer, where a config names them all."""
    kinds = values.get("layer_types")
    return kinds if isinstance(kinds, Sequence) and len(kinds) == layers else ()


_GPT2_NAMES: Final = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
}  # fmt: skip
_ALL_BIASES: Final = frozenset({"qkv", "o", "mlp"})

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(whole_heads=True),
    "mistral": Family(windows=_everywhere(4096), defaults={"num_key_value_heads": 8}),
    "mixtral": Family(
        windows=_everywhere(None),
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(biases=frozenset({"qkv"}), windows=_qwen),
    "qwen3": Family(head_norms=True, windows=_qwen, defaults={"head_dim": 128}),
    "gemma": Family(defaults={"tie_word_embeddings": True, "head_dim": 256}),
    "gemma2": Family(
        whole_heads=True, norms=4, windows=_some(2, 4096), defaults={"tie_word_embeddings": True, "head_dim": 256},
    ),
    "gemma3_text": Family(
        whole_heads=True, norms=4, head_norms=True, windows=_some(6, 4096),
        defaults={
            "tie_word_embeddings": True, "head_dim": 256, "vocab_size": 262_208, "num_attention_heads": 8,
            "num_key_value_heads": 4, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        },
    ),
    "phi": Family(gated=False, norms=1, norm_biases=True, biases=_ALL_BIASES | {"head"}),
    "phi3": Family(fused=frozenset({"qkv", "gate_up"}), windows=_everywhere(None)),
    "gpt2": Family(
        whole_heads=True, gated=False, norm_biases=True, biases=_ALL_BIASES, fused=frozenset({"qkv"}),
        learned_positions=True, names=_GPT2_NAMES, defaults={"tie_word_embeddings": True, "n_positions": 1024},
    ),
    "gpt_neox": Family(
        whole_heads=True, gated=False, norm_biases=True, biases=_ALL_BIASES, fused=frozenset({"qkv"}),
    ),
}  # fmt: skip
"""The families whose blocks are known, by `model_type`."""
