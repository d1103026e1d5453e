"""Many conversations at once: their tokens, roles and weights in one call of C++ each.

Idea: a row as nearly all are needs nothing of its own once its text is laid out (`layout.py`): texts of a batch are
joined, their tokens stand in the same arrays one behind the other, and each step is one call for all of them. A row
that is not known to be so afterwards is rendered by itself, as if there were no batches; that decides what it becomes.

Use through the renderer of causal decoders and `intake.py`, which asks what must hold of the rows for all at once too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Row
from luthier.data.forest import Ints
from luthier.data.rendering.layout import Filled
from luthier.data.rendering.rendered import Rendered
from luthier.data.tokenizer import Tokenizer
from luthier.kernels.rows import NativeRows, Rows, Turns
from luthier.kernels.words import Encoded, Joined


@final
@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows that are laid out, and the tokens of their texts and then of their prompts."""

    rows: Sequence[Row]
    filled: Sequence[Filled]
    texts: Joined
    encoded: Encoded

    @classmethod
    def of(cls, rows: Sequence[Row], filled: Sequence[Filled], tokenizer: Tokenizer) -> Tokens | None:
        """The tokens of rows; None where words do not say them, so that each has to be looked at by itself."""
        if not rows or tokenizer.words is None:
            return None
        prompts: list[tuple[int, int]] = []
        for place, one in enumerate(filled):
            prompts += [(place, start) for start in one.places[len(one.layout.roles) :: 3]]
        texts = Joined.of([one.text for one in filled])
        encoded = tokenizer.words.encode_begun(texts, prompts)
        if encoded is None:
            return None
        if tokenizer.spellings is not None:
            tokenizer.spellings.foresee([encoded.ids[: int(encoded.ends[len(rows) - 1])]])
        return cls(rows, filled, texts, encoded)

    def of_row(self, filled: Filled) -> dict[str, tuple[Ints, Ints]]:
        """The tokens of the text of one of these rows, and of its prompts; nothing where it is none of them."""
        place = next((at for at, one in enumerate(self.filled) if one is filled), None)
        if place is None:
            return {}
        turns = sum(len(one.layout.turns) for one in self.filled[:place])
        starts = filled.places[len(filled.layout.roles) :: 3]
        texts = [filled.text, *(filled.text[:start] for start in starts)]
        begins = [0, *self.encoded.ends.tolist()]
        found = {}
        for text, at in zip(texts, [place, *range(len(self.rows) + turns, len(begins))], strict=False):
            part = slice(begins[at], begins[at + 1])
            found[text] = self.encoded.ids[part], self.encoded.spans[part]
        return found

    def weighed(self, native: NativeRows, tokenizer: Tokenizer, *, longest: int | None) -> Batch:
        """The same rows with the role and the weight of each token; known are those of at most `longest` tokens."""
        ends = self.encoded.ends[: len(self.rows)].copy()
        count = int(ends[-1])
        ids, spans = self.encoded.ids, self.encoded.spans
        rows = Rows(ids[:count], spans[:count], np.empty(count, np.float32), ends)
        turns = self._turns(count)
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        made = native.weigh(rows, turns, stops=tokenizer.stop_ids, ends=tokenizer.specials.ends, bos=bos)
        known = made.known if longest is None else made.known & (np.diff(ends, prepend=0) <= longest)
        starts = np.diff(turns.prompt_ends, prepend=count).astype(np.int32)
        turn_ends = np.array(turns.answer_stops, np.int64)
        trained = np.add.reduceat(made.stops - starts + 1, turn_ends - np.diff(turn_ends, prepend=0))
        return Batch(self.rows, self.filled, self.texts, rows, made.roles, known, starts, turn_ends, trained.tolist())

    def _turns(self, count: int) -> Turns:
        bounds: list[int] = []
        bound_stops: list[int] = []
        endings: list[int] = []
        behinds: list[int] = []
        weights: list[float] = []
        answer_stops: list[int] = []
        for one in self.filled:
            messages = len(one.layout.roles)
            bounds += one.places[:messages]
            bound_stops.append(len(bounds))
            endings += one.places[messages + 1 :: 3]
            behinds += one.places[messages + 2 :: 3]
            weights += [turn.weight for turn in one.layout.turns]
            answer_stops.append(len(endings))
        return Turns(
            bounds=bounds,
            roles=b"".join([one.layout.roles for one in self.filled]),
            bound_stops=bound_stops,
            prompts=self.encoded.ids,
            prompt_start=count,
            prompt_ends=self.encoded.ends[len(self.rows) :].copy(),
            endings=endings,
            behinds=behinds,
            weights=weights,
            answer_stops=answer_stops,
        )


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Rows with their tokens, roles and weights; `known` says of which it is known that these are right.

    `starts` says at which token of its row each turn begins, `turn_ends` which turns a row has, `trained` how many of
    its tokens carry loss.
    """

    given: Sequence[Row]
    filled: Sequence[Filled]
    texts: Joined
    rows: Rows
    roles: NDArray[np.uint8]
    known: NDArray[np.bool_]
    starts: NDArray[np.int32]
    turn_ends: NDArray[np.int64]
    trained: Sequence[int]

    def __len__(self) -> int:
        return len(self.given)

    def views(self) -> list[Rendered]:
        """Each row as it is where it is known to be right."""
        ids, spans, weights, roles = self.rows.ids, self.rows.spans, self.rows.weights, self.roles
        found: list[Rendered] = []
        start = 0
        for row, one, end in zip(self.given, self.filled, self.rows.ends.tolist(), strict=True):
            part = slice(start, end)
            found.append(Rendered(row.number, one.text, ids[part], weights[part], roles[part], spans[part]))
            start = end
        return found
