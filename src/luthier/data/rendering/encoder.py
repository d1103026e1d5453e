"""Rows for an encoder: texts between the tokenizer's own control tokens, with classes where there are any.

Idea: a text with a class is one row, its class at the first token ([CLS]); words with tags have theirs at the first
token of each word. A document is cut into windows, each between control tokens of its own; all its words may be
masked, so all carry weight, and the objective chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from luthier.core.errors import DataError
from luthier.data.conversation import Content, Labelled, Message, Row, Tagged, Text
from luthier.data.forest import Ints
from luthier.data.rendering.classified import ClassRenderer
from luthier.data.rendering.marked import NOBODY, Marked, mark, mark_words
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.renderer import OverLength, Staged, Stages, refused
from luthier.data.rendering.spans import whole_character
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer


@final
class EncoderRenderer(ClassRenderer):
    """Rows to tokens for an encoder."""

    kind = "encoder"
    takes = ("labelled", "tagged", "text")
    at_last = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        over_length: OverLength = "raise",
        max_tokens: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, template, over_length=over_length, max_tokens=max_tokens, classes=classes)
        self._ahead: dict[tuple[str, str], Marked] = {}

    def encode_ahead(self, staged: Sequence[Staged]) -> None:
        """Make the tokens of all these texts at once."""
        pairs: dict[tuple[str, str], None] = {}
        for one in staged:
            if isinstance(one.ready, Labelled):
                pairs[one.ready.text, one.ready.pair] = None
            elif isinstance(one.ready, Text):
                pairs[one.ready.text, ""] = None
        self._ahead = {}
        self._ahead = dict(zip(pairs, mark(self.tokenizer, list(pairs)), strict=True))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        """An encoder is not prompted. Raises DataError."""
        raise DataError(
            "an encoder says nothing, so it cannot be prompted", allowed="a causal decoder or an encoder-decoder"
        )

    def _views(self, row: Row, ready: Stages | Content) -> list[Rendered]:
        if isinstance(ready, Labelled):
            return self._labelled(row, ready, self._begun(self._marked(ready.text, ready.pair)))
        if isinstance(ready, Tagged):
            return self._tagged(row, ready, mark_words(self.tokenizer, ready.words))
        if isinstance(ready, Text):
            return self._windows(row, self._marked(ready.text))
        raise refused(row, self)

    def _marked(self, text: str, pair: str = "") -> Marked:
        return self._ahead.pop((text, pair), None) or mark(self.tokenizer, [(text, pair)])[0]

    def _begun(self, marked: Marked) -> Marked:
        """The tokens, the first of which has to be a control token: it stands for the class."""
        if not len(marked) or marked.sides[0] != NOBODY:
            raise DataError(
                "the tokenizer puts no control token before a text, and an encoder's class is read there",
                allowed="a tokenizer with a post-processor that begins with a token such as [CLS]",
                do="choose another model, or save the tokenizer with its post-processor",
            )
        return marked

    def _windows(self, row: Row, marked: Marked) -> list[Rendered]:
        """A document in consecutive windows between control tokens."""
        self._notice_controls(marked.text)
        content = np.flatnonzero(marked.sides != NOBODY)
        if not len(content):
            raise DataError(
                "the text has no token",
                allowed="a text that the tokenizer can write",
                do="take the row out; it holds signs that this tokenizer leaves out",
            )
        before, after = np.arange(content[0]), np.arange(content[-1] + 1, len(marked))
        spans = marked.spans[content]
        room = len(content) if self.max_tokens is None else self.max_tokens - len(before) - len(after)
        made: list[Rendered] = []
        start = 0
        while start < len(content):
            stop = len(content) if start + room >= len(content) else whole_character(spans, start + room)
            stop = stop if stop > start else start + room
            window = marked.taken(np.concatenate([before, content[start:stop], after]))
            window.spans[: len(before)] = spans[start, 0]
            words = (window.sides != NOBODY) & ~np.isin(window.ids, list(self.tokenizer.special_ids))
            if words.any():
                made.append(window.view(row.number, words.astype(np.float32)))
            else:
                self._notice("a window of a text holds control tokens only, such as the unknown one, and is left out")
            start = stop
        return made
