"""Tiny models and a tiny tokenizer, made here with random weights: what every test of the engine runs on.

Each architecture differs from the others where an engine can go wrong: llama (plain), qwen2 (biases on q, k, v; tied
embeddings), gpt2 (fused qkv, Conv1D, learned positions), gemma2 (soft caps, alternating windows, scaled embeddings),
mistral (sliding window shorter than the test rows). Hidden size 32, two layers, a vocabulary of 128.
"""

from __future__ import annotations

import fcntl
import shutil
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = 128
HIDDEN = 32
LAYERS = 2
WINDOW = 6
KINDS = ("llama", "qwen2", "gpt2", "gemma2", "mistral")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIALS = ("<|pad|>", "<|end|>", "<|start|>")
_SHARED = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def tiny_config(kind: str) -> Any:
    """The transformers config of one of `KINDS`."""
    import transformers

    if kind == "llama":
        return transformers.LlamaConfig(**_SHARED)
    if kind == "qwen2":
        return transformers.Qwen2Config(**_SHARED, tie_word_embeddings=True)
    if kind == "mistral":
        return transformers.MistralConfig(**_SHARED, sliding_window=WINDOW, head_dim=8)
    if kind == "gemma2":
        return transformers.Gemma2Config(
            **_SHARED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
            attn_logit_softcapping=5.0, final_logit_softcapping=6.0,
        )  # fmt: skip
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=256,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")


def tiny_model(kind: str, *, seed: int = 0) -> Any:
    """A new transformers model of `kind` in float32, in evaluation mode; the same weights for the same seed.

    Weights are drawn wider than transformers does, so that attention and soft caps matter in a comparison.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.05)
    return model.eval()


def tiny_tokenizer() -> Any:
    """A new byte-level tokenizer (transformers, fast) of 128 tokens: three control tokens, ASCII, and a few merges.

    It can write every ASCII text. Its chat template is ChatML-like and ends each turn with `<|end|>`, its eos token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _vocabulary()
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_folder(kind: str, parent: Path) -> Path:
    """A folder below `parent` with the model, the tokenizer and the template, as from a hub; made once.

    Processes that share `parent` share the folder: it is made under a lock and appears by a rename.
    """
    folder = parent / f"tiny-{kind}"
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f".tiny-{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            beside = parent / f".tiny-{kind}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            tiny_model(kind).save_pretrained(str(beside))
            tiny_tokenizer().save_pretrained(str(beside))
            beside.rename(folder)
    return folder


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Control tokens first, then line break, space and all printable ASCII, then merges up to the vocabulary's size."""
    newline, space = "Ċ", "Ġ"
    letters = [newline, space, *(chr(code) for code in range(33, 127))]
    pairs = [
        (space, "t"), ("h", "e"), ("i", "n"), ("e", "r"), (space, "a"), ("o", "n"), ("r", "e"), (space, "s"),
        ("a", "t"), ("o", "r"), ("e", "n"), (space, "w"), ("i", "s"), ("o", "u"), ("n", "d"), ("l", "l"),
        (f"{space}t", "he"), ("e", "s"), ("i", "t"), ("a", "l"), ("e", "d"), ("in", "g"), (space, "o"), (space, "c"),
        ("s", "t"), ("a", "r"), (space, "b"), ("u", "s"), ("l", "e"),
    ]  # fmt: skip
    tokens = [*SPECIALS, *letters, *(left + right for left, right in pairs)]
    if len(tokens) != VOCABULARY:
        raise ValueError(f"the tiny vocabulary has {len(tokens)} tokens, not {VOCABULARY}")
    return {token: number for number, token in enumerate(tokens)}, pairs
