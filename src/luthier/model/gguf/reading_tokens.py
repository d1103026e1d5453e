"""The tokenizer that a GGUF file describes, built from its keys alone, as readers of the format understand them.

Idea: byte-level merges are what they are in any tokenizer; only the pattern has a name instead of a text. For
sentencepiece every pair of tokens that makes a token can be merged, the highest score first, so the merges are all
such pairs in the order of the scores.
Use when: what we wrote is read back. Nothing here knows the tokenizer that the keys were made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from luthier.core.errors import CorruptError
from luthier.model.gguf.splits import SPLITS, WHOLE_WORDS

_PREFIX: Final = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_SPACE: Final = "\u2581"
STRIPPING: Final = "phi-3"
"""In a model's name this makes special tokens swallow the white space behind them: llama.cpp has no key for it."""
KEPT: Final = frozenset(("<unk>", "<s>", "<|endoftext|>"))
"""Tokens that do not even then. llama.cpp fails where a model of that name lacks one of them, or `</s>`."""


def backend_of(keys: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer behind the keys of a file. Raises CorruptError where they describe none."""
    tokens, types = _list(keys, "tokens"), _list(keys, "token_type")
    if len(types) != len(tokens):
        raise _unsound("token_type", f"{len(types)} types for {len(tokens)} tokens", "one for each token")
    kind = keys.get(f"{_PREFIX}model")
    # Rows of a model that no token has are listed, too.
    used = {token: number for token, number in _numbered(tokens).items() if types[number] != _UNUSED}
    if kind == "gpt2":
        made = _byte_level(keys, used)
    elif kind == "llama":
        made = _sentencepiece(keys, tokens, used)
    else:
        raise _unsound("model", repr(kind), "gpt2 or llama")
    strips = strips_by_name(str(keys.get("general.name", "")))
    for token, each in zip(tokens, types, strict=True):
        swallows = strips and token not in KEPT
        if each in (_UNKNOWN, _CONTROL):
            made.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=swallows)])
        elif each == _USER_DEFINED:
            made.add_tokens([AddedToken(token, special=False, normalized=False, rstrip=swallows)])
    bos = keys.get(f"{_PREFIX}bos_token_id")
    if keys.get(f"{_PREFIX}add_bos_token") and type(bos) is int and bos < len(tokens):
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return made


def strips_by_name(name: str) -> bool:
    """Whether readers let the special tokens of a model of this name swallow white space."""
    return any(part in name.lower() for part in (STRIPPING, "phi3"))


def _byte_level(keys: Mapping[str, Any], numbered: dict[str, int]) -> Tokenizer:
    name = keys.get(f"{_PREFIX}pre")
    patterns = SPLITS.get(name) if isinstance(name, str) else None
    if patterns is None:
        raise _unsound("pre", repr(name), ", ".join(SPLITS))
    merges = [tuple(merge.split(" ")) for merge in _list(keys, "merges")]
    if any(len(pair) != 2 for pair in merges):
        raise _unsound("merges", "one that is no pair", "pairs of tokens")
    made = Tokenizer(models.BPE(numbered, merges, ignore_merges=name in WHOLE_WORDS))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(keys: Mapping[str, Any], tokens: list[Any], numbered: dict[str, int]) -> Tokenizer:
    scores = _list(keys, "scores")
    if len(scores) < len(tokens):
        scores = [*scores, *([min(scores, default=0.0)] * (len(tokens) - len(scores)))]
    score = dict(zip(tokens, scores, strict=False))
    pairs = [(-score[token], numbered[token[:cut]], numbered[token[cut:]], token[:cut], token[cut:])
             for token in numbered for cut in range(1, len(token))
             if token[:cut] in numbered and token[cut:] in numbered]  # fmt: skip
    unknown = keys.get(f"{_PREFIX}unknown_token_id")
    made = Tokenizer(models.BPE(
        numbered, [(left, right) for _, _, _, left, right in sorted(pairs)], byte_fallback=True, fuse_unk=True,
        unk_token=tokens[unknown] if type(unknown) is int and unknown < len(tokens) else None,
    ))  # fmt: skip
    spaced: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if keys.get(f"{_PREFIX}add_space_prefix", True):
        spaced.insert(0, normalizers.Prepend(_SPACE))
    made.normalizer = normalizers.Sequence(spaced)
    ends: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if keys.get(f"{_PREFIX}add_space_prefix", True):
        ends.append(decoders.Strip(content=" ", left=1))
    made.decoder = decoders.Sequence(ends)
    return made


def _numbered(tokens: list[Any]) -> dict[str, int]:
    numbered = {token: number for number, token in enumerate(tokens)}
    if len(numbered) != len(tokens):
        raise _unsound("tokens", f"{len(tokens) - len(numbered)} of {len(tokens)} texts twice", "each token once")
    return numbered


def _list(keys: Mapping[str, Any], name: str) -> list[Any]:
    found = keys.get(_PREFIX + name)
    if not isinstance(found, (list, tuple)):
        raise _unsound(name, "no list", "a list")
    return list(found)


def _unsound(field: str, received: str, allowed: str) -> CorruptError:
    return CorruptError(f"{_PREFIX}{field} has {received}", allowed=allowed, do="export or fetch the file again")
