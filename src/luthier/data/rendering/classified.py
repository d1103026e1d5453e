"""Texts with a class and words with tags: which token stands for a class, and that it alone carries loss.

Idea: a class is read at one token that has seen what it is about: an encoder's at the first token of the row (a
control token that sees all of it) or of the word, a causal decoder's at the last one.

Use through the renderers.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.data.conversation import Labelled, Row, Tagged
from luthier.data.rendering.marked import NOBODY, Marked
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.renderer import Renderer


class ClassRenderer(Renderer):
    """A renderer that also knows where classes stand."""

    at_last: ClassVar[bool]
    """Whether a class stands at the last token of its text or word; otherwise at the first."""

    def _labelled(self, row: Row, content: Labelled, marked: Marked) -> list[Rendered]:
        """The view of a text, or of a pair, with its class at one token."""
        for side in (0, 1) if content.pair else (0,):
            if not marked.has(side):
                raise DataError(
                    f"the {'second ' if side else ''}text has no token",
                    allowed="a text that the tokenizer can write",
                    do="take the row out; it holds signs that this tokenizer leaves out",
                )
        self._notice_controls(marked.text)
        made = self._cut_to_fit(row, marked)
        if made is None:
            return []
        place = len(made) - 1 if self.at_last else 0
        return [self._with_classes(row, made, np.array([place]), (content.label,))]

    def _tagged(self, row: Row, content: Tagged, marked: Marked) -> list[Rendered]:
        """The view of words with a class at one token of each."""
        self._notice_controls(marked.text)
        missing = np.setdiff1d(np.arange(len(content.words)), marked.words)
        if len(missing) == len(content.words):
            raise DataError(
                "none of the words has a token",
                allowed="words that the tokenizer can write",
                do="take the row out; its words hold signs that this tokenizer leaves out",
            )
        for word in missing.tolist():
            self._notice("a word has no token, so its tag is not trained", repr(content.words[word]))
        made = self._cut_to_fit(row, marked)
        if made is None:
            return []
        if self.at_last and len(made) < len(marked):
            # The last token of half a word has not seen the word.
            last = int(made.words[-1])
            if np.count_nonzero(made.words == last) < np.count_nonzero(marked.words == last):
                made = made.taken(made.words != last)
        places = self._places(made)
        if not len(places):
            raise DataError(
                f"the first word alone is longer than {self.max_tokens} tokens",
                allowed="a word that fits into a row",
                do="raise data.max_tokens",
            )
        return [self._with_classes(row, made, places, [content.tags[word] for word in made.words[places].tolist()])]

    def _cut_to_fit(self, row: Row, marked: Marked) -> Marked | None:
        """The tokens that may stay; None when the row is dropped."""
        fate = self._fate(row, len(marked), "the row")
        if fate == "dropped":
            return None
        if fate == "cut" and self.max_tokens is not None:
            self.counts.truncated += 1
            return marked.shortened(self.max_tokens)
        return marked

    def _places(self, marked: Marked) -> NDArray[np.int64]:
        """The first token of each word, or the last one."""
        words = marked.words[::-1] if self.at_last else marked.words
        found, first = np.unique(words, return_index=True)
        first = np.sort(first[found != NOBODY])
        return np.sort(len(words) - 1 - first) if self.at_last else first

    def _with_classes(
        self, row: Row, marked: Marked, places: NDArray[np.int64], names: list[str] | tuple[str, ...]
    ) -> Rendered:
        labels = np.full(len(marked), -1, np.int32)
        weights = np.zeros(len(marked), np.float32)
        labels[places] = [self.classes.id_of(name) for name in names]
        weights[places] = 1.0
        return marked.view(row.number, weights, labels=labels)
