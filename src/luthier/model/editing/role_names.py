"""Roles by name: what the field calls its modules and tensors, whatever class they belong to.

Idea: a tensor in a file has no module around it. Its name tells the layer (the first number in it) and, by the words
that are used for modules everywhere, its role.
"""

from __future__ import annotations

import re
from typing import Final

PEFT_PREFIX: Final = "base_model.model."
"""What PEFT puts before the name of a module in its files."""
_ROLE_OF_NAME: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("q_proj", "query", "wq", "q", "q_lin"), ("q",)),
    **dict.fromkeys(("k_proj", "key", "wk", "k", "k_lin"), ("k",)),
    **dict.fromkeys(("v_proj", "value", "wv", "v", "v_lin"), ("v",)),
    **dict.fromkeys(("o_proj", "out_proj", "o", "out_lin"), ("o",)),
    **dict.fromkeys(("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj"), ("q", "k", "v")),
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), ("gate",)),
    **dict.fromkeys(("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w3", "wi_1", "wi", "lin1", "ffn"), ("up",)),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "lin2", "ffn_output"), ("down",)),
    **dict.fromkeys(("gate_up_proj",), ("gate", "up")),
}
_ENDS: Final = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings"), "embed"),
    **dict.fromkeys(("lm_head", "embed_out"), "head"),
    **dict.fromkeys(("wpe", "position_embeddings", "token_type_embeddings", "embed_positions"), "table"),
}
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def linear_roles(name: str) -> tuple[str, ...]:
    """The roles of a linear layer by its name; where that says too little, by the modules it lies in."""
    ending = name.rpartition(".")[2]
    parents = name.lower().split(".")[:-1]
    attends = any("att" in part for part in parents[-2:])
    if ending == "c_proj":
        # GPT-2 calls both output projections so.
        return ("o",) if attends else ("down",)
    if ending in ("wo", "Wo"):
        return ("o",) if attends else ("down",)
    if ending == "Wi":
        # ModernBERT makes the gate and the way up in one product.
        return ("gate", "up")
    if ending == "dense":
        # BERT's output layers lie in modules called output, GPT-NeoX's in the attention itself; poolers are neither.
        if attends:
            return ("o",)
        return {"intermediate": ("up",), "output": ("down",)}.get(parents[-1] if parents else "", ("linear",))
    return _ROLE_OF_NAME.get(ending, ("linear",))


def tensor_roles(name: str) -> tuple[str, ...]:
    """The roles of a tensor in a weight file; `linear` where its name says no more."""
    module = name.rpartition(".")[0] or name
    ending = module.rpartition(".")[2]
    if ending in _ENDS:
        return (_ENDS[ending],)
    if "norm" in ending.lower() or re.fullmatch(r"ln_?\w*", ending.lower()):
        return ("norm",)
    return linear_roles(module)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to: the first number in its name; None outside of layers."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def in_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    return _LAYER.sub(lambda found: found[0].replace(found[1], str(layer)), name, count=1)
