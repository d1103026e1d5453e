"""A model's chat template as a Go template for Ollama: found by asking it, and checked against it.

Idea: a chat template writes each message between two pieces of text, and what stands between two messages depends on
their roles: of the one before (or the start) and of the one after (or the answer to come). The real template is
rendered on conversations with marks for contents; what lies between the marks are these pieces. A Go template that
writes them is then compared with the real one on other conversations, id by id. A template in which more than the roles
counts is refused; orders of roles that it refuses itself are an error in the Go template, too. White space that it
strips around a message is stripped by the Go template as well (go_strip.py).
Source: Ollama's template language and values (go_template.py). It puts BOS before a text where the model's file says
so, so a template that begins with BOS is written without it, and beside another the file must not say so. An answer
that is to be continued is left open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np

from luthier.core.errors import TemplateError
from luthier.data.rendering.go_strip import AROUND, Strip, content, definitions, learn
from luthier.data.rendering.go_template import ollama_values, quoted, render
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
ROLES: Final = ("system", "user", "assistant")
START: Final = ""
ANSWER: Final = "answer"
_USUAL: Final[tuple[tuple[str, ...], ...]] = (("user",), ("user", "assistant", "user"),
                                              ("user", "assistant", "user", "assistant", "user"))  # fmt: skip
"""Orders that every chat has."""
_OTHERS: Final[tuple[tuple[str, ...], ...]] = (
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
    ("user", "assistant", "system", "user"),
    ("assistant", "user"),
    ("system", "assistant", "user"),
    ("user", "system"),
    ("system",),
)
"""Orders that a template may refuse."""
CHECKS: Final[tuple[Messages, ...]] = (
    ({"role": "user", "content": "What is 17 + 25?"},),
    ({"role": "system", "content": "Answer \"briefly\",\nin one line."}, {"role": "user", "content": "Höhe? 日本 🙂"}),
    ({"role": "user", "content": "{{ .System }} and {% if x %}"}, {"role": "assistant", "content": "a\\nb\tc"},
     {"role": "user", "content": "and\n\nthen?"}),
    ({"role": "system", "content": "S"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
     {"role": "user", "content": "three"}, {"role": "assistant", "content": "four, 'quoted'"},
     {"role": "user", "content": "five"}),
)  # fmt: skip
"""Conversations on which both templates are compared."""
PADDED: Final[tuple[Messages, ...]] = (
    ({"role": "user", "content": "  \n What? \t"}, {"role": "assistant", "content": "\n\nA \u3000"},
     {"role": "user", "content": "\u2003so\u00a0 \r\n"}),
    ({"role": "system", "content": " S\n"}, {"role": "user", "content": "\n1  2\x1f"},
     {"role": "assistant", "content": " two "}, {"role": "user", "content": "\u1680three\u2029"}),
)  # fmt: skip
"""The same with white space around the messages."""
BLANK: Final[tuple[Messages, ...]] = (
    ({"role": "user", "content": " \n"},),
    ({"role": "system", "content": ""}, {"role": "user", "content": "x"}, {"role": "assistant", "content": " "},
     {"role": "user", "content": ""}),
)  # fmt: skip
"""The same with messages that say nothing."""
_WRONG_ORDER: Final = "the chat template of this model has no such order of roles"


@final
@dataclass(frozen=True)
class GoChat:
    """A Go template, whether BOS is to be put before what it writes, and what a user should know of it."""

    source: str
    adds_bos: bool
    notices: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class _Learnt:
    """By the roles before a message and of it: what a template writes before it, and strips of it."""

    pieces: dict[tuple[str, str], str]
    strips: dict[tuple[str, str], Strip | None]


def go_template_for(template: Template, tokenizer: Tokenizer) -> GoChat:
    """The Go template that writes what `template` writes.

    Raises TemplateError for a template that cannot be written so.
    """
    learnt = _Learnt({}, {})
    for order in _USUAL:
        _learn(template, order, learnt, needed=True)
    for order in _OTHERS:
        _learn(template, order, learnt, needed=False)
    pieces = _without_bos(learnt.pieces, tokenizer)
    made = GoChat(_written(_Learnt(pieces or learnt.pieces, learnt.strips)), adds_bos=pieces is not None)
    require_equal(made, template, tokenizer, CHECKS)
    return replace(made, notices=_notices(made, template, tokenizer))


def require_equal(chat: GoChat, template: Template, tokenizer: Tokenizer, conversations: Sequence[Messages]) -> None:
    """Raise TemplateError unless both templates give the same ids for each conversation, or both refuse it."""
    for messages in conversations:
        wanted = _asked(template, messages)
        try:
            made = render(chat.source, ollama_values(messages))
        except TemplateError:
            if wanted is None:
                continue
            raise
        before = tokenizer.encode(wanted)[0] if wanted is not None else None
        after = tokenizer.encode(made)[0]
        if chat.adds_bos and tokenizer.bos_id is not None:
            after = np.concatenate([np.array([tokenizer.bos_id], after.dtype), after])
        if before is None or not np.array_equal(before, after):
            raise _refused(
                f"for {' '.join(message['role'] for message in messages)} it writes "
                f"{'an error' if wanted is None else repr(wanted[:200])} and the Go template {made[:200]!r}",
                template,
            )


def _learn(template: Template, order: Sequence[str], learnt: _Learnt, *, needed: bool) -> None:
    """Take the pieces of a conversation of these roles from the template's own text."""
    marks = [f"Zq{number}{role[0]}Wv" for number, role in enumerate(order)]
    text = _asked(template, _talk(order, marks))
    if text is None:
        if needed:
            raise _refused(f"it has no text for the roles {', '.join(order)}", template)
        return
    places = [text.find(mark) for mark in marks]
    if -1 in places or places != sorted(places) or any(text.count(mark) != 1 for mark in marks):
        if needed or "system" not in order or order[:2] == ("system", "user"):
            raise _refused(f"of the roles {', '.join(order)} it does not write each message once, in order", template)
        return
    ends = [0, *(place + len(mark) for place, mark in zip(places, marks, strict=True))]
    pairs = list(zip((START, *order), (*order, ANSWER), strict=True))
    for number, (before, after) in enumerate(pairs):
        piece = text[ends[number] : places[number] if number < len(places) else len(text)]
        if learnt.pieces.setdefault((before, after), piece) != piece:
            raise _refused(
                f"between {before or 'the start'} and {after} it writes {piece!r:.80} here and "
                f"{learnt.pieces[before, after]!r:.80} there",
                template,
            )
    padded = _asked(template, _talk(order, [f"{AROUND}{mark}{AROUND}" for mark in marks]))
    if padded is not None:
        learn(padded, marks, pairs[:-1], learnt.strips)


def _talk(order: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(order, contents, strict=True)]


def _asked(template: Template, messages: Messages) -> str | None:
    """What the template writes, the beginning of an answer included; None where it refuses the conversation."""
    try:
        return template.render(messages, add_generation_prompt=True)
    except TemplateError:
        return None


def _without_bos(pieces: Mapping[tuple[str, str], str], tokenizer: Tokenizer) -> dict[tuple[str, str], str] | None:
    """The pieces without the BOS that Ollama adds itself; None where the template does not begin with it."""
    bos = tokenizer.special_tokens.get("bos_token", "")
    begun = [piece for (before, _), piece in pieces.items() if before == START]
    if not tokenizer.adds_bos or not bos or not all(piece.startswith(bos) for piece in begun):
        return None
    return {pair: piece.removeprefix(bos) if pair[0] == START else piece for pair, piece in pieces.items()}


def _written(learnt: _Learnt) -> str:
    """The Go template of what was learnt. All text stands in strings, so nothing depends on white space."""
    # What is stripped in a way that has no words is not stripped at all: the notices will tell.
    known = all(learnt.strips.values())
    strips: dict[tuple[str, str], Strip] = {pair: strip for pair, strip in learnt.strips.items() if known and strip}
    lines = [*definitions(list(strips.values())), '{{- $was := "" -}}', "{{- range .Messages -}}"]
    for number, role in enumerate(ROLES):
        lines.append(f'{{{{- {"else " if number else ""}if eq .Role "{role}" -}}}}')
        others = [was for was in (START, *ROLES) if was != role]
        lines += _choice({was: _shown(learnt.pieces.get((was, role))) for was in others})
        held = {was: content(strips[was, role]) for was in others if (was, role) in strips}
        lines += _choice(held) if held else [content("none")]
    lines += ["{{- else -}}", _failing(), "{{- end -}}", "{{- $was = .Role -}}", "{{- end -}}"]
    # An answer that has begun is left open, for the model to go on with.
    lines.append('{{- if ne $was "assistant" -}}')
    lines += _choice({was: _shown(learnt.pieces.get((was, ANSWER))) for was in ("system", "user")})
    lines.append("{{- end -}}")
    return "\n".join(line for line in lines if line)


def _choice(options: Mapping[str, str]) -> list[str]:
    """Lines that do the action for the role before."""
    if len(set(options.values())) == 1:
        return [next(iter(options.values()))]
    groups: dict[str, list[str]] = {}
    for was, action in options.items():
        groups.setdefault(action, []).append(was)
    lines = []
    for number, (action, roles) in enumerate(groups.items()):
        named = " ".join(f'"{role}"' for role in roles)
        lines.append(f'{{{{- {"else " if number else ""}if eq $was {named} -}}}}{action}')
    return [*lines, "{{- end -}}"]


def _shown(text: str | None) -> str:
    """The action that writes a text, or fails where there is none."""
    if text is None:
        return _failing()
    return f"{{{{- {quoted(text)} -}}}}" if text else ""


def _failing() -> str:
    """An error when it is reached, which shows the sentence: a slice from behind the end."""
    return f"{{{{- slice {quoted(_WRONG_ORDER)} 999 -}}}}"


def _notices(chat: GoChat, template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What is written otherwise, as was tried; the first of these, which includes the second."""
    for conversations, notice in (
        (PADDED, "white space around a message is not treated as by the model's template: send messages without it"),
        (BLANK, "a message that says nothing is not written as by the model's template: send none"),
    ):
        try:
            require_equal(chat, template, tokenizer, conversations)
        except TemplateError:
            return (notice,)
    return ()


def _refused(received: str, template: Template) -> TemplateError:
    return TemplateError(
        f"the chat template cannot be written in Ollama's language: {received}",
        allowed="templates in which the text between two messages depends on their roles alone",
        do="use the GGUF file with a server that runs the model's own template (llama-server --jinja)",
        where=template.name,
    )
