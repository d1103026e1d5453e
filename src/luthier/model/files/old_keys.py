"""Keys of a model folder in the words of older readers, beside those of today.

Idea: transformers 5 writes the base of rotary positions into `rope_parameters`, the type of weights as `dtype`, and
further control tokens as a list `extra_special_tokens`. Readers of the 4.x line know none of these: they take a base
of 10,000 without a word, or stop at the list. So the old keys are written beside the new ones, with the same values;
readers of today prefer their own, and find the same in both.
Source: configuration classes and `modeling_rope_utils.py` of transformers 4.57.3 and 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

_LAYERED: Final = MappingProxyType({
    "gemma3": ("rope_theta", "rope_local_base_freq"),
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
})  # fmt: skip
"""Models that turn positions otherwise in full and in sliding layers, and their old keys for either base."""
_RENAMED: Final = MappingProxyType({"gpt_neox": MappingProxyType({
    "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct",
})})  # fmt: skip
_BESIDE: Final = ("rope_theta", "partial_rotary_factor")
"""Keys that stand on their own in old configs; all others of `rope_parameters` are `rope_scaling` there."""


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config.json with the keys of transformers 4 beside those of 5; what is there already stays."""
    found = dict(config)
    kind = str(config.get("model_type"))
    if config.get("dtype") is not None:
        found.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return found
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if isinstance(full, Mapping) and isinstance(sliding, Mapping):
        if kind not in _LAYERED:
            return found
        for key, part in zip(_LAYERED[kind], (full, sliding), strict=True):
            found.setdefault(key, part.get("rope_theta"))
        rope = full
    else:
        names: Mapping[str, str] = _RENAMED.get(kind, {})
        for key in _BESIDE:
            if key in rope:
                found.setdefault(names.get(key, key), rope[key])
    found.setdefault("rope_scaling", _scaling(rope, found))
    return found


def _scaling(rope: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    rest = {key: value for key, value in rope.items() if key not in _BESIDE}
    if kind == "longrope" and "original_max_position_embeddings" in rest:
        # Phi's old class wants exactly three keys, and looks for the length beside them.
        config.setdefault("original_max_position_embeddings", rest.pop("original_max_position_embeddings"))
        rest["type"] = rest.pop("rope_type")
    return rest


def tokenizer_with_old_keys(config: Mapping[str, Any], *, chat_template: str | None) -> dict[str, Any]:
    """A tokenizer_config.json that both lines read: a list of control tokens by its old name, the template inside."""
    found = dict(config)
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    if chat_template is not None:
        found["chat_template"] = chat_template
    return found
