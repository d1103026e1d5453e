"""Control tokens of a run: which ones the data uses, whether the base knows them, and what to do when it does not.

Before the first step the rows of every control token that the rendered data holds, and of every token that ends an
answer, are examined (see model/special_tokens.py). A token the base never learned is a notice and not an error: the run
may be what teaches it. A token without any row is an error, because luthier never resizes a vocabulary.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.adapters import Adapter
from luthier.adapters.lora import LoRA
from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.forest import Ints
from luthier.data.token_store import TokenStore
from luthier.data.tokenizer import Tokenizer
from luthier.model.editing.token_rows import ADD_ROWS
from luthier.model.files.generation_files import save_generation_config
from luthier.model.files.sources import FRESH
from luthier.model.language_model import LanguageModel
from luthier.model.special_tokens import Examination, Finding, Use, examine

CHUNK = 2**22
_UNUSED = re.compile(r"^[<\[|]+.*(unused|reserved|extra_id|placeholder|dummy|control_\d)", re.IGNORECASE)


def with_token_ids(adapter: Adapter, tokenizer: Tokenizer, stop_ids: Collection[int]) -> Adapter:
    """The adapter with ids for the texts of tokens it names."""
    return adapter.with_token_ids(
        lambda text: token_id(tokenizer, text),
        tuple(sorted(stop_ids)),
        lambda text: [int(token) for token in tokenizer.encode(text)[0]],
    )


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of the one token that reads `text`. Raises RecipeError with the nearest control tokens."""
    known = tokenizer.vocabulary
    if text in known:
        return int(known[text])
    ids, _ = tokenizer.encode(text)
    if len(ids) == 1 and tokenizer.decode(ids) == text:
        return int(ids[0])
    control = [tokenizer.decode([token]) for token in sorted(tokenizer.special_ids)]
    raise RecipeError(
        f"{text!r} is no token of this tokenizer" + (f" but {len(ids)} of them" if len(ids) > 1 else ""),
        allowed="the text or the id of one token; luthier adds none",
        do=did_you_mean(text, control),
    )


def require_rows(model: LanguageModel, tokenizer: Tokenizer, store: TokenStore) -> None:
    """Raise RecipeError when the data, or the end of an answer, is a token that the model has no row for."""
    size = model.vocabulary_size
    largest = max([_largest(store), *store.stop_ids], default=0)
    if largest >= size:
        raise RecipeError(
            f"the data holds token {largest} ({tokenizer.decode([largest])!r}), and {model.source} has {size:,} rows "
            f"(its tokenizer has {tokenizer.vocabulary_size:,} tokens)",
            allowed=f"tokens 0 to {size - 1}",
            do=f"use the tokenizer and template this model was trained with. {ADD_ROWS}",
        )


def control_tokens(
    model: LanguageModel, tokenizer: Tokenizer, store: TokenStore, adapter: Adapter
) -> tuple[dict[str, Any], list[str]]:
    """What the plan says of control tokens, and the notices that a user must see."""
    if model.source.startswith(FRESH):
        why = f"the base is new ({FRESH}), so it has learned no token yet and none was tested"
        return {"tested": [], "untrained": [], "not_tested": [why]}, []
    uses = uses_of(tokenizer, store)
    words, unused = _others(model, tokenizer, [use.id for use in uses])
    found = examine(model, uses, words=words, unused=unused)
    skipped = [f"{why} ({', '.join(places)})" for why, places in found.skipped.items()]
    notices = _notices(found, adapter)
    if uses and skipped:
        notices.append(f"control tokens were not tested: {'; '.join(skipped)}")
    plan = {
        "tested": [use.text for use in found.tested],
        "untrained": [asdict(finding) for finding in found.findings],
        "not_tested": skipped,
    }
    return plan, notices


def uses_of(tokenizer: Tokenizer, store: TokenStore) -> list[Use]:
    """The control tokens that the rendered data holds, and those that end an answer."""
    read, said = _seen(store)
    wanted = (set(np.flatnonzero(read | said)) & tokenizer.special_ids) | store.stop_ids
    return [
        Use(
            id=int(token),
            text=tokenizer.decode([int(token)]),
            read=bool(read[token]) if token < len(read) else False,
            said=bool(said[token]) if token < len(said) else False,
            stops=token in store.stop_ids,
        )
        for token in sorted(wanted)
    ]


def save_stops(folder: Path, model: LanguageModel, tokenizer: Tokenizer, stop_ids: Collection[int]) -> Path:
    """Write into a result where its answers stop, for luthier and for every other program that reads it."""
    return save_generation_config(folder, model, stop_ids, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id)


def _seen(store: TokenStore) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each token id: whether something follows it somewhere, and whether it carries loss somewhere."""
    size = _largest(store) + 1
    read, said = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    for start in range(0, len(store.tokens), CHUNK):
        stop = min(start + CHUNK, len(store.tokens))
        tokens = np.asarray(store.tokens[start:stop])
        followed = np.ones(len(tokens), dtype=np.bool_)
        first, last = np.searchsorted(store.offsets, [start + 1, stop + 1])
        followed[store.offsets[first:last] - 1 - start] = False
        read[tokens[followed]] = True
        said[tokens[store.weights[start:stop] > 0]] = True
    return read, said


def _largest(store: TokenStore) -> int:
    parts = range(0, len(store.tokens), CHUNK)
    return max((int(store.tokens[start : start + CHUNK].max()) for start in parts), default=0)


def _others(model: LanguageModel, tokenizer: Tokenizer, used: Sequence[int]) -> tuple[Ints, Ints]:
    """The words of the tokenizer that have a row, and the tokens that nothing seems to use, which may show what an
    untrained row looks like: other control tokens, names such as <unused7>, and rows that no token goes by."""
    size = model.vocabulary_size
    named = {int(token) for text, token in tokenizer.vocabulary.items() if _UNUSED.match(text)}
    beyond = range(tokenizer.vocabulary_size, size)
    unused = (named | tokenizer.special_ids | set(beyond)) - set(used)
    ids = np.arange(min(size, tokenizer.vocabulary_size), dtype=np.int32)
    words = ids[~np.isin(ids, list(unused | set(used)))]
    return words, np.array(sorted(token for token in unused if token < size), dtype=np.int32)


def _notices(found: Examination, adapter: Adapter) -> list[str]:
    """A sentence for each token, those that end answers first, and what to do about all that the run leaves as is."""
    by_token: dict[int, list[Finding]] = {}
    for finding in sorted(found.findings, key=lambda each: not each.stops):
        by_token.setdefault(finding.id, []).append(finding)
    open_ones = [same for same in by_token.values() if not all(each.in_training for each in same)]
    mended = [same for same in by_token.values() if same not in open_ones]
    said = [f"{_what_it_means(same[0])}: {_why(same)}" for same in open_ones]
    if open_ones:
        said.append(f"{_advice(adapter, [same[0].text for same in open_ones])}; or use a template of other tokens "
                    "(data.template)")  # fmt: skip
    said += [f"{same[0].text!r} looks untrained in the base, and this run trains it: {_why(same)}" for same in mended]
    return said


def _what_it_means(finding: Finding) -> str:
    if finding.stops:
        return f"STOP TOKEN {finding.text!r} looks untrained in the base, so answers may not stop"
    return f"{finding.text!r}, which the data uses, looks untrained in the base, so it means nothing yet"


def _why(same: Sequence[Finding]) -> str:
    """What is odd about the rows of one token; the same oddity in two places is said once."""
    places: dict[str, list[str]] = {}
    for each in same:
        places.setdefault(each.why, []).append(f"{each.place}: norm {each.norm:.3g}, words {each.median:.3g}")
    return "; ".join(f"{why} ({'; '.join(where)})" for why, where in places.items())


def _advice(adapter: Adapter, texts: Sequence[str]) -> str:
    """How to train just these rows: with the adapter as it is, or with LoRA, which trains them beside its own."""
    knob, method = adapter.tokens_knob, ""
    if not knob:
        knob, method = LoRA.tokens_knob, "--set adapter.method=lora "
    listed = list(dict.fromkeys([*getattr(adapter, knob, ()), *texts]))
    setting = shlex.quote(f"adapter.{knob}={json.dumps(listed, ensure_ascii=False)}")
    return f"to train just these rows too, add {method}--set {setting}"
