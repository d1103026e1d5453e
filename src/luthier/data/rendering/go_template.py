"""Go templates, as far as Ollama's chat templates need them: parsed, and rendered on values like Ollama's.

Idea: what Ollama will make of a template is tried here before anybody else finds out. It knows text, trim marks,
comments, `if`, `else if`, `else`, `range`, `define`, `template`, `end`, variables, fields, strings, numbers,
parentheses, and the functions eq, ne, ge, and, or, not, len, index and slice. What it does not know is an error, never
left out. As in Go, lengths and slices of a text are of its bytes.
Source: Go's text/template (its documentation), and the values that Ollama executes it on (`ollama_values`).
Use when: a template that we wrote ourselves is checked. Templates of others are not run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from luthier.core.errors import TemplateError

_ACTION: Final = re.compile(r"""\{\{(-\s)?\s*((?:"(?:[^"\\]|\\.)*"|[^"])*?)\s*(\s-)?\}\}""", re.S)
_TOKEN: Final = re.compile(
    r"""\s*(?:("(?:[^"\\]|\\.)*")|(-?\d+)|(:=|=|\(|\)|,)|(\$?[A-Za-z_]*(?:\.[A-Za-z_]+)+|\$?[A-Za-z_]+|\$|\.))"""
)
_NAME: Final = re.compile(r"\$[A-Za-z_]*")
_LONGEST: Final = 4_000_000


@final
@dataclass(slots=True)
class _Node:
    """Text, an expression to show, or a block: `kind` and what belongs to it."""

    kind: str
    text: str = ""
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text that a template makes of `values`. Raises TemplateError for what is no template, or fails."""
    nodes = _parsed(source)
    named = {_name(node.text): node.body for node in nodes if node.kind == "define"}
    return _Run(values, named).all(nodes)


def ollama_values(messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What Ollama executes a template on: neighbours of one role become one message, with an empty line between."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += f"\n\n{message['content']}"
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"System": system, "Messages": joined, "Response": ""}


def quoted(text: str) -> str:
    """`text` as a Go string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def _parsed(source: str) -> list[_Node]:
    root: list[_Node] = []
    # Each open block with the list that is being filled, and whether its `else` was an `else if`.
    open_: list[tuple[_Node, bool]] = []
    here, at, trim = root, 0, False
    for found in _ACTION.finditer(source):
        text = source[at : found.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if found[1] else text
        if "{{" in text:
            raise _broken(text[text.index("{{") :][:40], "actions that end")
        if text:
            here.append(_Node("text", text))
        at, trim = found.end(), found[3] is not None
        here = _add(found[2], here, open_, root)
    rest = source[at:].lstrip() if trim else source[at:]
    if "{{" in rest or open_:
        raise _broken("an action or a block that does not end", "{{ ... }} and an end for each if and range")
    if rest:
        here.append(_Node("text", rest))
    return root


def _add(action: str, here: list[_Node], open_: list[tuple[_Node, bool]], root: list[_Node]) -> list[_Node]:
    """Put an action where it belongs; the list that is filled next."""
    word, _, rest = action.partition(" ")
    if action.startswith("/*"):
        return here
    if word in ("if", "range", "define"):
        node = _Node(word, rest)
        here.append(node)
        open_.append((node, False))
        return node.body
    if word == "else" and open_:
        node = open_[-1][0]
        if not rest:
            return node.otherwise
        if not rest.startswith("if "):
            raise _broken(f"else {rest}", "else, or else if")
        inner = _Node("if", rest[3:])
        node.otherwise.append(inner)
        open_.append((inner, True))
        return inner.body
    if word == "end" and open_:
        while open_.pop()[1]:
            pass
        if not open_:
            return root
        outer = open_[-1][0]
        return outer.otherwise if outer.otherwise else outer.body
    if word in ("else", "end") or not action:
        raise _broken(f"{word or 'an empty action'}", "else and end inside an if or a range")
    here.append(_Node("call", rest) if word == "template" else _Node("show", action))
    return here


def _name(text: str) -> str:
    """The name of a template, which stands in quotes."""
    tokens = _tokens(text)
    if not tokens or not tokens[0].startswith('"'):
        raise _broken(f"a template called {text:.40}", "a name in quotes")
    return str(json.loads(tokens[0]))


@final
class _Run:
    """One rendering: the values, the templates by name, the variables in view, and how much was written."""

    def __init__(self, values: Mapping[str, Any], named: Mapping[str, list[_Node]]) -> None:
        self.root = values
        self.named = named
        self.scopes: list[dict[str, Any]] = [{"$": values}]
        self.written = 0

    def all(self, nodes: Sequence[_Node], dot: Any = None) -> str:
        self.scopes.append({})
        made = "".join(self.one(node, self.root if dot is None else dot) for node in nodes)
        self.scopes.pop()
        return made

    def one(self, node: _Node, dot: Any) -> str:
        if node.kind == "text":
            made = node.text
        elif node.kind == "show":
            made = self.shown(node.text, dot)
        elif node.kind == "if":
            made = self.all(node.body if _true(self.value(node.text, dot)) else node.otherwise, dot)
        elif node.kind == "call":
            made = self.called(node.text, dot)
        elif node.kind == "define":
            made = ""
        else:
            made = self.ranged(node, dot)
        self.written += len(made)
        if self.written > _LONGEST:
            raise _broken(f"more than {_LONGEST:,} characters", "less")
        return made

    def shown(self, action: str, dot: Any) -> str:
        tokens = _tokens(action)
        if len(tokens) > 2 and tokens[1] in (":=", "=") and _NAME.fullmatch(tokens[0]):
            value = self.expression(tokens[2:], dot)
            scope = self.scopes[-1] if tokens[1] == ":=" else self.scope_of(tokens[0])
            scope[tokens[0]] = value
            return ""
        value = self.expression(tokens, dot)
        if not isinstance(value, (str, int)):
            raise _broken(f"{action} is no text", "a text or a number")
        return str(value).lower() if isinstance(value, bool) else str(value)

    def called(self, text: str, dot: Any) -> str:
        """Another template on one value, which sees nothing else."""
        name, tokens = _name(text), _tokens(text)[1:]
        if name not in self.named or not tokens:
            raise _broken(f"the template {text:.40}", "one that is defined, with what it is given")
        value = self.expression(tokens, dot)
        outside, self.scopes = self.scopes, [{"$": value}]
        made = self.all(self.named[name], value)
        self.scopes = outside
        return made

    def ranged(self, node: _Node, dot: Any) -> str:
        names, _, source = node.text.rpartition(":=")
        items = self.value(source, dot)
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise _broken(f"range over {source.strip()}", "a list")
        if not items:
            return self.all(node.otherwise, dot)
        wanted = [name.strip() for name in names.split(",")] if names else []
        made = []
        for number, item in enumerate(items):
            self.scopes.append(dict(zip(wanted[::-1], (item, number), strict=False)))
            made.append(self.all(node.body, item))
            self.scopes.pop()
        return "".join(made)

    def scope_of(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] | None = next((each for each in reversed(self.scopes) if name in each), None)
        if found is not None:
            return found
        raise _broken(f"the variable {name}", "one that was declared with :=")

    def value(self, text: str, dot: Any) -> Any:
        return self.expression(_tokens(text), dot)

    def expression(self, tokens: list[str], dot: Any) -> Any:
        """One operand, or a function and its operands."""
        operands: list[Any] = []
        at = 0
        function: Callable[..., Any] | None = None
        while at < len(tokens):
            token = tokens[at]
            if token == "(":
                end = _closing(tokens, at)
                inner = self.expression(tokens[at + 1 : end], dot)
                at = end + 1
                while at < len(tokens) and tokens[at].startswith(".") and len(tokens[at]) > 1:
                    inner = _field(inner, tokens[at][1:].split("."))
                    at += 1
                operands.append(inner)
            elif token in _FUNCTIONS and at == 0:
                function = _FUNCTIONS[token]
                at += 1
            else:
                operands.append(self.operand(token, dot))
                at += 1
            # As in Go, what follows is not computed when the outcome is certain.
            if function in (_and, _or) and operands and _true(operands[-1]) == (function is _or):
                break
        if function is not None:
            return _called(function, operands, tokens[0])
        if len(operands) != 1:
            raise _broken(" ".join(tokens), "one value, or a function and its values")
        return operands[0]

    def operand(self, token: str, dot: Any) -> Any:
        if token.startswith('"'):
            return json.loads(token.replace("\\x7f", "\\u007f"))
        if re.fullmatch(r"-?\d+", token):
            return int(token)
        if token in ("true", "false"):
            return token == "true"
        if token == ".":
            return dot
        name, *fields = token.split(".")
        if name and not name.startswith("$"):
            raise _broken(f"the function {name}", ", ".join(_FUNCTIONS))
        return _field(self.scope_of(name)[name] if name else dot, fields)


def _tokens(text: str) -> list[str]:
    made, at = [], 0
    while at < len(text.rstrip()):
        found = _TOKEN.match(text, at)
        if found is None or found.end() == at or not found[0].strip():
            raise _broken(text[at : at + 40], "strings, numbers, fields, variables and functions")
        made.append(found[0].strip())
        at = found.end()
    return made


def _closing(tokens: list[str], at: int) -> int:
    depth = 0
    for place in range(at, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[place], 0)
        if depth == 0:
            return place
    raise _broken("a parenthesis that is not closed", "one that is")


def _field(value: Any, names: Sequence[str]) -> Any:
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            raise _broken(f"the field {name}", "fields that Ollama's values have")
        value = value[name]
    return value


def _called(function: Callable[..., Any], operands: list[Any], name: str) -> Any:
    try:
        return function(*operands)
    except (TypeError, IndexError, ValueError, KeyError) as failure:
        shown = " ".join(str(each) for each in operands)
        raise _broken(f"{name} {shown:.120}", f"values that it can take: {failure}") from None


def _true(value: Any) -> bool:
    return bool(value)


def _equal(first: Any, *others: Any) -> bool:
    if not others:
        raise TypeError("eq compares two values")
    return any(type(first) is type(other) and first == other for other in others)


def _and(*values: Any) -> Any:
    return next((value for value in values if not _true(value)), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if _true(value)), values[-1])


def _index(value: Any, number: int) -> Any:
    if not 0 <= number < len(value):
        raise IndexError(f"{number} of {len(value)}")
    return value[number]


def _length(value: Any) -> int:
    return len(_bytes(value) if isinstance(value, str) else value)


def _slice(value: Any, begin: int = 0, end: int | None = None) -> Any:
    held = _bytes(value) if isinstance(value, str) else value
    last = len(held) if end is None else end
    if not 0 <= begin <= last <= len(held):
        raise IndexError(f"{begin} to {last} of {len(held)}")
    part = held[begin:last]
    return part.decode(errors="surrogateescape") if isinstance(value, str) else part


def _bytes(text: str) -> bytes:
    """As Go has a text; a slice may begin or end inside a letter."""
    return text.encode(errors="surrogateescape")


_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "eq": _equal, "ne": lambda first, other: not _equal(first, other), "not": lambda value: not _true(value),
    "ge": lambda first, other: first >= other, "and": _and, "or": _or, "len": _length, "index": _index,
    "slice": _slice,
}  # fmt: skip


def _broken(received: str, allowed: str) -> TemplateError:
    return TemplateError(f"the Go template has {received}", allowed=allowed, do="report it with the chat template")
