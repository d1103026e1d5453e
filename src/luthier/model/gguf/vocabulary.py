"""A tokenizer as GGUF has it: tokens with their types, merges or scores, and what starts and ends a text.

Idea: a file holds less than a tokenizer.json: a list of tokens, how they are merged, and the name of a pattern. Whether
that is enough is not argued but tried: the keys are read back as a reader of the file would (reading_tokens.py), and
must give the same ids for texts that are hard on tokenizers. The pattern is the first of the known ones that does.
Source: the keys of llama.cpp's tokenizers: "gpt2" (byte-level merges) and "llama" (sentencepiece: the pair whose token
    has the highest score is merged first, so a score is the rank of a merge, negated).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, final

from luthier.core.errors import RecipeError
from luthier.data.tokenizer import Tokenizer
from luthier.model.gguf.reading_tokens import KEPT, STRIPPING, backend_of
from luthier.model.gguf.splits import APPROXIMATED, CONTRACTED, SPLITS
from luthier.model.gguf.writing import F32, I32, Key, flag, numbers, text, texts, whole

NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6
PREFIX: Final = "tokenizer.ggml."
TEMPLATE: Final = "tokenizer.chat_template"
PROBES: Final = (
    "The ship left the harbour at dawn; nobody on the quay said a word.",
    "  two spaces before, three   inside, one behind ",
    "tabs\tand\n\nline breaks\r\n \n  indented",
    "It's 1234567 o'clock, we'LL see: 3.14 (or 2,718)!?",
    "MixedCase camelCase HTTPServer naïve café Ünicode",
    "日本語とエモジ🙂👩‍👩‍👧 Ελληνικά кириллица ١٢٣",
    "x",
    "a_b-c/d\\e {\"key\": [1, 2.5e-3]} <tag> 'quoted' \"too\"...",
    "getElementById(HTMLElement x=1000000)\n\n\n\tif(!done){ return\u00a0'DON'T'; }  \n  //end",
    "e\u0301 and \u200b\u00a0\u3000 odd spaces",
    "eines grünÄpfel ΑΒΓδ и ПриветМир",
    "if x:\n        return  1\n\n\n",
)
"""Texts that are hard on tokenizers."""


@final
@dataclass(frozen=True)
class Vocabulary:
    """The keys of a tokenizer, what a user should know of it, and whether its tokens `strip` what is behind them."""

    keys: Mapping[str, Key]
    notices: tuple[str, ...]
    strips: bool = False


def vocabulary(
    tokenizer: Tokenizer,
    *,
    size: int,
    stop_ids: Collection[int],
    template: str | None,
    adds_bos: bool | None = None,
) -> Vocabulary:
    """The keys for a model with `size` rows of embeddings; `adds_bos` None for as the tokenizer does.

    Raises RecipeError for a tokenizer that no reader of GGUF would cut alike.
    """
    held = json.loads(tokenizer.backend.to_str())
    strips = _require_known(held)
    keys = _tokens(held, size)
    keys |= _ends(tokenizer, stop_ids)
    keys[f"{PREFIX}add_bos_token"] = flag(tokenizer.adds_bos if adds_bos is None else adds_bos)
    if template is not None:
        keys[TEMPLATE] = text(template)
    options = _byte_level(held) if _is_byte_level(held) else _sentencepiece(held, size)
    probes, notices = _fair(held)
    found = _first_that_fits(tokenizer, keys, options, name=STRIPPING if strips else "", probes=probes)
    return Vocabulary(found.keys, (*found.notices, *notices), strips)


def _fair(held: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts that readers can be expected to cut alike, and sentences on those that they cannot."""
    probes: tuple[str, ...] = PROBES
    notices: list[str] = []
    if (held.get("normalizer") or {}).get("type") == "NFC":
        probes = tuple(probe for probe in probes if unicodedata.normalize("NFC", probe) == probe)
        notices.append("readers of GGUF do not normalize texts: one that is not in form NFC gets other tokens there")
    if _own_patterns(held.get("pre_tokenizer") or {}) in APPROXIMATED.values():
        probes = tuple(probe for probe in probes if not _needs_case(probe))
        notices.append("readers of GGUF cut words with combining marks, or with a capital letter inside that is not "
                       "one of A to Z, otherwise than the model's tokenizer")  # fmt: skip
    return probes, tuple(notices)


def _needs_case(probe: str) -> bool:
    """Whether readers that know no marks, and no case beyond ASCII, may cut a text otherwise."""
    inside = any(before.isalpha() and after.isupper() and not after.isascii() for before, after in pairwise(probe))
    return inside or any(unicodedata.category(letter).startswith("M") for letter in probe)


def _first_that_fits(
    tokenizer: Tokenizer, keys: dict[str, Key], options: Sequence[dict[str, Key]], *, name: str, probes: Sequence[str]
) -> Vocabulary:
    """The keys with the first option that gives the tokenizer's ids; best one that does so beside special tokens."""
    wanted = [tokenizer.encode(probe)[0].tolist() for probe in probes]
    marked = _marked(tokenizer)
    wanted_marked = [tokenizer.encode(probe)[0].tolist() for probe in marked]
    plain: dict[str, Key] | None = None
    worst = ""
    for option in options:
        tried = keys | option
        read = backend_of({"general.name": name, **{key: value.value for key, value in tried.items()}})
        wrong = next((probe for probe, ids in zip(probes, wanted, strict=True)
                      if read.encode(probe, add_special_tokens=False).ids != ids), None)  # fmt: skip
        if wrong is not None:
            worst = wrong
            continue
        if all(read.encode(probe, add_special_tokens=False).ids == ids
               for probe, ids in zip(marked, wanted_marked, strict=True)):  # fmt: skip
            return Vocabulary(tried, ())
        plain = plain or tried
    if plain is None:
        raise RecipeError(
            f"no tokenizer that readers of GGUF have cuts {worst!r} as the model's own does",
            allowed="the patterns of " + ", ".join(SPLITS) + ", and sentencepiece",
            do="export the model with --to merged",
        )
    return Vocabulary(plain, ("readers of GGUF cut texts behind a special token otherwise than the model's tokenizer; "
                              "the check of the training rows tells whether that concerns them",))  # fmt: skip


def _marked(tokenizer: Tokenizer) -> list[str]:
    """Texts with special tokens between words, as chat templates write them."""
    specials = sorted(tokenizer.specials.texts)[:8]
    return [f"{special}user\nHello there{special} and 12 more" for special in specials]


def _require_known(held: Mapping[str, Any]) -> bool:
    """Refuse what no reader has; whether the special tokens swallow white space as those of Phi 3 do."""
    model = held["model"]
    kind = model.get("type")
    if kind != "BPE":
        raise RecipeError(f"the tokenizer's model is {kind}", allowed="BPE, byte-level or as sentencepiece has it",
                          do="export the model with --to merged")  # fmt: skip
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise RecipeError("the tokenizer marks the middle or the end of words, or drops merges at random",
                          allowed="plain merges", do="export the model with --to merged")  # fmt: skip
    stripping = [token["content"] for token in held["added_tokens"] if token["lstrip"] or token["rstrip"]]
    names = {token["content"] for token in held["added_tokens"]}
    if stripping and (any(token["lstrip"] for token in held["added_tokens"]) or not names >= KEPT | {"</s>"}):
        raise RecipeError(
            f"the special tokens {', '.join(stripping[:3])} swallow the white space beside them",
            allowed="special tokens that do not, or those of Phi 3: readers of GGUF have no key for it",
            do="export the model with --to merged",
        )
    return bool(stripping)


def _is_byte_level(held: Mapping[str, Any]) -> bool:
    return '"type": "ByteLevel"' in json.dumps(held.get("pre_tokenizer"))


def _tokens(held: Mapping[str, Any], size: int) -> dict[str, Key]:
    """Every id's text and type; ids that no token has are marked as unused."""
    added = {token["id"]: token for token in held["added_tokens"]}
    known = {number: token for token, number in held["model"]["vocab"].items()}
    known |= {number: token["content"] for number, token in added.items()}
    if known and max(known) >= size:
        raise RecipeError(f"the tokenizer has an id {max(known)}, the model {size} rows of embeddings",
                          allowed="ids below the number of rows", do="use the tokenizer of the model")  # fmt: skip
    unknown = held["model"].get("unk_token")
    fallback = bool(held["model"].get("byte_fallback"))
    names, types = [], []
    for number in range(size):
        token = known.get(number)
        names.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif token == unknown:
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if fallback and _is_byte(token) else NORMAL)
    return {f"{PREFIX}tokens": texts(names), f"{PREFIX}token_type": numbers(types, I32)}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _ends(tokenizer: Tokenizer, stop_ids: Collection[int]) -> dict[str, Key]:
    """What starts a text, what ends it, and what ends a turn where that is another token."""
    keys: dict[str, Key] = {}
    for key, number in (("bos", tokenizer.bos_id), ("unknown", tokenizer.unknown_id), ("padding", tokenizer.pad_id)):
        if number is not None:
            keys[f"{PREFIX}{key}_token_id"] = whole(int(number))
    ends = list(dict.fromkeys([*(one for one in tokenizer.eos_ids if one in stop_ids), *sorted(stop_ids)]))
    for key, number in zip(("eos", "eot", "eom"), ends or list(tokenizer.eos_ids[:1]), strict=False):
        keys[f"{PREFIX}{key}_token_id"] = whole(int(number))
    keys[f"{PREFIX}add_eos_token"] = flag(False)
    return keys


def _byte_level(held: Mapping[str, Any]) -> list[dict[str, Key]]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in held["model"]["merges"]]
    merges = texts([" ".join(pair) for pair in pairs])
    own = _own_patterns(held.get("pre_tokenizer") or {})
    # The one with the tokenizer's own pattern first: the probes might not tell it from a similar one.
    names = sorted(SPLITS, key=lambda name: APPROXIMATED.get(name, SPLITS[name]) != own)
    return [{f"{PREFIX}model": text("gpt2"), f"{PREFIX}pre": text(name), f"{PREFIX}merges": merges} for name in names]


def _own_patterns(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns of a tokenizer, as SPLITS writes them."""
    kind = step.get("type")
    if kind == "Sequence":
        return tuple(pattern for inner in step.get("pretokenizers", ()) for pattern in _own_patterns(inner))
    if kind == "Split":
        pattern = str(step.get("pattern", {}).get("Regex", ""))
        return (pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", CONTRACTED),)
    if kind == "Digits":
        return (r"\p{N}",)
    return SPLITS["gpt-2"] if kind == "ByteLevel" and step.get("use_regex", True) else ()


def _sentencepiece(held: Mapping[str, Any], size: int) -> list[dict[str, Key]]:
    """Scores from the ranks of merges; with and without the space that is put before a text."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in held["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    known = {number: token for token, number in held["model"]["vocab"].items()}
    last = float(len(pairs) + 1)
    scores = [-float(ranks.get(known.get(number, ""), last)) for number in range(size)]
    common = {f"{PREFIX}model": text("llama"), f"{PREFIX}pre": text("default"), f"{PREFIX}scores": numbers(scores, F32)}
    return [common | {f"{PREFIX}add_space_prefix": flag(prefix)} for prefix in (True, False)]
