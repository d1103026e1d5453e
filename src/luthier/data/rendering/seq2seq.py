"""Rows for an encoder-decoder: the source as the encoder reads it, and behind it what the decoder shall say.

Idea: no chat template: what was said before the last answer is the source, its parts a blank line apart; the answer is
the target. Both get the control tokens of the tokenizer's own post-processor. A target begins with the token that a
decoder starts with, which is context, and ends in the end-of-text token, which is trained. Of a choice all answers are
targets, each of its own, and their roles say which is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Choices, Content, Conversation, Labelled, Message, Row
from luthier.data.forest import Ints
from luthier.data.rendering.marked import JOINT, NOBODY, Marked, mark
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import OverLength, Renderer, Staged, Stages, TrainOn, refused
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer

BETWEEN = "\n\n"
"""What stands between the turns of a source."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is read and what is to be said.

    `parts` are the texts of the source, each with its role, and `joint` what stands between them; `right` is the place
    of the right answer among `targets`.
    """

    parts: tuple[tuple[str, str], ...]
    joint: str
    targets: tuple[str, ...]
    right: int = 0
    weight: float = 1.0

    @property
    def source(self) -> str:
        return self.joint.join(text for text, _ in self.parts)


@final
class Seq2SeqRenderer(Renderer):
    """Rows to tokens for an encoder-decoder; `start_id` is the token that a decoder starts with."""

    kind = "seq2seq"
    takes = ("conversation", "labelled", "choices")

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        start_id: int,
        train_on: TrainOn = "answers",
        over_length: OverLength = "raise",
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(tokenizer, template, train_on=train_on, over_length=over_length, max_tokens=max_tokens)
        if train_on == "all":
            raise RecipeError(
                "data.train_on is 'all'",
                allowed="answers or last: an encoder-decoder reads what comes before the last answer and says that",
            )
        if not 0 <= start_id < tokenizer.vocabulary_size:
            raise RecipeError(
                f"a decoder that starts with token {start_id}",
                allowed=f"a token from 0 to {tokenizer.vocabulary_size - 1}",
            )
        self.start_id = start_id
        self._ahead: dict[str, Marked] = {}

    @property
    def state(self) -> dict[str, Any]:
        """All that the tokens of a row depend on, besides the row."""
        return {**super().state, "start_id": self.start_id}

    def encode_ahead(self, staged: Sequence[Staged]) -> None:
        """Make the tokens of all sources and targets at once."""
        texts: dict[str, None] = {}
        for one in staged:
            try:
                task = task_of(one.row, self)
            except DataError:
                continue  # it is said when the row's turn comes
            texts.update(dict.fromkeys([task.source, *task.targets]))
        self._ahead = {}
        self._ahead = dict(zip(texts, mark(self.tokenizer, [(text, "") for text in texts]), strict=True))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        """The source that the encoder reads; the decoder then starts with `start_id`."""
        parts = _turns(messages, tools)
        return self._marked(BETWEEN.join(text for text, _ in parts)).ids

    def _views(self, row: Row, ready: Stages | Content) -> list[Rendered]:
        task = task_of(row, self)
        if isinstance(row.content, Conversation):
            self._notice_turns(row.content)
        for text in (task.source, *task.targets):
            self._notice_controls(text)
        source = self._marked(task.source)
        if not source.has(0):
            raise DataError(
                "what is read has no token",
                allowed="a text that the tokenizer can write",
                do="take the row out; it holds signs that this tokenizer leaves out",
            )
        targets = [self._target(text) for text in task.targets]
        # The decoder has positions of its own, so source and targets are measured each for itself.
        longest = 1 + max(len(target) for target in targets)
        fate = self._fate(row, longest, "the answer")
        if fate == "cut":
            self.counts.answers_too_long += 1
        if fate != "fits":
            return []
        fate = self._fate(row, len(source), "what is read")
        if fate == "dropped":
            return []
        if fate == "cut" and self.max_tokens is not None:
            self.counts.truncated += 1
            source = source.shortened(self.max_tokens)
        return [self._joined(row, task, source, targets)]

    def _notice_turns(self, conversation: Conversation) -> None:
        roles = [message.role for message in conversation.messages]
        if roles.count("assistant") > 1:
            self._notice("an earlier answer of a conversation is read, not trained: an encoder-decoder says the last")
        if roles[-1] != "assistant":
            self._notice("what follows the last answer of a conversation is not read")

    def _marked(self, text: str) -> Marked:
        return self._ahead.get(text) or mark(self.tokenizer, [(text, "")])[0]

    def _target(self, text: str) -> Marked:
        """The tokens of an answer, which have to end in one control token at which generation stops."""
        made = self._marked(text)
        if not made.has(0):
            raise DataError("the answer has no token", allowed="an answer that the tokenizer can write")
        last = int(made.ids[-1])
        if made.sides[-1] != NOBODY or last not in self.tokenizer.specials.ends | self.tokenizer.stop_ids:
            raise DataError(
                "the tokenizer puts no end behind a text, so the model would learn answers that never stop",
                allowed="a tokenizer with a post-processor that ends in a token such as </s>",
                do="choose another model, or save the tokenizer with its post-processor",
            )
        if np.count_nonzero(made.ids == last) > 1:
            raise DataError(
                f"the answer contains {self.tokenizer.token_text(last)!r}, at which generation stops",
                do="take that text out of the answer",
            )
        if last not in self.tokenizer.stop_ids and last not in self._found_stops:
            self._found_stops.add(last)
            self._notice(
                f"{self.tokenizer.token_text(last)!r} ends answers but is no stop token of the model; it is added"
            )
        return made

    def _joined(self, row: Row, task: Task, source: Marked, targets: Sequence[Marked]) -> Rendered:
        """One view: the source, then each target behind the token that a decoder starts with."""
        ids, spans, weights = [source.ids], [source.spans], [np.zeros(len(source), np.float32)]
        roles = [_source_roles(task, source)]
        text = task.source
        for place, target in enumerate(targets):
            text += JOINT
            name = "assistant" if place == task.right else "wrong"
            ids += [np.array([self.start_id], np.int32), target.ids]
            spans += [np.full((1, 2), len(text), np.int32), target.spans + np.int32(len(text))]
            weights += [np.zeros(1, np.float32), np.full(len(target), task.weight, np.float32)]
            start = np.array([TOKEN_ROLES.index("template")], np.uint8)
            roles += [start, np.full(len(target), TOKEN_ROLES.index(name), np.uint8)]
            text += task.targets[place]
        return Rendered(
            row.number,
            text,
            np.concatenate(ids),
            np.concatenate(weights),
            np.concatenate(roles),
            np.concatenate(spans).astype(np.int32),
        )


def task_of(row: Row, renderer: Renderer) -> Task:
    """What a row asks and what is to be answered. Raises DataError for rows that cannot be read so."""
    content = row.content
    if isinstance(content, Labelled):
        parts = ((content.text, "user"), *(((content.pair, "pair"),) if content.pair else ()))
        return Task(parts, JOINT, (content.label,))
    if isinstance(content, Choices):
        return Task(((content.prompt, "user"),), BETWEEN, content.answers, content.right)
    if isinstance(content, Conversation):
        answers = [index for index, message in enumerate(content.messages) if message.role == "assistant"]
        if not answers:
            raise DataError("the conversation has no answer", allowed="an assistant message")
        last = content.messages[answers[-1]]
        if last.tool_calls:
            raise _no_tools("the last answer calls a tool")
        parts = _turns(content.messages[: answers[-1]], content.tools)
        return Task(parts, BETWEEN, (last.content,), weight=1.0 if last.weight is None else last.weight)
    raise refused(row, renderer)


def _turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """The texts of a source and their roles: what is not the system's is read, whoever said it once."""
    if tools or any(message.tool_calls for message in messages):
        raise _no_tools("the conversation uses tools")
    roles = ((message, "system" if message.role == "system" else "user") for message in messages)
    parts = tuple((message.content, role) for message, role in roles if message.content.strip())
    if not parts:
        raise DataError("nothing is said before the answer", allowed="a message that the answer is to")
    return parts


def _no_tools(found: str) -> DataError:
    return DataError(
        found,
        allowed="texts: an encoder-decoder is given no chat template that could show tools",
        do="write calls and results as text into the messages",
    )


def _source_roles(task: Task, source: Marked) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Whose words each token of the source is."""
    ends = np.cumsum([len(text) + len(task.joint) for text, _ in task.parts])
    names = np.array([TOKEN_ROLES.index(role) for _, role in task.parts], np.uint8)
    roles = names[np.minimum(np.searchsorted(ends, source.spans[:, 0], side="right"), len(ends) - 1)]
    return np.where(source.sides == NOBODY, TOKEN_ROLES.index("template"), roles).astype(np.uint8)
