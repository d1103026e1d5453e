"""Early warnings: what is odd about rows that are all valid, found before the first step, each with its cause.

Idea: rows pass by once. What concerns one row (an answer without content) is counted as it passes. What concerns
several (copies, leaks into the evaluation, one answer for everything) is found by comparing digests of eight bytes: of
the tokens, of the text without capitals and white space, and of what is trained. Two rows that differ have the same
digest with a chance of 1 in 2^64.

Use through `prepare` and `luthier data check`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import DataError
from luthier.core.units import percent_text
from luthier.data.rendering.batch import Batch
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import Renderer
from luthier.data.token_store import TokenStore
from luthier.kernels.rows import NativeRows, Rows
from luthier.kernels.words import Joined

SHOWN: Final = 3
"""Addresses that a warning names."""
SHORT: Final = 16
"""Tokens of an answer that is decoded to see whether they show anything; an invisible character may take three."""
COMMON_SHARE: Final = 0.5
"""Share of the rows with one answer above which that is worth a warning."""
_INVISIBLE: Final = frozenset("\u200b\u200c\u200d\u2060\ufeff")
_TEXT: Final = TOKEN_ROLES.index("text")
_KNOWN: Final = 4096
_END: Final = b"\xff\xff\xff\xff"
"""Where a view ends; no token has this id."""
Mask = NDArray[np.bool_]
Where = Callable[[int], str]
"""The address of a row by its place among the rows."""


def digests(views: Sequence[Rendered], rows: NativeRows | None = None) -> tuple[int, int, int]:
    """Digests of a row's tokens, of its text without capitals and white space, and of its trained tokens.

    Of most rows `rows` makes the same.
    """
    if rows is not None and len(views) == 1 and views[0].labels is None:
        (view,) = views
        one = Rows.of(view.tokens, view.spans, view.weights)
        if one is not None and view.text.isascii():
            return rows.marks(one, Joined.of([view.text]))[0]
    # Hashes that grow, since a text may be one row of many views.
    tokens, words, answer = blake2b(digest_size=8), blake2b(digest_size=8), blake2b(digest_size=8)
    for view in views:
        text = view.text[int(view.spans[0, 0]) : int(view.spans[-1, 1])]
        tokens.update(view.tokens.tobytes() + _END)
        words.update(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass") + b"\xff")
        learned = view.tokens if view.labels is None else view.labels
        answer.update(learned[view.weights > 0].tobytes() + _END)
    first, second, third = (int.from_bytes(one.digest(), "little") for one in (tokens, words, answer))
    return first, second, third


@final
class Noted(NamedTuple):
    """What is known of a row before it passes by: its digests, and whether it has one answer, which shows something."""

    marks: tuple[int, int, int]
    answers: bool


def noted(batch: Batch, renderer: Renderer) -> list[Noted]:
    """What is known of the rows of a batch; nothing where nothing is compiled."""
    rows = renderer.native_rows
    if rows is None:
        return []
    counts = rows.answer(batch.rows, renderer.stop_ids, renderer.tokenizer.special_ids)
    marks = rows.marks(batch.rows, batch.texts)
    return [Noted(each, count > SHORT) for each, count in zip(marks, counts, strict=True)]


@final
@dataclass(slots=True)
class Answers:
    """How many answers are trained, and how many of them are empty: control tokens and white space only."""

    trained: int = 0
    empty: int = 0
    first_empty: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values."""
        return asdict(self)

    def demand(self) -> None:
        """Raise DataError when every answer is empty."""
        if self.all_empty:
            raise self.flat()

    @property
    def all_empty(self) -> bool:
        return self.empty > 0 and self.empty == self.trained

    def flat(self) -> DataError:
        """The error for answers that are all empty: the loss would be flat from the first step on."""
        return DataError(
            f"all {self.empty:,} answers are empty: nothing is trained but the token that ends a turn, so the loss "
            "would be flat",
            allowed="answers with content, at least some",
            do="see what is left of an answer with: luthier data show FILE; look at the column of the answers "
            "(data.columns) and at data.template",
            where=self.first_empty[0] if self.first_empty else "",
        )

    def warnings(self) -> list[str]:
        """What to say of empty answers."""
        if not self.empty or self.all_empty:
            return []
        return [
            f"{self.empty:,} of {self.trained:,} answers ({percent_text(self.empty / self.trained)}) are empty, so "
            f"nothing of them is trained but the token that ends a turn (first: {', '.join(self.first_empty)}); take "
            "these rows out, or see what the template leaves of them with: luthier data show FILE"
        ]


@final
class Watch:
    """Counts the answers of rows that pass by."""

    def __init__(self, renderer: Renderer) -> None:
        self.answers = Answers()
        self._renderer = renderer
        self._known: dict[tuple[int, ...], bool] = {}

    def see(self, where: str, views: Sequence[Rendered], known: Noted | None = None) -> None:
        """Count the answers of one row. A text has none, and where everything is trained no loss hangs on them."""
        if known is not None and known.answers:
            self.answers.trained += 1
            return
        if self._renderer.train_on == "all" or self._renderer.kind == "encoder":
            return
        stops, rows = self._renderer.stop_ids, self._renderer.native_rows
        for view in views:
            if view.labels is not None or (len(view.roles) and view.roles[-1] == _TEXT):
                continue
            one = None if rows is None else Rows.of(view.tokens, view.spans, view.weights)
            if rows is not None and one is not None:
                specials = self._renderer.tokenizer.special_ids
                if rows.answer(one, stops, specials)[0] > SHORT:
                    self.answers.trained += 1  # nearly always: one answer, and one that shows something
                    continue
            content: list[int] = []
            trained = view.tokens[view.weights > 0].tolist()
            if trained and trained[-1] in stops and stops.isdisjoint(trained[:-1]):
                # Most rows: one answer.
                self._count(where, trained[:-1])
                continue
            for token in trained:
                if token in stops:
                    self._count(where, content)
                    content = []
                else:
                    content.append(token)
            if content:
                self._count(where, content)

    def _count(self, where: str, content: Sequence[int]) -> None:
        found = self.answers
        found.trained += 1
        if not self._is_empty(content):
            return
        found.empty += 1
        if len(found.first_empty) < SHOWN and where not in found.first_empty:
            found.first_empty.append(where)

    def _is_empty(self, content: Sequence[int]) -> bool:
        tokenizer = self._renderer.tokenizer
        if len(content) > SHORT and not tokenizer.special_ids.issuperset(content):
            return False
        key = tuple(content)
        if key not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            text = tokenizer.decode([token for token in content if token not in tokenizer.special_ids])
            self._known[key] = all(char.isspace() or char in _INVISIBLE for char in text)
        return self._known[key]


def prompts(store: TokenStore, records: NDArray[np.void]) -> NDArray[np.uint64]:
    """For each row a digest of what stands before its first trained token; of the whole row where nothing does."""
    found = np.array(records["tokens"])
    first = np.searchsorted(store.rows, records["row"])
    for index, view in enumerate(first.tolist()):
        start, end = int(store.offsets[view]), int(store.offsets[view + 1])
        trained = np.flatnonzero(store.weights[start:end] > 0)
        # A text is trained from its second token on: the first one is no prompt.
        if len(trained) and trained[0] > 1:
            said = np.ascontiguousarray(store.tokens[start : start + int(trained[0])])
            found[index] = int.from_bytes(blake2b(said.tobytes(), digest_size=8).digest(), "little")
    return found


def groups(records: NDArray[np.void], alike: NDArray[np.uint64] | None = None) -> NDArray[np.int64] | None:
    """For each row the first one of which it is a copy, in tokens or in text; None when there is no copy at all.

    Rows that agree in `alike` are in one group too.
    """
    columns = [np.unique(records[name], return_inverse=True)[1] for name in ("tokens", "text")]
    columns += [] if alike is None else [np.unique(alike, return_inverse=True)[1]]
    if all(len(column) == 0 or int(column.max()) + 1 == len(records) for column in columns):
        return None
    label = np.arange(len(records))
    while True:
        before = label
        for column in columns:
            least = np.full(len(records), len(records))
            np.minimum.at(least, column, label)
            label = least[column]
        if np.array_equal(before, label):
            return label


def warnings(
    records: NDArray[np.void], held: Mask, train: Mask, where: Where, *, chat: bool, classes: bool = False
) -> list[str]:
    """What to say of `held` out and `train`ed rows that are alike.

    `chat` says that rows have answers, `classes` that they have classes.
    """
    return [
        *_leaks(records, held, train, where),
        *_copies(records, train, where),
        *(_contradictions(records, where) if classes else []),
        *(_common(records, train, where) if chat else []),
    ]


def _leaks(records: NDArray[np.void], held: Mask, train: Mask, where: Where) -> list[str]:
    exact = _known_in(records["tokens"], held, train)
    either = exact | _known_in(records["text"], held, train)
    count, total = int(either.sum()), int(held.sum())
    if not count:
        return []
    pairs = []
    for index in np.flatnonzero(either)[:SHOWN]:
        name = "tokens" if exact[index] else "text"
        twin = int(np.flatnonzero(train & (records[name] == records[name][index]))[0])
        pairs.append(f"{where(int(index))} = {where(twin)}")
    return [
        f"{count:,} of {total:,} evaluation rows ({percent_text(count / total)}) are training rows too, "
        f"{_how_alike(int(exact.sum()), count)} (first: {', '.join(pairs)}): "
        "the held-out loss will look better than it is; take them out of one of the two"
    ]


def _how_alike(exact: int, count: int) -> str:
    if exact == count:
        return "token for token"
    return f"{exact:,} of them token for token, the others but for white space and capitals"


def _known_in(column: NDArray[np.uint64], held: Mask, train: Mask) -> Mask:
    """The held-out rows that are among the trained ones."""
    found = np.zeros(len(column), np.bool_)
    found[held] = np.isin(column[held], column[train])
    return found


def _copies(records: NDArray[np.void], among: Mask, where: Where) -> list[str]:
    places = np.flatnonzero(among)
    exact, first, original = _repeats(records["tokens"][places])
    either, like, like_original = _repeats(records["text"][places])
    count = max(exact, either)
    if not count:
        return []
    one, two = (first, original) if exact else (like, like_original)
    return [
        f"{count:,} of {len(places):,} training rows ({percent_text(count / len(places))}) repeat an earlier one, "
        f"{_how_alike(exact, count)} (first: {where(int(places[one]))} = {where(int(places[two]))}); "
        "each copy counts in the loss again"
    ]


def _contradictions(records: NDArray[np.void], where: Where) -> list[str]:
    """Rows with the same tokens and another class."""
    _, first, group = np.unique(records["tokens"], return_index=True, return_inverse=True)
    odd = np.flatnonzero(records["answer"] != records["answer"][first[group]])
    if not len(odd):
        return []
    one, two = where(int(odd[0])), where(int(first[group[odd[0]]]))
    return [
        f"{len(odd):,} {'row says' if len(odd) == 1 else 'rows say'} what another one says and "
        f"{'has' if len(odd) == 1 else 'have'} another class (first: {one} = {two}); no model can learn both"
    ]


def _repeats(column: NDArray[np.uint64]) -> tuple[int, int, int]:
    """How many values came before, and the place of the first that did, with the place where it came before."""
    order = np.argsort(column, kind="stable")
    same = np.flatnonzero(column[order][1:] == column[order][:-1])
    if not len(same):
        return 0, 0, 0
    at = int(same[np.argmin(order[same + 1])])
    return len(same), int(order[at + 1]), int(order[at])


def _common(records: NDArray[np.void], among: Mask, where: Where) -> list[str]:
    places = np.flatnonzero(among)
    _, first, counts = np.unique(records["answer"][places], return_index=True, return_counts=True)
    most = int(np.argmax(counts)) if len(counts) else 0
    if not len(counts) or counts[most] < 2 or counts[most] <= COMMON_SHARE * len(places):
        return []
    return [
        f"{int(counts[most]):,} of {len(places):,} training rows ({percent_text(counts[most] / len(places))}) have one "
        f"and the same answer (first: {where(int(places[first[most]]))}): the model may learn to say it to everything"
    ]
