"""How llama.cpp cuts a text before byte-level merges: the patterns behind `tokenizer.ggml.pre`.

A file can only name one of the patterns that are built into its readers. Listed are those of the models in use, the
plain ones first; which one cuts as a tokenizer does is found by trying (vocabulary.py).
Source: llama.cpp's table of pre-tokenizers (llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CONTRACTED: Final = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENDS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITALS: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALLS: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATED: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_ENDS}",),
    "llama-bpe": (rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDS}",),
    "tekken": (rf"{_CAPITALS}*{_SMALLS}+|{_CAPITALS}+{_SMALLS}*|\p{{N}}|{_PUNCTUATED}",),
    "gpt-4o": (
        rf"{_CAPITALS}*{_SMALLS}+{CONTRACTED}?|{_CAPITALS}+{_SMALLS}*{CONTRACTED}?|\p{{N}}{{1,3}}|{_PUNCTUATED}",
    ),
}
"""Patterns by name; each cuts what the one before it left."""

WHOLE_WORDS: Final = ("llama-bpe", "tekken", "gpt-4o")
"""Readers take a piece that is a token as that token, without merging."""
