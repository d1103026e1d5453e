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
_BEFORE: Final = r"[^\r\n\p{L}\p{N}]?"
_CAPITALS: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALLS: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_SMALL: Final = r"(?:(?=\p{L})[^a-z])"
_NOT_CAPITAL: Final = r"(?:(?=\p{L})[^A-Z])"
_PUNCTUATED: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_case(capitals: str, smalls: str, *, ending: str, digits: str) -> str:
    """Words that are cut where a small letter is followed by a capital one."""
    return (f"{_BEFORE}{capitals}*{smalls}+{ending}|{_BEFORE}{capitals}+{smalls}*{ending}|{digits}|{_PUNCTUATED}")


SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{CONTRACTED}|{_BEFORE}\p{{L}}+|\p{{N}}|{_ENDS}",),
    "llama-bpe": (rf"{CONTRACTED}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{_ENDS}",),
    "tekken": (_by_case(_NOT_SMALL, _NOT_CAPITAL, ending="", digits=r"\p{N}"),),
    "gpt-4o": (_by_case(_NOT_SMALL, _NOT_CAPITAL, ending=f"{CONTRACTED}?", digits=r"\p{N}{1,3}"),),
}
"""Patterns by name; each cuts what the one before it left."""
APPROXIMATED: Final[Mapping[str, tuple[str, ...]]] = {
    "tekken": (_by_case(_CAPITALS, _SMALLS, ending="", digits=r"\p{N}"),),
    "gpt-4o": (_by_case(_CAPITALS, _SMALLS, ending=f"{CONTRACTED}?", digits=r"\p{N}{1,3}"),),
}
"""What tokenizers say where readers do something else: those know no marks, and no case beyond a to z."""
WHOLE_WORDS: Final = ("llama-bpe", "tekken", "gpt-4o")
"""Readers take a piece that is a token as that token, without merging."""
