"""Which tokenizers cut texts into words by a pattern that is known, and look at each word alone.

Idea: see `words.py`. The patterns are those that are listed here, word for word; anything about a tokenizer that would
let a neighbour change a word's tokens means that it is none of these.

Source: the pre-tokenizers of the tokenizers library (ByteLevel, Split) and the patterns of GPT-2, Llama 3 and Qwen 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SEEDLING: Final = (
    r"'(?:[sdmt]|ll|ve|re)|\p{Lu}\p{L}*| ?(?!\p{Lu})\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
PATTERNS: Final = (_GPT2, _LLAMA3, _QWEN2, _SEEDLING)  # as kernels/words.py names them, in ORDER
"""What is known to cut at each letter that a space or a line break follows, without looking back over it."""
_IN_CLASS: Final = {r"\p{Lu}": "A-Z", r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}


def ascii_pattern(pattern: str) -> str:
    """A pattern as it reads where there is nothing but ASCII: classes of Unicode become ranges."""
    inside = False
    made = ""
    for piece in re.split(r"(\\p\{\w+\}|\\.|[\[\]])", pattern):
        inside = piece == "[" or (inside and piece != "]")
        ranges = _IN_CLASS.get(piece)
        made += piece if ranges is None else ranges if inside else f"[{ranges}]"
    return made


def _state(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer says of itself, as tokenizer.json has it; empty when there is none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _parts(state: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, or the one part, or none."""
    return list(state[key]) if state.get("type") == "Sequence" else [state] if state else []


def pattern_of(backend: Any) -> str | None:
    """The listed pattern by which a pre-tokenizer cuts; None when it does anything else."""
    *before, last = _parts(_state(backend.pre_tokenizer), "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    if not before:
        return _GPT2 if last.get("use_regex", True) is True else None
    if len(before) > 1 or before[0].get("type") != "Split" or last.get("use_regex", True) is not False:
        return None
    # Isolated words, or what is between removed: all characters belong to a word, so that is the same.
    way = before[0].get("behavior"), before[0].get("invert")
    pattern = before[0].get("pattern", {}).get("Regex")
    return pattern if pattern in PATTERNS and way in (("Isolated", False), ("Removed", True)) else None


def is_plain(backend: Any) -> bool:
    """Whether the rest of a tokenizer looks at one word at a time, and leaves ASCII and the spans as they are."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or model.unk_token is not None or backend.encode_special_tokens:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback:
        return False
    if _state(backend.normalizer).get("type", "NFC") != "NFC":
        return False
    return all(
        part.get("type") == "TemplateProcessing" or (part.get("type") == "ByteLevel" and not part["trim_offsets"])
        for part in _parts(_state(backend.post_processor), "processors")
    )
