"""A decoder of the common shape, as our own modules: what llama, mistral, qwen2, qwen3 and their kin are.

Idea: our operations run the blocks of such a model and need of its modules the weights, a few numbers and the names.
These modules hold them under the zoo's names, so that sites, files and adapters are the same. Where something
surrounds a block or a part of it, that part runs by itself, as plain as the zoo's. What makes one is not a config but
what the zoo's module of the same files was seen to be (`running/likeness.py`), and it stands in for it only where it
gave the same numbers to the bit.
Equation: x + Wo attention(rope(Wq h), rope(Wk h), Wv h), h = norm(x); then x + Wd (silu(Wg h) * Wu h), h = norm(x)
Source: Touvron et al., arXiv 2302.13971, section 2.2, for the shape; transformers for the names.
Cost: nothing beside the weights; no import of the zoo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.data.hub import ModelFiles
from luthier.model.attending.attention import ForestPlan, forest_attention
from luthier.model.attending.kept import AttentionCall
from luthier.model.own.config import OwnConfig

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each parameter, by its name in the whole model."""
Parameters = Mapping[str, nn.Parameter]
Angles = tuple[Float[Tensor, "1 T r"], Float[Tensor, "1 T r"]]
EMBED: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"


@final
@dataclass(frozen=True)
class Shape:
    """What makes such a decoder: its parameters, and numbers that are none.

    `frequencies` (half,) are those of the rotary angles, whose cosines and sines are multiplied by `scaling`. Of the
    `padding` token, where there is one, the embedding is not trained. `calls` say how each layer's attention is called.
    """

    parameters: Shapes
    head_size: int
    epsilon: float
    padding: int | None
    tied: bool
    frequencies: tuple[float, ...]
    scaling: float
    calls: Mapping[int, AttentionCall]

    def frozen(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Parameters:
        """The parameters, in that precision, from tensors that fit."""
        own = {name: nn.Parameter(tensor.to(dtype), requires_grad=False) for name, tensor in tensors.items()}
        return {**own, HEAD: own[EMBED]} if self.tied else own

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the parameters, by name and shape; of tied ones the head is none."""
        wanted = {name: shape for name, shape in self.parameters.items() if name != HEAD or not self.tied}
        return wanted == {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return len({name.split(".")[2] for name in self.parameters if name.startswith("model.layers.")})


@final
@dataclass(frozen=True)
class _Parts:
    """Makes modules around parameters. Torch's own constructors would draw numbers first, for each of a model."""

    shape: Shape
    parameters: Parameters

    def linear(self, name: str) -> nn.Linear:
        """A linear layer."""
        made = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(made)
        made.weight = self.parameters[f"{name}.weight"]
        made.register_parameter("bias", self.parameters.get(f"{name}.bias"))
        made.out_features, made.in_features = made.weight.shape
        return made

    def embedding(self) -> nn.Embedding:
        """The embedding of tokens."""
        weight = self.parameters[EMBED]
        rows, width = weight.shape
        made = nn.Embedding(rows, width, self.shape.padding, _weight=weight)
        made.weight = weight
        return made

    def norm(self, name: str) -> RmsNorm:
        """A norm."""
        return RmsNorm(self.parameters[f"{name}.weight"], self.shape.epsilon)


@final
class Decoder(nn.Module):
    """The whole model. It has no forward pass of its own: our executor runs it.

    `files` are those that the weights came from: whoever needs the zoo's module makes it after them (`zoo_again.py`).
    """

    base_model_prefix: Final = "model"

    def __init__(
        self,
        shape: Shape,
        parameters: Parameters,
        config: OwnConfig,
        *,
        generation: Mapping[str, Any] | None = None,
        files: ModelFiles | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.files = files
        self.config = config
        self.generation_config = None if generation is None else Generation(generation)
        parts = _Parts(shape, parameters)
        self.model = Body(parts)
        self.lm_head = parts.linear("lm_head")

    def forward(self, *_: object, **__: object) -> Tensor:
        """Refused: see above."""
        raise RecipeError(
            "a call of modules that only luthier's executor runs",
            allowed="LanguageModel.token_outputs, an Engine, or a model that is loaded with own_modules=False",
        )

    @property
    def base_model(self) -> Body:
        return self.model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(each.dtype for each in self.parameters() if each.is_floating_point())

    def get_input_embeddings(self) -> nn.Module:
        """What looks up the tokens, with whatever is around it."""
        return self.model.get_submodule("embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits, with whatever is around it."""
        return self.get_submodule("lm_head")


@final
class Generation:
    """What a generation_config.json says, by the zoo's reading."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is not as it would be if nothing were said."""
        return dict(self._values)


@final
class Body(nn.Module):
    """Everything below the output head."""

    def __init__(self, parts: _Parts) -> None:
        super().__init__()
        shape = parts.shape
        self.embed_tokens = parts.embedding()
        self.layers = nn.ModuleList(Block(parts, layer) for layer in range(shape.layers))
        self.norm = parts.norm("model.norm")
        self.rotary_emb = Rotary(shape.frequencies, shape.scaling)


@final
class Block(nn.Module):
    """Attention, then a feed-forward, each over a norm and added to what came in."""

    def __init__(self, parts: _Parts, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.self_attn = Attention(parts, layer)
        self.mlp = FeedForward(parts, name)
        self.input_layernorm = parts.norm(f"{name}.input_layernorm")
        self.post_attention_layernorm = parts.norm(f"{name}.post_attention_layernorm")

    def forward(
        self,
        hidden_states: Float[Tensor, "1 T d"],
        position_embeddings: Angles,
        attention_mask: Tensor | None,
        forest_plan: ForestPlan,
    ) -> Float[Tensor, "1 T d"]:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), position_embeddings=position_embeddings,
            attention_mask=attention_mask, forest_plan=forest_plan,
        )  # fmt: skip
        x: Tensor = hidden_states + attended
        fed: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return fed


@final
class Attention(nn.Module):
    """Queries, keys and values in heads, turned by their positions, over what the plan lets them see."""

    def __init__(self, parts: _Parts, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}.self_attn"
        self.layer_idx = layer
        self.head_dim = parts.shape.head_size
        self._call = parts.shape.calls[layer]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            parts.linear(f"{name}.{own}_proj") for own in ("q", "k", "v", "o")
        )
        if f"{name}.q_norm.weight" in parts.parameters:
            self.q_norm, self.k_norm = parts.norm(f"{name}.q_norm"), parts.norm(f"{name}.k_norm")

    def forward(
        self,
        hidden_states: Float[Tensor, "1 T d"],
        position_embeddings: Angles,
        attention_mask: Tensor | None,
        forest_plan: ForestPlan,
    ) -> tuple[Float[Tensor, "1 T d"], None]:
        query, key, value = (
            each(hidden_states).unflatten(-1, (-1, self.head_dim)) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        query, key = (_turned(each, position_embeddings) for each in (query, key))
        attended, _ = forest_attention(
            self, query, key, value, attention_mask, scaling=self._call.scale, sliding_window=self._call.window,
            forest_plan=forest_plan,
        )  # fmt: skip
        out: Tensor = self.o_proj(attended.flatten(2).contiguous())
        return out, None


@final
class FeedForward(nn.Module):
    """The way up, gated, and down again."""

    def __init__(self, parts: _Parts, block: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            parts.linear(f"{block}.mlp.{own}_proj") for own in ("gate", "up", "down")
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


@final
class RmsNorm(nn.Module):
    """Each row divided by the root of the mean of its squares, computed in float32."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = epsilon

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


@final
class Rotary(nn.Module):
    """The angles of positions: cosines and sines, each frequency twice."""

    def __init__(self, frequencies: tuple[float, ...], scaling: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor(frequencies, dtype=torch.float32), persistent=False)
        self.attention_scaling = scaling

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "1 _ d"], position_ids: Int[Tensor, "1 T"]) -> Angles:
        turns = position_ids[..., None].float() * self.get_buffer("inv_freq")
        both = torch.cat((turns, turns), dim=-1)
        return (both.cos() * self.attention_scaling).to(x.dtype), (both.sin() * self.attention_scaling).to(x.dtype)


def _turned(heads: Float[Tensor, "1 h T r"], angles: Angles) -> Float[Tensor, "1 h T r"]:
    cosines, sines = (each.unsqueeze(1) for each in angles)
    first, second = heads.chunk(2, -1)
    return heads * cosines + torch.cat((-second, first), -1) * sines
