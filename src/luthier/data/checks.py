"""What must hold of every rendered row before the first step, looked at again from the outside.

Idea: the renderer builds rows so that these hold; this file does not trust it. It looks only at the finished tokens,
and asks the tokenizer and the template anew. A problem is never repaired here: it is named, with its address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from luthier.core.errors import DataError
from luthier.data.conversation import (
    Asked,
    Content,
    Conversation,
    Judged,
    Labelled,
    Message,
    Preference,
    Row,
    Tagged,
    Text,
)
from luthier.data.forest import Ints
from luthier.data.kind_checks import (
    Finding,
    Invariant,
    asked_findings,
    class_findings,
    compared_findings,
    encoder_findings,
    runs,
    seq2seq_findings,
    text_finding,
)
from luthier.data.rendering.batch import Batch
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import Renderer
from luthier.data.rendering.seq2seq import Seq2SeqRenderer
from luthier.data.rendering.spans import alike
from luthier.kernels.rows import Rows
from luthier.kernels.words import Joined

_EXCERPT = 8
"""Tokens shown where a row and what inference feeds part."""
_ASSISTANT = TOKEN_ROLES.index("assistant")
_TURNS = 64
"""Turns of a row at most, where C++ looks at it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A promise that a row does not keep: which, where, what was found, and what to do."""

    where: str
    invariant: Invariant
    found: str
    do: str

    def __str__(self) -> str:
        return f"{self.where}: [{self.invariant}] {self.found}; {self.do}"

    def error(self) -> DataError:
        """The problem as what is raised for it."""
        return DataError(f"[{self.invariant}] {self.found}", do=self.do, where=self.where)


def check_rendered(view: Rendered, renderer: Renderer, row: Row) -> list[Problem]:
    """The problems of one view of `row`; an empty list is what every view must give."""
    content = row.content
    found: list[Finding]
    if isinstance(content, Conversation) and renderer.kind == "causal":  # first, as most rows are
        sound = _sound_turns(view, renderer)
        turns = list(runs(view.weights > 0)) if sound is None else sound
        found = [
            _trained(view, turns) if sound is None else None,
            _bos(view, renderer, row),
            _text(view, renderer) if sound is None else None,
            _stops(view, renderer, turns) if sound is None else None,
            _prompt(view, renderer, content, turns),
        ]
    elif isinstance(renderer, Seq2SeqRenderer):
        found = [*seq2seq_findings(view, renderer, row), text_finding(view, renderer)]
    elif isinstance(content, Labelled | Tagged):
        found = [*class_findings(view, renderer, row), text_finding(view, renderer)]
        found += [_bos(view, renderer, row)] if renderer.kind == "causal" else []
    elif isinstance(content, Preference | Judged):
        found = [*compared_findings(view, renderer, row), _bos(view, renderer, row)]
        found += [_text(path, renderer) for path in _paths(view)]
    elif isinstance(content, Asked):
        found = [*asked_findings(view, renderer, row), _bos(view, renderer, row), _text(view, renderer)]
    elif renderer.kind == "encoder":
        found = [*encoder_findings(view, renderer), text_finding(view, renderer)]
    else:
        turns = list(runs(view.weights > 0))
        found = [_trained(view, turns), _bos(view, renderer, row), _text(view, renderer), _last(view, renderer)]
    return [Problem(row.where, *problem) for problem in found if problem is not None]


def _paths(view: Rendered) -> Iterator[Rendered]:
    """The prompt with each of its answers, as if there were no other."""
    numbers = np.zeros(len(view.tokens), np.uint8) if view.answers is None else view.answers
    for number in range(1, int(numbers.max(initial=0)) + 1):
        keep = (numbers == 0) | (numbers == number)
        prompt, spans = int(np.count_nonzero(numbers == 0)), view.spans[keep].copy()
        if prompt == len(spans):
            continue
        # The words of other answers stand between: the text without them.
        end, start = int(view.spans[:prompt, 1].max(initial=0)), int(spans[prompt:, 0].min())
        spans[prompt:] -= start - end
        yield replace(
            view,
            text=view.text[:end] + view.text[start:],
            tokens=view.tokens[keep],
            weights=view.weights[keep],
            roles=view.roles[keep],
            spans=spans,
        )


_Turns = Sequence[tuple[int, int]]
"""The [start, stop) of each unbroken run of tokens with weight."""


def _sound_turns(view: Rendered, renderer: Renderer) -> list[tuple[int, int]] | None:
    """The trained turns of a row in which C++ finds nothing that `_trained`, `_text` and `_stops` would name.

    None where it cannot say so.
    """
    tokenizer, rows = renderer.tokenizer, renderer.native_rows
    if rows is None or tokenizer.spellings is None or renderer.train_on == "all" or len(view.roles) != len(view.tokens):
        return None
    one = Rows.of(view.tokens, view.spans, view.weights)
    if one is None:
        return None
    try:
        text = Joined.of([view.text])
    except UnicodeEncodeError:  # half a character, which no tokens say
        return None
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    found = tokenizer.spellings.sound(rows, one, text, [_TURNS], stops=renderer.stop_ids, bos=bos)
    if found is None or found[0][0] < 0:
        return None
    return [(start, stop) for start, stop in found[1][: found[0][0]].tolist()]


def sound_rows(batch: Batch, renderer: Renderer) -> list[bool]:
    """For each row of a batch whether it is sound: of these `check_rendered` would say nothing.

    Its tokens say its text, weights are as they must be, and each trained turn ends in a stop token, as C++ finds by
    looking at the finished rows anew. It begins behind the tokens that its prompt has by itself. No message holds BOS,
    which stands at the start alone.
    """
    tokenizer, rows = renderer.tokenizer, renderer.native_rows
    if rows is None or tokenizer.spellings is None:
        return [False] * len(batch)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    turn_ends = batch.turn_ends.tolist()
    found = tokenizer.spellings.sound(rows, batch.rows, batch.texts, turn_ends, stops=renderer.stop_ids, bos=bos)
    if found is None:
        return [False] * len(batch)
    counts, turns = found
    first = np.concatenate([[0], batch.turn_ends[:-1]])
    apart = np.add.reduceat(turns[:, 0] != batch.starts, first)
    sound: list[bool] = (batch.known & (counts == batch.turn_ends - first) & (apart == 0)).tolist()
    return sound


def _trained(view: Rendered, turns: _Turns) -> Finding:
    if not (len(view.tokens) == len(view.weights) == len(view.roles) == len(view.spans)):
        return "trained", "tokens, weights, roles and spans have different lengths", "report this as a defect"
    # No number compares with NaN.
    if len(view.weights) and not (view.weights.min() >= 0 and view.weights.max() < np.inf):
        return "trained", "a loss weight is negative or not finite", "give weights of 0 or more"
    # The first token carries no loss whatever its weight: nothing predicts it.
    if not any(stop > 1 for _, stop in turns):
        return "trained", "no token is trained", "give the row an answer, or take it out"
    if view.weights[0] != 0:
        return "trained", "the first token has weight, but nothing predicts it", "report this as a defect"
    return None


def _stops(view: Rendered, renderer: Renderer, turns: _Turns) -> Finding:
    """Each trained assistant turn ends in a trained token at which generation stops."""
    if renderer.train_on == "all":
        turns = [(start, stop) for start, stop in runs(view.roles == _ASSISTANT) if view.weights[start:stop].any()]
    known = renderer.stop_ids
    for start, stop in turns:
        tokens = view.tokens[start:stop].tolist()
        if renderer.train_on != "all" and tokens[-1] in known and known.isdisjoint(tokens[:-1]):
            continue  # as almost always; all of a run has weight
        stops = [index for index, token in enumerate(tokens, start) if token in known and view.weights[index] > 0]
        if not stops or (renderer.train_on != "all" and stops != [stop - 1]):
            end = renderer.tokenizer.decode(view.tokens[max(start, stop - 4) : stop])
            return "stop", f"a trained turn ends in {end!r}, not in one stop token", "choose another data.template"
    return None


def _last(view: Rendered, renderer: Renderer) -> Finding:
    eos = renderer.tokenizer.eos_id
    at_end = int(view.spans[-1, 1]) >= len(view.text)
    if eos is not None and at_end and len(view.tokens) and int(view.tokens[-1]) != eos:
        # A chunk may end in the last character with the eos alone in the next one.
        limit = renderer.max_tokens
        if limit is None or len(view.tokens) < limit - 4:
            return "stop", "a text does not end in the end-of-text token", "report this as a defect"
    return None


def _bos(view: Rendered, renderer: Renderer, row: Row) -> Finding:
    """One BOS begins the row where the tokenizer adds one; later ones come from the template, never from a message."""
    bos = renderer.tokenizer.bos_id
    if bos is None or not renderer.tokenizer.adds_bos:
        return None
    found = view.tokens == bos
    # Nearly every row begins with its only one.
    if not (len(found) and found[0] and np.count_nonzero(found) == 1):
        places = np.flatnonzero(found)
        white = 0
        while white < len(view.tokens) and view.text[slice(*view.spans[white])].isspace():
            white += 1
        if not len(places) or places[0] not in (0, white):
            return "bos", "the row does not begin with BOS", "choose another data.template"
        if len(places) > 1 and places[1] == places[0] + 1:
            return "bos", "the row begins with BOS twice", "take bos_token out of the template"
    if bos in renderer.tokenizer.eos_ids:
        return None
    mark = renderer.bos_text
    words = _words(row.content)
    if isinstance(row.content, Text):
        words = [row.content.text.removeprefix(mark)]
    if any(mark in text for text in words):
        return "bos", f"the row's text contains {mark!r}, which is read as BOS", "take it out of the text"
    return None


def _words(content: Content) -> Sequence[str]:
    """What a row says, in its own words."""
    if isinstance(content, Conversation):
        return [message.content for message in content.messages]
    if isinstance(content, Text):
        return [content.text]
    if isinstance(content, Labelled):
        return [content.text, content.pair]
    if isinstance(content, Preference):
        answers = [message.content for answer in content.answers for message in answer]
        return [*_words(content.asked), *answers]
    if isinstance(content, Judged):
        return [*_words(content.asked), *(message.content for message in content.answer)]
    if isinstance(content, Asked):
        return _words(content.asked)
    return content.words if isinstance(content, Tagged) else [content.prompt, *content.answers]


def _text(view: Rendered, renderer: Renderer) -> Finding:
    """The tokens, read back, say the text that their spans name."""
    if not len(view.tokens):
        return None
    first, last = 0, len(view.tokens)
    bos = renderer.tokenizer.bos_id if renderer.tokenizer.adds_bos else None
    while first < last and int(view.tokens[first]) == bos:
        first += 1
    while last > first and int(view.tokens[last - 1]) in renderer.stop_ids and _empty(view.spans[last - 1]):
        last -= 1
    if first == last:
        return None
    start, stop = int(view.spans[first, 0]), int(view.spans[first:last, 1].max())
    if renderer.tokenizer.reads_as(view.tokens[first:last], view.text[start:stop]):
        return None
    decoded = renderer.tokenizer.decode(view.tokens[first:last])
    at = next(
        (index for index, pair in enumerate(zip(decoded, view.text[start:stop], strict=False)) if pair[0] != pair[1]),
        min(len(decoded), stop - start),
    )
    wanted = view.text[start + at : min(start + at + 20, stop)]
    return (
        "text",
        f"the tokens read as {decoded[at : at + 20]!r} where the text says {wanted!r}",
        "the tokenizer cannot say this text; use another tokenizer or change the text",
    )


def _prompt(view: Rendered, renderer: Renderer, conversation: Conversation, turns: _Turns) -> Finding:
    """What inference feeds before a trained turn is what stands before it in the row, token for token."""
    messages = conversation.messages
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if renderer.train_on == "all":
        prompts = [_ids(renderer, conversation, messages, index) for index in answers[-1:]]
        wrong = [prompt for prompt in prompts if not _cut(view, renderer) and not _begins(prompt, view.tokens)]
        return _differs(wrong[0], view.tokens, renderer) if wrong else None
    for start, _ in turns:
        before = prompt = view.tokens[:start]
        while answers:
            prompt = _ids(renderer, conversation, messages, answers.pop(0))
            if alike(prompt, before) or (_cut(view, renderer) and _is_end(before, prompt, renderer)):
                break
        else:
            return _differs(prompt, before, renderer)
    return None


def _differs(prompt: Ints, row: Ints, renderer: Renderer) -> Finding:
    size = min(len(prompt), len(row))
    apart = np.flatnonzero(prompt[:size] != row[:size])
    at = int(apart[0]) if len(apart) else size
    fed, has = (renderer.tokenizer.decode(ids[at : at + _EXCERPT]) for ids in (prompt, row))
    found = f"before an answer inference would feed {fed!r} where the row has {has!r} (token {at + 1})"
    return "prompt", found, "the template shows a prompt otherwise than a row; choose another data.template"


def _ids(renderer: Renderer, conversation: Conversation, messages: Sequence[Message], index: int) -> Ints:
    return renderer.prompt_ids(messages[:index], conversation.tools)


def _cut(view: Rendered, renderer: Renderer) -> bool:
    """Whether the left of the row was cut away by truncation, which only the truncating policy may do."""
    if renderer.over_length != "truncate":
        return False
    head = 1 if renderer.tokenizer.adds_bos and int(view.tokens[0]) == renderer.tokenizer.bos_id else 0
    return len(view.spans) > head and int(view.spans[head, 0]) > 0


def _is_end(before: Ints, prompt: Ints, renderer: Renderer) -> bool:
    head = 1 if renderer.tokenizer.adds_bos and int(before[0]) == renderer.tokenizer.bos_id else 0
    kept = before[head:]
    return len(kept) <= len(prompt) and alike(prompt[len(prompt) - len(kept) :], kept)


def _begins(prompt: Ints, tokens: Ints) -> bool:
    return alike(tokens[: len(prompt)], prompt)


def _empty(span: Ints) -> bool:
    return int(span[0]) == int(span[1])
