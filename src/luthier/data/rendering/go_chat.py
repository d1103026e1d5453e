"""A model's chat template as a Go template for Ollama: found by asking it, and checked against it.

Idea: a chat template writes each message between two pieces of text, and what stands between two messages depends on
their roles: of the one before (or the start) and of the one after (or the answer to come). The real template is
rendered on conversations with marks for contents; what lies between the marks are these pieces. A Go template that
writes them is then compared with the real one on other conversations, id by id. A template in which more than the roles
counts is refused; orders of roles that it refuses itself are an error in the Go template, too.
Source: Ollama's template language and values (go_template.py). It puts BOS before a text where the model's file says
so, and leaves an answer that is to be continued open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from luthier.core.errors import TemplateError
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
_WRONG_ORDER: Final = "the chat template of this model has no such order of roles"


@final
@dataclass(frozen=True)
class GoChat:
    """A Go template, and what a user should know of it."""

    source: str
    notices: tuple[str, ...] = ()


def go_template_for(template: Template, tokenizer: Tokenizer) -> GoChat:
    """The Go template that writes what `template` writes.

    Raises TemplateError for a template that cannot be written so.
    """
    pieces: dict[tuple[str, str], str] = {}
    for order in _USUAL:
        _learn(template, order, pieces, needed=True)
    for order in _OTHERS:
        _learn(template, order, pieces, needed=False)
    source = _written(_without_bos(pieces, tokenizer))
    require_equal(source, template, tokenizer, CHECKS)
    return GoChat(source, tuple(_notices(template)))


def require_equal(source: str, template: Template, tokenizer: Tokenizer, conversations: Sequence[Messages]) -> None:
    """Raise TemplateError unless both templates give the same ids for each conversation, or both refuse it."""
    for messages in conversations:
        wanted = _asked(template, messages)
        try:
            made = render(source, ollama_values(messages))
        except TemplateError:
            if wanted is None:
                continue
            raise
        before = tokenizer.encode(wanted)[0] if wanted is not None else None
        after = tokenizer.encode(made)[0]
        if tokenizer.adds_bos and tokenizer.bos_id is not None:
            after = np.concatenate([np.array([tokenizer.bos_id], after.dtype), after])
        if before is None or not np.array_equal(before, after):
            raise _refused(
                f"for {' '.join(message['role'] for message in messages)} it writes "
                f"{'an error' if wanted is None else repr(wanted[:200])} and the Go template {made[:200]!r}",
                template,
            )


def _learn(template: Template, order: Sequence[str], pieces: dict[tuple[str, str], str], *, needed: bool) -> None:
    """Take the pieces of a conversation of these roles from the template's own text."""
    marks = [f"Zq{number}{role[0]}Wv" for number, role in enumerate(order)]
    text = _asked(template, [{"role": role, "content": mark} for role, mark in zip(order, marks, strict=True)])
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
    for number, (before, after) in enumerate(zip((START, *order), (*order, ANSWER), strict=True)):
        piece = text[ends[number] : places[number] if number < len(places) else len(text)]
        if pieces.setdefault((before, after), piece) != piece:
            raise _refused(
                f"between {before or 'the start'} and {after} it writes {piece!r:.80} here and "
                f"{pieces[before, after]!r:.80} there",
                template,
            )


def _asked(template: Template, messages: Messages) -> str | None:
    """What the template writes, the beginning of an answer included; None where it refuses the conversation."""
    try:
        return template.render(messages, add_generation_prompt=True)
    except TemplateError:
        return None


def _without_bos(pieces: Mapping[tuple[str, str], str], tokenizer: Tokenizer) -> dict[tuple[str, str], str]:
    """The pieces without the BOS that Ollama adds itself."""
    if not tokenizer.adds_bos:
        return dict(pieces)
    bos = tokenizer.special_tokens.get("bos_token", "")
    made = dict(pieces)
    for (before, after), piece in pieces.items():
        if before == START:
            if not bos or not piece.startswith(bos):
                raise TemplateError(
                    f"the chat template begins with {piece[:40]!r}, and Ollama puts {bos!r} before it",
                    allowed="a template that begins with the token that the tokenizer begins texts with",
                    do="write {{- bos_token -}} at its start, or run the model with --to merged",
                )
            made[before, after] = piece.removeprefix(bos)
    return made


def _written(pieces: Mapping[tuple[str, str], str]) -> str:
    """The Go template with these pieces. All text stands in strings, so nothing depends on white space."""
    lines = ['{{- $was := "" -}}', "{{- range .Messages -}}"]
    for number, role in enumerate(ROLES):
        lines.append(f'{{{{- {"else " if number else ""}if eq .Role "{role}" -}}}}')
        lines += _choice({was: pieces.get((was, role)) for was in (START, *ROLES) if was != role})
        lines.append("{{- .Content -}}")
    lines += ["{{- else -}}", _failing(), "{{- end -}}", "{{- $was = .Role -}}", "{{- end -}}"]
    # An answer that has begun is left open, for the model to go on with.
    lines.append('{{- if ne $was "assistant" -}}')
    lines += _choice({was: pieces.get((was, ANSWER)) for was in ("system", "user")})
    lines.append("{{- end -}}")
    return "\n".join(line for line in lines if line)


def _choice(options: Mapping[str, str | None]) -> list[str]:
    """Lines that write the piece for the role before, or fail where there is none."""
    texts = list(options.values())
    if len(set(texts)) == 1:
        return [_shown(texts[0])]
    lines = []
    groups: dict[str | None, list[str]] = {}
    for was, text in options.items():
        groups.setdefault(text, []).append(was)
    for number, (text, roles) in enumerate(groups.items()):
        named = " ".join(f'"{role}"' for role in roles)
        lines.append(f'{{{{- {"else " if number else ""}if eq $was {named} -}}}}{_shown(text)}')
    return [*lines, "{{- end -}}"]


def _shown(text: str | None) -> str:
    if text is None:
        return _failing()
    return f"{{{{- {quoted(text)} -}}}}" if text else ""


def _failing() -> str:
    """An error when it is reached, which shows the sentence: a slice from behind the end."""
    return f"{{{{- slice {quoted(_WRONG_ORDER)} 999 -}}}}"


def _notices(template: Template) -> Iterator[str]:
    mark = "Zq0uWv"
    text = _asked(template, [{"role": "user", "content": f" \n{mark} \n"}])
    if text is not None and f" \n{mark} \n" not in text:
        yield ("the model's template strips white space around a message, which a Go template cannot: messages are to "
               "be sent without it")  # fmt: skip


def _refused(received: str, template: Template) -> TemplateError:
    return TemplateError(
        f"the chat template cannot be written in Ollama's language: {received}",
        allowed="templates in which the text between two messages depends on their roles alone",
        do="use the GGUF file with a server that runs the model's own template (llama-server --jinja)",
        where=template.name,
    )
