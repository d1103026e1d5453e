"""What a GGUF file says of a model's shape, from transformers' config.

Idea: llama.cpp has no config file; what its code needs stands in the header, and what has no key there it takes as the
family always had it. So a config is compared with what that code does, and what it would compute differently is an
error here, not another model there.
Source: the keys of llama.cpp's loader (llama-arch, llama-model) as the gguf package names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.model.gguf.families import Family, family_of
from luthier.model.gguf.writing import Key, real, text, whole

_LARGE_GEMMA: Final = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose queries are scaled by width over heads."""
_PLAIN_ROPE: Final = ("default", "linear", "yarn", "llama3")


def shape_keys(config: Any) -> dict[str, Key]:
    """The keys below the architecture's name. Raises RecipeError for what llama.cpp would compute differently."""
    family = family_of(config)
    heads = int(config.num_attention_heads)
    size = _head_size(config)
    keys: dict[str, Key] = {
        "vocab_size": whole(config.vocab_size),
        "context_length": whole(_context(config, family)),
        "embedding_length": whole(config.hidden_size),
        "block_count": whole(config.num_hidden_layers),
        "feed_forward_length": whole(config.intermediate_size),
        "attention.head_count": whole(heads),
        "attention.head_count_kv": whole(getattr(config, "num_key_value_heads", None) or heads),
        "attention.key_length": whole(size),
        "attention.value_length": whole(size),
        "rope.dimension_count": whole(_turned_part(config, size)),
    }
    if family.architecture == "phi2":
        keys["attention.layer_norm_epsilon"] = real(config.layer_norm_eps)
    else:
        keys["attention.layer_norm_rms_epsilon"] = real(config.rms_norm_eps)
    if family.architecture in ("gemma2", "gemma3"):
        keys |= _gemma(config, family, heads, size)
    if family.architecture == "phi3":
        # Zero says that there is no window; without the key an older model is assumed, which has one.
        keys["attention.sliding_window"] = whole(_window(config) or 0)
    keys |= _rope(config, family)
    _require_plain(config, family)
    return {f"{family.architecture}.{key}": value for key, value in keys.items()}


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the frequencies for Llama 3's scaling, one per pair; None where there are none.

    Equation: with wavelength w = 2 pi theta^(2i/d): 1 below old / high, factor above old / low, and between them
    1 / ((1 - s) / factor + s), s = (old / w - low) / (high - low).
    """
    scaling = _scaling(config)
    if scaling.get("rope_type") != "llama3":
        return None
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old, theta = float(scaling["original_max_position_embeddings"]), float(scaling["rope_theta"])
    size = _head_size(config)
    made = []
    for pair in range(size // 2):
        wave = 2 * math.pi * theta ** (2 * pair / size)
        if wave < old / high:
            made.append(1.0)
        elif wave > old / low:
            made.append(factor)
        else:
            smooth = (old / wave - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(made, dtype=torch.float32)


def shape_notices(config: Any) -> list[str]:
    """What a user should know of how the model will be run there."""
    family, window = family_of(config), _window(config)
    if family.architecture in ("llama", "qwen2", "qwen3") and window and window < config.max_position_embeddings:
        return [f"llama.cpp has no sliding window for this family: the file names a context of {window} tokens, within "
                f"which the result is the same, instead of {config.max_position_embeddings}"]  # fmt: skip
    return []


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _turned_part(config: Any, size: int) -> int:
    part = _scaling(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(size * float(part))


def _window(config: Any) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return int(window) if window else None


def _context(config: Any, family: Family) -> int:
    window, longest = _window(config), int(config.max_position_embeddings)
    windowless = family.architecture in ("llama", "qwen2", "qwen3")
    return min(window, longest) if windowless and window else longest


def _gemma(config: Any, family: Family, heads: int, size: int) -> dict[str, Key]:
    keys = {"attention.sliding_window": whole(_window(config) or config.max_position_embeddings)}
    if family.architecture == "gemma2":
        keys["attn_logit_softcapping"] = real(config.attn_logit_softcapping or 0.0)
        keys["final_logit_softcapping"] = real(config.final_logit_softcapping or 0.0)
    large = config.num_hidden_layers == _LARGE_GEMMA[family.architecture]
    scale = config.hidden_size / heads if large else size
    if config.query_pre_attn_scalar != scale:
        raise _otherwise(f"query_pre_attn_scalar = {config.query_pre_attn_scalar}", f"{scale:g}")
    every = 2 if family.architecture == "gemma2" else 6
    wanted = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention"
              for layer in range(config.num_hidden_layers)]  # fmt: skip
    if _window(config) and list(config.layer_types) != wanted:
        raise _otherwise(f"layer_types = {list(config.layer_types)}", f"full attention in every {every}. layer")
    if family.architecture == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        raise _otherwise("a gemma2 model without soft caps", "both soft caps")
    if family.architecture == "gemma3" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        raise _otherwise("a gemma3 model with soft caps", "none")
    return keys


def _scaling(config: Any) -> Mapping[str, Any]:
    """The rotation's settings; of gemma3, which has two, those of the layers with full attention."""
    held = getattr(config, "rope_parameters", None) or {}
    full = held.get("full_attention")
    return full if isinstance(full, Mapping) else held


def _rope(config: Any, family: Family) -> dict[str, Key]:
    scaling = _scaling(config)
    kind = scaling.get("rope_type", "default")
    if kind not in _PLAIN_ROPE:
        raise _otherwise(f"rope_type = {kind!r}", ", ".join(_PLAIN_ROPE))
    near = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if isinstance(near, Mapping) and (near.get("rope_theta") != 10000.0 or near.get("rope_type") != "default"):
        raise _otherwise(f"rope of the layers with a window: {dict(near)}", "theta 10000, without scaling")
    keys = {"rope.freq_base": real(scaling["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": text(kind), "rope.scaling.factor": real(scaling["factor"])}
    if kind == "yarn":
        extra = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"} & set(scaling)
        if any(scaling[key] is not None for key in extra):
            raise _otherwise(f"yarn with {', '.join(sorted(extra))}", "yarn with its usual settings")
        old = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = whole(old)
    if kind == "llama3" and family.architecture != "llama":
        raise _otherwise(f"rope_type = 'llama3' of a {family.architecture} model", "it for llama models")
    return keys


def _require_plain(config: Any, family: Family) -> None:
    """Compare what has no key with what the family's code does."""
    wanted = {"gemma": ("gelu_pytorch_tanh",), "gemma2": ("gelu_pytorch_tanh",), "gemma3": ("gelu_pytorch_tanh",),
              "phi2": ("gelu_new", "gelu_pytorch_tanh")}.get(family.architecture, ("silu", "swish"))  # fmt: skip
    named = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if named not in wanted:
        raise _otherwise(f"the activation {named!r}", " or ".join(wanted))
    if getattr(config, "qk_layernorm", False):
        raise _otherwise("qk_layernorm = True", "a model without norms of q and k")


def _otherwise(received: str, allowed: str) -> RecipeError:
    return RecipeError(
        f"llama.cpp would compute another model: it has no {received}",
        allowed=allowed,
        do="export it with --to merged, or serve it here: luthier serve",
    )
