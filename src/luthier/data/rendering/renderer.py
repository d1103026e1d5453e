"""What the renderers of all kinds of models share: rows come staged, leave as views, and everything is counted.

Idea: which tokens a row becomes depends on what the model is: a causal decoder (`causal.py`), an encoder
(`encoder.py`), an encoder-decoder (`seq2seq.py`). What is asked of them is the same: views of a row, or its error with
an address; what was counted, and how to take a row's share back; the classes that were seen; what a prompt looks like.

Use it through `render`; for many rows: stage each, foresee all of them at once (`ask` may be in another thread),
encode and weigh all of them ahead, and finish each in its turn, or accept it where it is known to be right.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, get_args

from luthier.core.errors import DataError, MissingError, RecipeError, TemplateError
from luthier.data.conversation import Content, Meaning, Message, Row
from luthier.data.forest import Ints
from luthier.data.rendering.batch import Batch
from luthier.data.rendering.classes import Classes
from luthier.data.rendering.counts import RenderCounts
from luthier.data.rendering.layout import Filled
from luthier.data.rendering.outline import Asked, Outlines
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.template import Template
from luthier.data.rendering.turns import TRIMS, Stage, placed, said_of
from luthier.data.tokenizer import Tokenizer
from luthier.kernels.rows import NativeRows
from luthier.kernels.words import is_compiled

RENDERER_VERSION = 1
"""Goes up whenever the same row may become other tokens, so that cached tokens are made again."""

Kind = Literal["causal", "encoder", "seq2seq"]
MODELS: Mapping[Kind, str] = {
    "causal": "a causal decoder",
    "encoder": "an encoder",
    "seq2seq": "an encoder-decoder",
}
TrainOn = Literal["answers", "last", "all"]
OverLength = Literal["raise", "drop", "truncate"]

MIN_TOKENS = 16
"""The least that `max_tokens` may be: BOS, and two whole characters of four bytes each, with some room."""


_LOOK: Final = 64
_LOOK_AGAIN: Final = 1024
"""Rows after which it is looked whether the C++ is compiled, and rows until it is looked again."""

Stages = tuple[Stage, ...]


class TooLongError(DataError):
    """A row of too many tokens under `over_length: raise`."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A row on its way: ready to be finished, or the error that stands for it, and the notices given so far."""

    row: Row
    ready: Stages | Filled | Content | DataError
    told: Sequence[tuple[str, str]]

    @property
    def stages(self) -> Stages:
        """What the template will be asked for: one conversation, one for each answer to a prompt, or none.

        None too for a conversation that is laid out already.
        """
        return self.ready if isinstance(self.ready, tuple) else ()


class Renderer(ABC):
    """Rows to tokens for one tokenizer. `template` stays empty and unasked where no chat is rendered."""

    kind: ClassVar[Kind]
    takes: ClassVar[tuple[Meaning, ...]]
    """What a row may mean for this kind of model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        train_on: TrainOn = "answers",
        over_length: OverLength = "raise",
        max_tokens: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        _one_of(train_on, get_args(TrainOn), "data.train_on")
        _one_of(over_length, get_args(OverLength), "data.over_length")
        if max_tokens is not None and max_tokens < MIN_TOKENS:
            raise RecipeError(f"max_tokens is {max_tokens}", allowed=f"at least {MIN_TOKENS}", where="data.max_tokens")
        self.tokenizer = tokenizer
        self.template = template
        self.train_on = train_on
        self.over_length = over_length
        self.max_tokens = max_tokens
        self._outlines = Outlines(template)
        self.counts = RenderCounts()
        self.classes = Classes(classes)
        self.bos_text = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
        self._found_stops: set[int] = set()
        self._before = (self.counts, self._found_stops, len(self.classes))
        self._now: Staged | None = None
        self._rows: NativeRows | None = None
        self._look = _LOOK
        self._staged_rows = 0

    @property
    def native_rows(self) -> NativeRows | None:
        """What is worked out of rows in C++, once there are many rows, where that is compiled."""
        if self._rows is None and self._staged_rows >= self._look:
            self._look = self._staged_rows + _LOOK_AGAIN
            try:
                self._rows = NativeRows.build() if is_compiled() else None
            except MissingError:
                self._look = sys.maxsize  # the twins in Python do the same, slower
        return self._rows

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where generation has to stop: the tokenizer's own, and those that ended a trained turn so far."""
        return self.tokenizer.stop_ids | self._found_stops

    @property
    def state(self) -> dict[str, Any]:
        """All that the tokens of a row depend on, besides the row."""
        return {
            "renderer": RENDERER_VERSION,
            "tokenizer": self.tokenizer.digest,
            "template": self.template.digest,
            "train_on": self.train_on,
            "over_length": self.over_length,
            "max_tokens": self.max_tokens,
            # Only what is not the rule: the tokens of a causal decoder keep the key that they had before there were
            # others.
            **({} if self.kind == "causal" else {"kind": self.kind}),
            **({"classes": list(self.classes.names)} if self.classes.given else {}),
        }

    def recall(self, counts: RenderCounts, stop_ids: frozenset[int]) -> None:
        """Take over what an earlier rendering of the same rows counted and found, in place of rendering them again."""
        self.counts = counts
        self._found_stops |= stop_ids - self.tokenizer.stop_ids

    def render(self, row: Row) -> list[Rendered]:
        """The views of `row`: one; several where history is rewritten or a text is long; none when it is dropped."""
        staged = self.apart(self.stage(row))
        self.foresee([staged])
        self.encode_ahead([staged])
        made = self.finish(staged)
        if isinstance(made, DataError):
            raise made
        return made

    def stage(self, row: Row) -> Staged:
        """The row as the template gets it, or why it cannot get it, and what there is to notice about that."""
        self._staged_rows += 1
        return Staged(row, row.content, ())

    def foresee(self, staged: Sequence[Staged]) -> None:
        """Make what these rows will need of the template, once, ahead."""
        self.ask(self.fill(staged))

    def fill(self, staged: Sequence[Staged]) -> list[Asked]:
        """Hand these rows all that outlines say (see `outline.py`). Returns what the template has to be asked for."""
        asked = self._outlines.give(stage for one in staged for stage in one.stages)
        self.learn(staged)
        return asked

    def learn(self, staged: Sequence[Staged]) -> None:
        """See what the outlines of these rows say of all rows like them; nothing, where no chat is rendered."""
        return

    def ask(self, asked: Sequence[Asked]) -> None:
        """Hand rows what the template makes of them."""
        try:
            outcomes = self.template.render_many([wanted for _, _, wanted in asked]) if asked else []
        except TemplateError:
            outcomes = []  # a row that cannot be sent at all says so when its turn comes, and hides no other
        for (stage, place, _), outcome in zip(asked, outcomes, strict=False):
            stage.take(place, outcome)

    @abstractmethod
    def encode_ahead(self, staged: Sequence[Staged]) -> None:
        """Make the tokens of all texts that these rows are known to need, at once; kept until the next call."""

    def weigh_ahead(self) -> Batch | None:
        """The rows that were encoded last and are laid out, with all that is known of them; None where there are none.

        Each of them may be accepted or finished.
        """
        return None

    def accept(self, row: Row, filled: Filled, tokens: int, trained: int) -> None:
        """Count a row that was made ahead and is right."""
        counts = self.counts
        counts.rows += 1
        counts.views += 1
        counts.tokens += tokens
        counts.trained_tokens += trained
        for message in filled.trimmed:
            example = "" if TRIMS in counts.examples else said_of(message, filled.contents[message])
            counts.notice(TRIMS, (row.where, example))

    def apart(self, staged: Staged) -> Staged:
        """The row staged so that it can be finished by itself."""
        return staged

    def finish(self, staged: Staged) -> list[Rendered] | DataError:
        """The views of a staged row, or why there are none."""
        staged = self.apart(staged)
        row, ready = staged.row, staged.ready
        # Whoever refuses the row later takes its counts back.
        self._before = (self.counts.copy(), set(self._found_stops), len(self.classes))
        self._now = staged
        for text, example in staged.told:
            self._notice(text, example)
        if isinstance(ready, DataError):
            return ready
        try:
            made = [] if isinstance(ready, Filled) else self._views(row, ready)
        except DataError as error:
            return error if error.where == row.where else placed(error, row.where)
        self.counts.rows += 1
        for view in made:
            self.counts.views += 1
            self.counts.tokens += len(view.tokens)
            self.counts.trained_tokens += view.trained_count
        return made

    def take_back(self) -> None:
        """Forget what the row rendered last has added to the counts, the stop tokens and the classes: it is refused."""
        self.counts, self._found_stops, classes = self._before
        self.classes.forget_after(classes)

    @abstractmethod
    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        """What inference feeds to get the answer that follows `messages`."""

    @abstractmethod
    def _views(self, row: Row, ready: Stages | Content) -> list[Rendered]:
        """The views of a row that was staged. Raises DataError where there can be none."""

    def _notice(self, text: str, example: str = "") -> None:
        self.counts.notice(text, (self._now.row.where if self._now is not None else "", example))

    def _notice_controls(self, text: str) -> None:
        if self.tokenizer.specials.within(text):
            self._notice("a text contains the text of a control token, which is read as that token")

    def _fate(self, row: Row, count: int, what: str) -> Literal["fits", "dropped", "cut"]:
        """What `over_length` says of `count` tokens; a row that it drops is counted. Raises TooLongError."""
        limit = self.max_tokens
        if limit is None or count <= limit:
            return "fits"
        if self.over_length == "raise":
            raise TooLongError(
                f"{what} has {count} tokens",
                allowed=f"at most {limit}",
                do="set data.over_length to drop or to truncate; data.max_tokens may be as much as the model's context",
                where=row.where,
            )
        if self.over_length == "drop":
            self.counts.dropped += 1
            return "dropped"
        return "cut"


def refused(row: Row, renderer: Renderer) -> DataError:
    """The error for a row that means something this kind of model cannot be given."""
    meaning = type(row.content).__name__.lower()
    return DataError(
        f"the row is read as {meaning}, which {MODELS[renderer.kind]} cannot be given",
        allowed=" | ".join(renderer.takes),
        do="choose another format (data.format) or name the columns (data.columns); for such rows train another model",
    )


def _one_of(value: str, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        raise RecipeError(f"{value!r}", allowed=" or ".join(allowed), where=where)
