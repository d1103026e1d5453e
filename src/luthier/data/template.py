"""Chat templates: messages to text, in a sandbox.

Idea: a template is untrusted code of somebody else, so it runs in jinja2's immutable sandbox with a limit on what it
writes and on how long it takes. It gets what transformers would give it, so both write the same text. The clock stands
still while a template lives: all rows of a run show the same date.

Which template: the model's own ("auto"), one that ships with luthier (by name), or a .jinja file (by path).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, final

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from luthier.core.errors import RecipeError, StorageError, TemplateError
from luthier.core.nearest import did_you_mean
from luthier.data.tokenizer import Tokenizer

MAX_OUTPUT = 4 * 1024 * 1024
"""Characters that one rendering, or one value inside it, may have."""

MAX_SECONDS = 5.0
"""Seconds that one rendering may take."""

SHIPPED: tuple[str, ...] = ("instruction", "chatml")
FALLBACK = "instruction"

_TROUBLE = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template can raise; anything else is an error of luthier and must be seen."""


@final
class Template:
    """A compiled chat template; `source` is the text to save with a model."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, name: str, now: datetime | None = None
    ) -> None:
        self.source = source
        self.name = name
        self.special_tokens = dict(special_tokens)
        day = (now or datetime.now(UTC).astimezone()).replace(hour=0, minute=0, second=0, microsecond=0)
        self._budget = _Budget()
        environment = _environment(self._budget, day)
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(tree)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}", where=name) from error
        self.knows_calls = _mentions(tree, "tool_calls")
        self.knows_results = _mentions(tree, "tool")
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        dated = day.date().isoformat() if "strftime_now" in source else ""
        state = json.dumps([source, sorted(self.special_tokens.items()), dated])
        self.digest = hashlib.sha256(state.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of `messages`; raises TemplateError with the template's own words."""
        context = {
            **self.special_tokens,
            "messages": _plain(messages),
            "tools": _plain(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        self._budget.start()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._compiled.generate(context):
                size += len(piece)
                self._budget.check(size)
                pieces.append(piece)
        except _TROUBLE as error:
            words = str(error) or type(error).__name__
            raise TemplateError(f"the chat template says: {words}", where=self.name) from error
        return "".join(pieces)


def choose(
    choice: str, tokenizer: Tokenizer, *, notice: Callable[[str], None], now: datetime | None = None
) -> Template:
    """The template that `choice` names, for this tokenizer; `notice` hears when "auto" has to fall back."""
    own = tokenizer.chat_template
    tokens = tokenizer.special_tokens
    if choice == "auto" and own is not None:
        return Template(own, tokens, name="the model's own chat template", now=now)
    name = choice
    if choice == "auto":
        name = FALLBACK
        notice(f"the model has no chat template; luthier's {FALLBACK!r} template is used (set data.template to choose)")
    if name in SHIPPED:
        source = (resources.files("luthier.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        # Servers add no BOS to a chat, so a template that is to be saved with the model has to write it.
        if tokenizer.adds_bos:
            source = "{{- bos_token -}}" + source
        return Template(source, tokens, name=name, now=now)
    path = Path(choice).expanduser()
    if path.suffix != ".jinja":
        raise RecipeError(
            f"no chat template is called {choice!r}",
            allowed="auto, " + ", ".join(SHIPPED) + ", or a path to a .jinja file",
            do=did_you_mean(choice, ("auto", *SHIPPED)),
            where="data.template",
        )
    try:
        return Template(path.read_text(encoding="utf-8"), tokens, name=str(path), now=now)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the chat template cannot be read: {error}", where=str(path)) from error


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._deadline = float("inf")

    def start(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS

    def check(self, size: int = 0) -> None:
        if size > MAX_OUTPUT:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_OUTPUT} characters were written")
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"rendering took more than {MAX_SECONDS:g} seconds")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, asking the budget at each call, arithmetic operation and concatenation."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, budget: _Budget) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self._budget = budget

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._budget.check(max((value for value in args if isinstance(value, int)), default=0))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._budget.check(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _BoundedConcat().visit(tree)
        return tree


class _BoundedConcat(NodeTransformer):
    """Turns `a ~ b` into a filter that asks the budget, so that doubling a text does not fill the memory."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (the visitor's naming)
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "luthier_concat", [], [], None, None).set_lineno(node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers in some templates. Only its text matters here; the renderer proves the rest."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment(budget: _Budget, now: datetime) -> _Environment:
    def concat(parts: Sequence[Any]) -> str:
        texts = [str(part) for part in parts]
        budget.check(sum(map(len, texts)))
        return "".join(texts)

    environment = _Environment(budget)
    environment.filters["tojson"] = _to_json
    environment.filters["luthier_concat"] = concat
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own tojson escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _result_size(operator: str, left: Any, right: Any) -> int:
    """About how large the result of an operation may become; 0 for what cannot grow."""
    if operator == "*" and isinstance(right, int):
        return _length(left) * right
    if operator == "*" and isinstance(left, int):
        return left * _length(right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right
    if operator == "%" and isinstance(left, str):
        widths = "".join(sign if sign.isdigit() else " " for sign in left).split()
        return max((int(width) for width in widths), default=0)
    return _length(left) + _length(right)


def _mentions(tree: nodes.Template, name: str) -> bool:
    """Whether the template looks at `name`, as an attribute or as a string."""
    if any(node.attr == name for node in tree.find_all(nodes.Getattr)):
        return True
    return any(node.value == name for node in tree.find_all(nodes.Const))


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON types, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TemplateError(f"a message holds a {type(value).__name__}", allowed="JSON values")
