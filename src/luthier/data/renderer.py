"""The one way from a row to tokens: ids, roles, spans and loss weights in one pass.

Idea: what is trained follows from renderings (`turns.py`) and from token ids that are compared, never from marker
strings. A trained turn is everything that the model has to say after what inference shows it, up to and including the
one token that ends the turn; what the template writes after that token is context. The ids of each prompt are a prefix
of the ids of its row, because that is what inference will feed. What cannot be made so is refused with its address.

Use it through `render`; `prompt_ids` is what generation feeds; `stop_ids` is where generation has to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final, get_args

import numpy as np

from luthier.core.errors import DataError, RecipeError, TemplateError
from luthier.data.conversation import Conversation, Message, Row, Text
from luthier.data.forest import Floats, Ints
from luthier.data.rendered import TOKEN_ROLES, Rendered
from luthier.data.template import Template
from luthier.data.tokenizer import Tokenizer
from luthier.data.turns import Answer, Shown, View, lay_out, placed, show

RENDERER_VERSION = 1
"""Goes up whenever the same row may become other tokens, so that cached tokens are made again."""

TrainOn = Literal["answers", "last", "all"]
OverLength = Literal["raise", "drop", "truncate"]

MIN_TOKENS = 16
"""The least that `max_tokens` may be: BOS, and two whole characters of four bytes each, with some room."""


@final
@dataclass(slots=True)
class RenderCounts:
    """What rendering did so far. `answers_too_long` are views dropped because not even their answer fits."""

    rows: int = 0
    views: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: int = 0
    answers_too_long: int = 0
    truncated: int = 0
    notices: dict[str, int] = field(default_factory=dict)

    def notice(self, text: str) -> None:
        self.notices[text] = self.notices.get(text, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Trained:
    """The tokens [start, stop) of a trained turn, its stop token last."""

    start: int
    stop: int
    weight: float


@final
class Renderer:
    """Rows to tokens for one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        train_on: TrainOn = "answers",
        over_length: OverLength = "raise",
        max_tokens: int | None = None,
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
        self.counts = RenderCounts()
        self._found_stops: set[int] = set()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Where generation has to stop: the tokenizer's own, and those that ended a trained turn so far."""
        return self.tokenizer.stop_ids | self._found_stops

    def recall(self, counts: RenderCounts, stop_ids: frozenset[int]) -> None:
        """Take over what an earlier rendering of the same rows counted and found, in place of rendering them again."""
        self.counts = counts
        self._found_stops |= stop_ids - self.tokenizer.stop_ids

    def render(self, row: Row) -> list[Rendered]:
        """The views of `row`: one; several where history is rewritten or a text is long; none when it is dropped."""
        try:
            made = self._text(row, row.content) if isinstance(row.content, Text) else self._talk(row, row.content)
        except DataError as error:
            raise error if error.where == row.where else placed(error, row.where) from error
        self.counts.rows += 1
        for view in made:
            self.counts.views += 1
            self.counts.tokens += len(view.tokens)
            self.counts.trained_tokens += view.trained_count
        return made

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        """What inference feeds to get the answer that follows `messages`."""
        shown = show(Conversation(tuple(messages), tuple(tools)), self.template, _quiet)
        fields = [message.fields for message in shown]
        text = self.template.render(fields, tools=tools, add_generation_prompt=True)
        return self._encode(text, _quiet)[0]

    # Conversations

    def _talk(self, row: Row, conversation: Conversation) -> list[Rendered]:
        if not conversation.messages:
            raise DataError("the conversation has no message")
        for message in conversation.messages:
            if len(self.tokenizer.specials.split(message.content)) > 1:
                self.counts.notice("a message contains the text of a control token, which is read as that token")
        shown = show(conversation, self.template, self.counts.notice)
        weights = self._turn_weights(shown)
        views = lay_out(shown, self.template, tools=conversation.tools, weights=weights, notice=self.counts.notice)
        if self.train_on == "all":
            # Only the last view holds the whole conversation; earlier ones would train its words twice.
            views = views[-1:]
        made: list[Rendered] = []
        for view in views:
            for rendered, trained in self._tokens(row, view, shown):
                made.extend(self._fit(row, rendered, trained))
        return made

    def _turn_weights(self, shown: Sequence[Shown]) -> dict[int, float]:
        """The trained turns and their weights; a weight in the row goes before `train_on`."""
        answers = [index for index, message in enumerate(shown) if message.role == "assistant"]
        weights: dict[int, float] = {}
        for index in answers:
            own = shown[index].weight
            weight = (0.0 if self.train_on == "last" and index != answers[-1] else 1.0) if own is None else own
            if weight > 0:
                weights[index] = weight
        return weights

    def _tokens(self, row: Row, view: View, shown: Sequence[Shown]) -> list[tuple[Rendered, list[_Trained]]]:
        notice = self.counts.notice
        tokens, spans = self._encode(view.text, notice)
        starts: list[int] = []
        for answer in view.answers:
            prompt = self._encode(view.text[: answer.start], _quiet)[0]
            if not np.array_equal(tokens[: len(prompt)], prompt):
                break
            starts.append(len(prompt))
        if len(starts) < len(view.answers):
            if len(view.answers) > 1:
                # Each answer then follows exactly the ids that inference feeds, history included.
                notice("a token would straddle the start of an answer: one view for each answer")
                alone = [view.alone(answer) for answer in view.answers]
                alone = alone[-1:] if self.train_on == "all" else alone
                return [made for one in alone for made in self._tokens(row, one, shown)]
            tokens, spans, starts = self._in_two(view)
        trained = [
            self._trained(tokens, spans, answer, start) for answer, start in zip(view.answers, starts, strict=True)
        ]
        roles = _roles(spans, view, shown)
        weights = np.zeros(len(tokens), np.float32)
        if self.train_on == "all":
            weights = _message_weights(spans, view, shown)
        for turn in trained:
            weights[turn.start : turn.stop] = turn.weight
        if len(weights):
            weights[0] = 0.0
        if self.tokenizer.bos_id is not None and self.tokenizer.adds_bos:
            weights[: _lead(tokens, self.tokenizer.bos_id)] = 0.0
        return [(Rendered(row.number, view.text, tokens, weights, roles, spans), trained)]

    def _in_two(self, view: View) -> tuple[Ints, Ints, list[int]]:
        """Prompt and answer encoded apart, where a token of the whole text would straddle the boundary."""
        answer = view.answers[0]
        prompt, prompt_spans = self._encode(view.text[: answer.start], _quiet)
        rest = self.tokenizer.encode_after(prompt, view.text[answer.start :])
        if rest is None:
            raise TemplateError(
                f"the answer of message {answer.message + 1} has no encoding that continues its prompt",
                do="choose another template with data.template",
            )
        self.counts.notice("prompt and answer were encoded apart: a token would straddle the start of the answer")
        tokens = np.concatenate([prompt, rest[0]])
        return tokens, np.concatenate([prompt_spans, rest[1] + answer.start]).astype(np.int32), [len(prompt)]

    def _trained(self, tokens: Ints, spans: Ints, answer: Answer, start: int) -> _Trained:
        """The token range of an answer up to its stop token; refused when there is no such token."""
        ids = self.tokenizer
        end = start
        while end < len(tokens) and spans[end, 0] < answer.stop:
            end += 1
        tail = [index for index in range(start, end) if spans[index, 0] >= answer.ending]
        known = [index for index in tail if int(tokens[index]) in ids.stop_ids]
        special = [index for index in tail if int(tokens[index]) in ids.stop_ids | ids.specials.ends]
        if not special:
            # An answer that ends in nothing teaches a model that never stops.
            text = ids.decode(tokens[tail])
            raise TemplateError(
                f"the answer of message {answer.message + 1} ends in "
                + (f"{text!r}, which is no single control token of this tokenizer" if text else "nothing"),
                allowed="an answer that ends in the end-of-text token or another control token",
                do="choose another template with data.template (such as instruction), or add the token as a special "
                "token to the tokenizer",
            )
        # Tool calls may close with control tokens of their own before the turn ends.
        at = (known[0] if known else special[-1]) if answer.calls else special[0]
        stop = int(tokens[at])
        for index in range(start, at):
            if int(tokens[index]) in ids.stop_ids or int(tokens[index]) == stop:
                raise DataError(
                    f"the answer of message {answer.message + 1} contains {ids.token_text(int(tokens[index]))!r}, "
                    "at which generation stops",
                    do="take that text out of the answer, or choose a template with another end of turn",
                )
        if stop not in ids.stop_ids:
            self._found_stops.add(stop)
            self.counts.notice(f"{ids.token_text(stop)!r} ends answers but is no stop token of the model; it is added")
        return _Trained(start, at + 1, answer.weight)

    # Length

    def _fit(self, row: Row, view: Rendered, trained: Sequence[_Trained]) -> list[Rendered]:
        """`view` if it is not too long, and otherwise what `over_length` makes of it."""
        limit = self.max_tokens
        if limit is None or len(view.tokens) <= limit:
            return [view]
        if self.over_length == "raise":
            raise DataError(
                f"the conversation has {len(view.tokens)} tokens",
                allowed=f"at most {limit}",
                do="raise data.max_tokens, or set data.over_length to drop or to truncate",
                where=row.where,
            )
        if self.over_length == "drop" or not trained:
            self.counts.dropped += 1
            return []
        return self._cut(view, trained, limit)

    def _cut(self, view: Rendered, trained: Sequence[_Trained], limit: int) -> list[Rendered]:
        """The last `limit` tokens up to the last trained one, behind BOS; nothing when the answer does not fit."""
        bos = self.tokenizer.bos_id
        head = _lead(view.tokens, bos) if bos is not None and self.tokenizer.adds_bos else 0
        stop = trained[-1].stop
        start = max(stop - (limit - head), head)
        while head < start < stop and view.spans[start, 0] < view.spans[start - 1, 1]:
            start += 1  # not in the middle of a character
        # Without BOS one token of context must stay: the first token of an answer needs something that predicts it.
        first = start if head else start + 1
        if trained[-1].start < first:
            self.counts.answers_too_long += 1
            return []
        weights = view.weights.copy()
        for turn in trained[:-1]:
            if turn.start < first:
                weights[turn.start : turn.stop] = 0.0
                self.counts.notice("an earlier answer was cut away by truncation")
        keep = np.concatenate([np.arange(head), np.arange(start, stop)])
        weights = weights[keep]
        weights[: max(head, 1)] = 0.0
        self.counts.truncated += 1
        return [Rendered(view.row, view.text, view.tokens[keep], weights, view.roles[keep], view.spans[keep])]

    # Texts

    def _text(self, row: Row, content: Text) -> list[Rendered]:
        """A document: all of it trained once, in consecutive chunks when it is long."""
        text = content.text
        tokens, spans = self.tokenizer.encode(text)
        spans = _closed(spans, text)
        bos = np.array([self.tokenizer.bos_id], np.int32) if self.tokenizer.adds_bos else np.zeros(0, np.int32)
        if len(bos) and len(tokens) and tokens[0] == bos[0]:
            tokens, spans = tokens[1:], spans[1:]
        eos = self.tokenizer.eos_id
        if eos is None:
            self.counts.notice("the tokenizer has no end-of-text token, so texts end without one")
        elif not len(tokens) or tokens[-1] != eos:
            tokens = np.append(tokens, np.int32(eos))
            spans = np.concatenate([spans, np.full((1, 2), len(text), np.int32)])
        made: list[Rendered] = []
        start = 0
        while start < len(tokens):
            # The chunk before hands over its last character, unweighted, so that every token is predicted once.
            before = max(_whole_character(spans, start - 1), start - 4) if start else 0
            room = (self.max_tokens or len(tokens) + 1) - len(bos) - (start - before)
            stop = len(tokens) if start + room >= len(tokens) else _whole_character(spans, start + room)
            stop = stop if stop > start else start + room
            weights = np.ones(len(bos) + stop - before, np.float32)
            weights[: max(len(bos) + start - before, 1 if start == 0 else 0)] = 0.0
            marks = np.full((len(bos), 2), spans[before, 0], np.int32)
            roles = np.full(len(weights), TOKEN_ROLES.index("text"), np.uint8)
            roles[: len(bos)] = TOKEN_ROLES.index("template")
            ids = np.concatenate([bos, tokens[before:stop]])
            made.append(Rendered(row.number, text, ids, weights, roles, np.concatenate([marks, spans[before:stop]])))
            start = stop
        return made

    # Tokens

    def _encode(self, text: str, notice: Any) -> tuple[Ints, Ints]:
        """The ids of a rendered text, with exactly one BOS at its start where the tokenizer adds one."""
        tokens, spans = self.tokenizer.encode(text)
        spans = _closed(spans, text)
        bos = self.tokenizer.bos_id
        if bos is None or not self.tokenizer.adds_bos:
            return tokens, spans
        written = _lead(tokens, bos)
        if written > 1:
            notice("the template writes BOS more than once at the start; one is kept")
            return tokens[written - 1 :], spans[written - 1 :]
        mark = self.tokenizer.decode([bos])
        if written == 0 and not text.lstrip().startswith(mark):
            notice("the template writes no BOS; it is added")
            tokens = np.concatenate([np.array([bos], np.int32), tokens])
            spans = np.concatenate([np.zeros((1, 2), np.int32), spans])
        return tokens, spans


def _quiet(text: str) -> None:
    """Prompts are encoded again to compare ids; what is noticed in them was counted with the whole text."""


def _one_of(value: str, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        raise RecipeError(f"{value!r}", allowed=" or ".join(allowed), where=where)


def _lead(tokens: Ints, bos: int) -> int:
    """How many BOS stand at the start."""
    count = 0
    while count < len(tokens) and int(tokens[count]) == bos:
        count += 1
    return count


def _closed(spans: Ints, text: str) -> Ints:
    """The spans with white space that no token claims given to the token after it, so that they cover the text."""
    if not len(spans):
        return spans
    closed = spans.copy()
    before = np.concatenate([[0], np.maximum.accumulate(spans[:, 1])[:-1]])
    for index in np.flatnonzero(spans[:, 0] > before):
        if not text[before[index] : spans[index, 0]].strip():
            closed[index, 0] = before[index]
    return closed


def _whole_character(spans: Ints, index: int) -> int:
    """The last place up to `index` where no character is cut in two."""
    while index > 0 and spans[index, 0] < spans[index - 1, 1]:
        index -= 1
    return index


def _roles(spans: Ints, view: View, shown: Sequence[Shown]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    names = np.array([TOKEN_ROLES.index(shown[message].role) for _, message in view.bounds], np.uint8)
    roles = names[_owners(spans, view)]
    # A token that no character stands for, such as an added BOS, is nobody's.
    roles[spans[:, 0] == spans[:, 1]] = TOKEN_ROLES.index("template")
    return roles


def _message_weights(spans: Ints, view: View, shown: Sequence[Shown]) -> Floats:
    values = [shown[message].weight if shown[message].role == "assistant" else None for _, message in view.bounds]
    return np.array([1.0 if value is None else value for value in values], np.float32)[_owners(spans, view)]


def _owners(spans: Ints, view: View) -> Ints:
    ends = np.array([end for end, _ in view.bounds], np.int32)
    return np.minimum(np.searchsorted(ends, spans[:, 0], side="right"), len(ends) - 1).astype(np.int32)
