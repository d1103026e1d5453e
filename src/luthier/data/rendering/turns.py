"""Where the answers stand in the text of a conversation, found by rendering and never by searching for markers.

For the answer at message i, G = render(messages before it, with the generation prompt) is what inference shows, and
F = render(messages up to and with it) is what the answer makes of it. When each G begins its F and each F begins the
whole text, one view holds all answers. When a template drops, merges or rewrites history, that does not hold, and each
answer gets a view of its own: G, then the answer and its ending.

Where the answer ends and its ending begins is found by difference: the message is rendered twice, with two probe texts
that differ in their first and last character; what the two renderings share at the end is the ending. What cannot be
proven this way is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from luthier.core.errors import DataError, TemplateError
from luthier.data.conversation import ToolCall
from luthier.data.rendering.shown import Notice, Shown, call_fields
from luthier.data.rendering.template import Wanted
from luthier.data.strict_json import excerpt

PROBES = ("Qz4mT", "Wk9xB")
"""What is written in the place of an answer to see where it stands."""
_FORESEEN = 2**18
"""Characters of one row's renderings that are made ahead: those of a very long conversation would fill the memory."""
_BEFORE, _AFTER = 20, 40
"""Characters shown before and after the place where two renderings part."""


HISTORY = (
    "the template changes history: it shows a turn differently once others follow, so each answer is trained in a view "
    "of its own, behind exactly what inference shows (more tokens, the same answers); a template that leaves past "
    "turns as they were needs one view for a conversation, such as data.template: chatml"
)
PROMPT = (
    "the generation prompt is not how the template begins an answer, so each answer is trained behind that prompt in a "
    "view of its own; a template whose prompt is the beginning needs one view, such as data.template: chatml"
)
TRIMS = "the template trims white space around an answer"
Write = Callable[[Wanted], str]
Place = tuple[str, int]
"""Which rendering of a conversation: what it is for, and how many messages it has or which one it is about."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A trained turn in a text: [start, ending) is what the model says, [ending, stop) what the template puts after."""

    message: int
    start: int
    ending: int
    stop: int
    weight: float
    calls: bool


@dataclass(frozen=True, slots=True)
class View:
    """A text as the model sees it; `bounds` are (end, message index) in order, for whose words stand where."""

    text: str
    answers: tuple[Answer, ...]
    bounds: tuple[tuple[int, int], ...]

    def alone(self, answer: Answer) -> View:
        """The view that ends with `answer`'s turn and trains nothing else."""
        bounds = tuple((min(end, answer.stop), message) for end, message in self.bounds if message <= answer.message)
        return View(self.text[: answer.stop], (answer,), bounds)


def lay_out(stage: Stage, notice: Notice) -> list[View]:
    """The views of a conversation in which the messages of the stage's weights are trained, with that weight.

    What came of it is kept, so it may be asked for ahead: `notice` hears the same again.
    """
    if stage.laid is None:
        told: list[tuple[str, str]] = []

        def hear(text: str, example: str = "") -> None:
            told.append((text, example))

        try:
            stage.laid = _Laid(_laid_out(stage, hear), told)
        except DataError as error:
            stage.laid = _Laid(error, told)
    for text, example in stage.laid.told:
        notice(text, example)
    if isinstance(stage.laid.views, DataError):
        raise placed(stage.laid.views, stage.laid.views.where)
    return stage.laid.views


@dataclass(frozen=True, slots=True)
class _Laid:
    """The views of a conversation, or why there are none, and what there was to notice."""

    views: list[View] | DataError
    told: Sequence[tuple[str, str]]


def _laid_out(stage: Stage, notice: Notice) -> list[View]:
    count = len(stage.shown)
    full = stage.text(count)
    turns = {index: stage.turn(index, weight, notice) for index, weight in stage.weights.items()}
    changed = [index for index, turn in turns.items() if not full.startswith(turn.text[: turn.answer.stop])]
    if not changed and all(turn.prefixed for turn in turns.values()):
        return [View(full, tuple(turn.answer for turn in turns.values()), stage.bounds(full, count))]
    if len(turns) > 1:
        example = _parting(changed[0], turns[changed[0]].text, full) if changed else ""
        notice(HISTORY, example)
    return [View(turn.text, (turn.answer,), stage.bounds(turn.text, index + 1)) for index, turn in turns.items()]


def _parting(index: int, alone: str, full: str) -> str:
    """How a rendering that ends with message `index` and one that goes on differ, where they part."""
    at = len(_common_start(alone, full))
    one, two = (text[max(at - _BEFORE, 0) : at + _AFTER] for text in (alone, full))
    return f"message {index + 1} is shown as {one!r} when it is the last one and as {two!r} when others follow"


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer on its own: its view's text, where it stands, and whether the template itself writes that text."""

    text: str
    answer: Answer
    prefixed: bool


@final
class Stage:
    """One conversation and the renderings it needs: those that can be foreseen may be made ahead and handed in."""

    def __init__(
        self, shown: Sequence[Shown], write: Write, tools: Sequence[Mapping[str, Any]], weights: Mapping[int, float]
    ) -> None:
        self.shown = shown
        self.weights = weights
        self._fields = [message.fields for message in shown]
        self._write = write
        self._tools = tools
        self._known: dict[Place, str | TemplateError] = {}
        self.laid: _Laid | None = None

    @property
    def contents(self) -> Sequence[str]:
        """What each message says."""
        return [fields["content"] for fields in self._fields]

    @property
    def foreseeable(self) -> bool:
        """Whether its renderings may be made ahead: they are not too long."""
        size = sum(len(fields["content"]) for fields in self._fields) + 1
        return size * (len(self._fields) + 3 * len(self.weights)) <= _FORESEEN

    def shape(self, *, tools: bool) -> Hashable:
        """All that the renderings depend on besides the contents; of these only whether there is any.

        Without `tools`, for a template that does not look at these.
        Raises what `json.dumps` does where a call or a tool cannot be written.
        """
        messages = tuple(
            (fields["role"], not fields["content"])
            if len(fields) == 2
            else json.dumps([{**fields, "content": ""}, not fields["content"]])
            for fields in self._fields
        )
        return messages, json.dumps(self._tools) if tools and self._tools else "", tuple(self.weights)

    def foreseen(self) -> list[tuple[Place, Wanted]]:
        """The renderings that laying out will ask for, as far as can be told; give what became of them to `take`."""
        return _foreseen(self._fields, self._tools, self.weights) if self.foreseeable else []

    def opened(self) -> list[tuple[Place, Wanted]]:
        """The same renderings with the number of the message in the place of each content, where there is any."""
        fields = [
            {**each, "content": index} if each["content"] else each for index, each in enumerate(self._fields)
        ]
        return _foreseen(fields, self._tools, self.weights)

    def take(self, place: Place, outcome: str | TemplateError) -> None:
        """What became of a foreseen rendering."""
        self._known[place] = outcome

    def texts(self) -> list[str]:
        """The texts of its views, each with the prompts of the answers in it; none where it cannot be laid out."""
        try:
            views = lay_out(self, _quiet)
        except DataError:
            return []
        return [text for view in views for text in (view.text, *(view.text[: each.start] for each in view.answers))]

    def prompt_like(self, wanted: Wanted) -> str | None:
        """The prompt that `wanted` asks for, when it is one of this conversation's and is known."""
        count = len(wanted.messages)
        known = self._known.get(("prompt", count)) if wanted.add_generation_prompt else None
        same = wanted.messages == self._fields[:count] and list(wanted.tools) == list(self._tools)
        return known if isinstance(known, str) and same else None

    def text(self, count: int) -> str:
        """The rendering of the first `count` messages."""
        return self._rendered(("text", count), lambda: Wanted(self._fields[:count], self._tools))

    def _rendered(self, place: Place, wanted: Callable[[], Wanted]) -> str:
        known = self._known.get(place)
        if known is None:
            try:
                known = self._write(wanted())
            except TemplateError as error:
                known = error
            self._known[place] = known
        if isinstance(known, TemplateError):
            # A new one each time, since an error that was raised keeps what was around it alive.
            raise placed(known, known.where)
        return known

    def _prompt(self, index: int) -> Wanted:
        return Wanted(self._fields[:index], self._tools, add_generation_prompt=True)

    def _changed(self, index: int, change: Mapping[str, Any]) -> Wanted:
        return Wanted([*self._fields[:index], {**self._fields[index], **change}], self._tools)

    def prompt(self) -> tuple[str, tuple[tuple[int, int], ...]]:
        """What inference shows after the whole conversation, and whose words stand where in it."""
        count = len(self.shown)
        text = self._rendered(("prompt", count), lambda: self._prompt(count))
        return text, self.bounds(text, count)

    def turn(self, index: int, weight: float, notice: Notice) -> _Turn:
        """The answer at message `index`, after what inference shows before it."""
        try:
            prompt = self._rendered(("prompt", index), lambda: self._prompt(index))
        except TemplateError as error:
            raise TemplateError(
                f"message {index + 1} is an answer that inference could not ask for: {error.received}",
                do="begin the conversation with a user message, or give this message weight 0",
            ) from error
        text = self.text(index + 1)
        calls = bool(self._fields[index].get("tool_calls"))
        opening, ending = self._around(index)
        if calls:
            ending = self._after_calls(index, text)
        if not text.endswith(ending):
            raise _unproven(index, "its ending changes with its text")
        end = len(text) - len(ending)
        if text.startswith(prompt) and len(prompt) <= end:
            self._prove_prompt(index, prompt, opening)
            self._compare(index, text[len(prompt) : end], notice)
            return _Turn(text, Answer(index, len(prompt), end, len(text), weight, calls), prefixed=True)
        said = self._said(index, text, opening, ending)
        example = _apart(index, prompt, text)
        notice(PROMPT, example)
        joined = prompt + said + ending
        start = len(prompt)
        answer = Answer(index, start, start + len(said), len(joined), weight, calls)
        return _Turn(joined, answer, prefixed=False)

    def bounds(self, text: str, count: int) -> tuple[tuple[int, int], ...]:
        """Where the words of each message end in `text`; a message whose end cannot be told joins the next one."""
        found: list[tuple[int, int]] = []
        last = 0
        for index in range(count - 1):
            try:
                part = self.text(index + 1)
            except TemplateError:
                continue
            end = len(_common_start(part, text))
            # What a prettified template writes after its last message, white space, is not there in longer renderings.
            if end >= last and not part[end:].strip():
                found.append((end, index))
                last = end
        found.append((len(text), count - 1))
        return tuple(found)

    def _around(self, index: int) -> tuple[str, str]:
        """What the template writes before and after the content of message `index`, whatever the content is."""
        one, two = (self._probed(index, probe) for probe in PROBES)
        # Where nothing but the probe differs, which is nearly everywhere, it is what they do not share.
        at = one.find(PROBES[0])
        end = at + len(PROBES[0])
        if at >= 0 and two == f"{one[:at]}{PROBES[1]}{one[end:]}":
            return one[:at], one[end:]
        if one == two:
            raise _unproven(index, "the template does not show it")
        return _common_start(one, two), _common_end(one, two)

    def _after_calls(self, index: int, text: str) -> str:
        """What the template writes after content and tool calls: what `text` shares with renderings of other calls."""
        calls = list(self._fields[index]["tool_calls"])
        name, call_id = calls[-1]["function"]["name"], calls[-1].get("id", "")
        ending = text
        # A text and a number: the quote that closes a text belongs to the arguments.
        for probe in (*PROBES, 70417):
            probed = call_fields(ToolCall(name, {"probe": probe}, call_id))
            changed = self._changed(index, {"tool_calls": [*calls[:-1], probed]})
            ending = _common_end(ending, self._write(changed))
        for probe in PROBES:
            ending = _common_end(ending, self._probed(index, probe))
        if ending == text:
            raise _unproven(index, "the template does not show its tool calls")
        return ending

    def _probed(self, index: int, probe: str) -> str:
        return self._rendered((probe, index), lambda: self._changed(index, {"content": probe}))

    def _prove_prompt(self, index: int, prompt: str, opening: str) -> None:
        """Refuse a template that ignores the generation prompt: the header would be trained as if it were answer."""
        lead = opening[len(prompt) :] if opening.startswith(prompt) else ""
        if not lead.strip():
            return
        if self.text(index) == prompt:
            raise TemplateError(
                f"the template writes {lead!r} before an answer but not when it is asked for an answer",
                do="let the template write it when add_generation_prompt is set, or choose another data.template",
            )

    def _compare(self, index: int, said: str, notice: Notice) -> None:
        content = self._fields[index]["content"]
        if content.strip() not in said:
            notice(
                "the template changes the text of an answer (it is trained as the template shows it)",
                f"message {index + 1} {excerpt(content)} is shown as {excerpt(said)}",
            )
        elif content not in said:
            notice(TRIMS, said_of(index, content))

    def _said(self, index: int, text: str, opening: str, ending: str) -> str:
        """The content as the template shows it, where the generation prompt does not begin the template's own text."""
        content = self._fields[index]["content"]
        probe = self._probed(index, PROBES[0])
        if probe != opening + PROBES[0] + ending or not text.startswith(opening):
            raise _unproven(index, "the template changes its text, and the generation prompt does not begin it")
        said = text[len(opening) : len(text) - len(ending)]
        if len(opening) + len(ending) > len(text) or said.strip() != content.strip():
            raise _unproven(index, "the template changes its text, and the generation prompt does not begin it")
        return said


def said_of(index: int, content: str) -> str:
    """What a message says, for an example of a notice."""
    return f"message {index + 1} {excerpt(content)}"


def _quiet(text: str, example: str = "") -> None:
    """Who looks ahead tells nobody."""


def _foreseen(
    fields: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], indexes: Iterable[int]
) -> list[tuple[Place, Wanted]]:
    wanted = [(("text", count), Wanted(fields[:count], tools)) for count in range(1, len(fields) + 1)]
    for index in indexes:
        before = fields[:index]
        wanted.append((("prompt", index), Wanted(before, tools, add_generation_prompt=True)))
        wanted += [
            ((probe, index), Wanted([*before, {**fields[index], "content": probe}], tools)) for probe in PROBES
        ]
    return wanted


def _apart(index: int, prompt: str, text: str) -> str:
    """How the generation prompt and the template's own text differ, where they part."""
    at = len(_common_start(prompt, text))
    one, two = (words[max(at - _BEFORE, 0) : at + _AFTER] for words in (prompt, text))
    return f"message {index + 1} is asked for with {one!r} and then shown as {two!r}"


def _unproven(index: int, why: str) -> TemplateError:
    return TemplateError(
        f"where the answer of message {index + 1} stands cannot be proven: {why}",
        do="choose another template with data.template, or give this message weight 0",
    )


def _common_start(one: str, two: str) -> str:
    if two.startswith(one):
        return one
    # Halving is quick where texts are long and mostly equal.
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(two[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return one[:low]


def _common_end(one: str, two: str) -> str:
    return _common_start(one[::-1], two[::-1])[::-1]


def placed(error: DataError, where: str) -> DataError:
    """The same error with the address of the row it is about."""
    return type(error)(error.received, allowed=error.allowed, do=error.do, where=where)
