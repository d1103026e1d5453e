"""Guides to texts of a given form: JSON of a schema, any JSON object, a regular expression, one of some choices.

Idea: a grammar is compiled once for a tokenizer and shared; each continuation has a copy of its automaton, which says
after every token which tokens may follow. Tokens that stop are allowed exactly where the text may end. JSON is written
on one line, with at most one space after a comma and a colon: endless white space is no text that anybody wants.
Source: llguidance (github.com/guidance-ai/llguidance), an Earley parser over derivatives of regular expressions.
Cost: llguidance states 50 microseconds a token and continuation for a vocabulary of 128,000.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from types import ModuleType
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.core.optional import require
from luthier.data.forest import Ints
from luthier.data.tokenizer import Tokenizer
from luthier.infer.choices import Choices
from luthier.infer.guides import Guide

_JSON: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@final
class Grammars:
    """The grammars of one tokenizer; each is compiled when it is first asked for, and the latest `keep` are kept.

    Several threads may ask. `stops` are the tokens with which a text may end; the tokenizer's own when not given.
    """

    def __init__(self, tokenizer: Tokenizer, *, stops: frozenset[int] = frozenset(), keep: int = 64) -> None:
        self.tokenizer = tokenizer
        self.stops = stops or tokenizer.stop_ids
        if not self.stops:
            raise RecipeError(
                f"a tokenizer of {tokenizer.vocabulary_size} tokens names none with which a text ends",
                do="say which token stops: a text that must fit a form has to end somewhere",
            )
        self._keep = keep
        self._lock = Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Callable[[], Guide]] = OrderedDict()

    def json_schema(self, schema: Mapping[str, Any]) -> Callable[[], Guide]:
        """JSON that fits a schema. Raises RecipeError for a schema that is none or that llguidance cannot follow."""
        text = json.dumps(schema)
        return self._kept("schema " + text, lambda: self._grammar("JSON schema", text))

    def json_object(self) -> Callable[[], Guide]:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Callable[[], Guide]:
        r"""Text that a regular expression matches as a whole: syntax of Rust's regex crate, \d is 0 to 9."""
        return self._kept("regex " + pattern, lambda: self._grammar("regular expression", pattern))

    def choices(self, texts: Sequence[str], *, after: Ints | None = None) -> Callable[[], Guide]:
        """One of some texts; needs no package. `after` are the last tokens of the prompt."""
        return Choices(self.tokenizer, texts, stops=self.stops, after=after)

    def _kept(self, name: str, make: Callable[[], Callable[[], Guide]]) -> Callable[[], Guide]:
        with self._lock:
            if name not in self._compiled:
                self._compiled[name] = make()
            self._compiled.move_to_end(name)
            while len(self._compiled) > self._keep:
                self._compiled.popitem(last=False)
            return self._compiled[name]

    def _grammar(self, kind: str, text: str) -> Callable[[], Guide]:
        library = require("llguidance", extra="guided", purpose=f"a text that fits a {kind}")
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(library, self.tokenizer)
        make = library.LLMatcher
        if kind == "regular expression":
            grammar = make.grammar_from_lark(f"start: /{library.regex_to_lark(text, 'd')}/")
        else:
            grammar = make.grammar_from_json_schema(text, _JSON)
        matcher = make(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise RecipeError(f"the {kind} {text} cannot be followed: {_first_line(matcher)}")
        stops = sorted(self.stops)
        return lambda: _GrammarGuide(matcher.deep_copy(), stops)


def _first_line(matcher: Any) -> str:
    # Behind it comes the state of its parser.
    return str(matcher.get_error()).strip().partition("\n")[0]


def _vocabulary(library: ModuleType, tokenizer: Tokenizer) -> Any:
    """The bytes of each token, as llguidance reads them from a tokenizer.json."""
    try:
        return library.LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_id)
    except ValueError as failure:
        raise RecipeError(
            f"llguidance cannot read this tokenizer: {failure}",
            allowed="byte-level tokenizers, and those with a token for each byte",
            do="use choices, which need no grammar, or a model with another tokenizer",
        ) from failure


@final
class _GrammarGuide(Guide):
    """The place of one continuation in a grammar."""

    def __init__(self, matcher: Any, stops: list[int]) -> None:
        self._matcher = matcher
        self._stops = stops
        self._over = False

    def allowed(self) -> Bool[Tensor, " V"] | None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RecipeError(f"the grammar cannot be followed any further: {_first_line(self._matcher)}")
        mask = np.zeros(max(8 * len(bits), self._stops[-1] + 1), np.bool_)
        if not self._over:
            mask[: 8 * len(bits)] = np.unpackbits(bits, bitorder="little")
        mask[self._stops] = self._over or self._matcher.is_accepting()
        return torch.from_numpy(mask)

    def said(self, token: int) -> None:
        self._over = self._over or token in self._stops
        if not self._over:
            self._matcher.consume_token(token)
