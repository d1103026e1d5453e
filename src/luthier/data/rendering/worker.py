"""The process that chat templates run in: `python -m luthier.data.rendering.worker PARENT`.

Idea: a template is code of somebody else. It runs in jinja2's immutable sandbox, and because that sandbox has been left
before, it runs in a process that has nothing to give: no environment, no way to open a file or a socket (a limit on
descriptors), little memory, half a second of processor time. The kernel keeps the limits of time and memory, whatever
the template does.
Source: CVE-2024-56326 and CVE-2025-27516 (ways out of the sandbox), CVE-2025-62426 (a template without limits).

Protocol: frames of a length in four bytes and that many bytes. A request is a JSON object. `compile` puts a template
under a `key`. `render` names the key and lists jobs, each a context; it is answered by one frame that says whether the
key is known, and then by one for each job. `outline` is the same for contexts whose contents are left open (see
`symbolic.py`). An answer is one letter (see `Answer`) and a text.
It imports jinja2 and the standard library only, so it starts in 0.1 s.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import StrEnum
from functools import partial
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from luthier.core.child import bound_to_parent
from luthier.data.rendering.symbolic import (
    LookedError,
    Premises,
    joined,
    outline,
    pieces_of,
    symbolic,
    with_slots,
    with_texts,
)

LENGTH: Final = struct.Struct(">I")
MAX_OUTPUT: Final = 4 * 1024 * 1024
"""Characters that one rendering, or one value inside it, may have."""
CPU_SECONDS: Final = 0.5
"""Seconds of processor time that compiling or one rendering may take. Other work on the machine does not count."""
MEMORY: Final = 256 * 1024 * 1024
"""Bytes of address space of this process, itself included."""
LIFE_SECONDS: Final = 3600
"""Seconds of processor time of this process; then it makes room for a new one."""
MAX_TEMPLATES: Final = 64
WARM: Final = r"""{{ 'a\n\u00e9b' | wordwrap(1) }}{{ 1.5 | pprint }}{{ [1, 2] | random }}{{ {'a': 1} | tojson }}
{{ strftime_now('%d %B %Y %H:%M') }}{{ 'a.b' | urlize }}{{ 'é' | urlencode }}{{ '1' | int }}{{ 'a' | title }}"""

_TROUBLE = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    OSError,  # a filter that would import a module: no file can be opened
)
"""What a template can raise. Anything else ends this process, which the parent reports."""


class Answer(StrEnum):
    """The first letter of an answer."""

    COMPILED = "c"  # JSON: what the template looks at
    TEXT = "t"  # the rendered text
    OUTLINE = "o"  # JSON: an outline that is proved
    WORDS = "w"  # what the template, or jinja2, complains about
    LIMIT = "l"  # the limit that was reached; this process is not to be used again
    KNOWN = "k"  # the template of this key is here, and the texts follow
    UNKNOWN = "u"  # it is not, and nothing follows


def main() -> None:
    """Answer requests until standard input ends, or the parent has ended."""
    parent = int(sys.argv[1])
    # The parent may be a short-lived thread of a process that lives on, so the process is watched, not the thread.
    bound_to_parent(thread=False)
    _warm_up()
    _confine()
    known: dict[str, _Known] = {}
    while (request := _next_request(parent)) is not None:
        for kind, words in _answers(request, known):
            body = kind.encode() + words.encode("utf-8", "surrogatepass")
            _write(LENGTH.pack(len(body)) + body)


def _warm_up() -> None:
    """Use what is imported or read from a file at its first use: later no file can be opened any more."""
    environment = _environment(datetime(2026, 1, 1, tzinfo=timezone(timedelta(0))))
    environment.from_string(WARM).render()
    for broken in ("{% if %}", "{{ 1 + 'a' }}"):
        try:
            environment.from_string(broken).render()
        except (jinja2.TemplateError, TypeError):
            continue


def _confine() -> None:
    """Give up what no template needs."""
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_DATA: MEMORY,
        resource.RLIMIT_CPU: LIFE_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        # Standard input, output and error are open; no number is left for a file or a socket.
        resource.RLIMIT_NOFILE: 3,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (allowed, allowed))
        except (ValueError, OSError):  # macOS refuses some; the others and the sandbox remain
            continue


def _next_request(parent: int) -> dict[str, Any] | None:
    size = _read(LENGTH.size, parent)
    body = None if size is None else _read(LENGTH.unpack(size)[0], parent)
    return None if body is None else dict(json.loads(body.decode("utf-8", "surrogatepass")))


def _read(count: int, parent: int) -> bytes | None:
    """That many bytes of standard input; None when it, or the parent, has ended."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    pieces: list[bytes] = []
    while count:
        while not waiting.poll(1000):
            # Where another process holds our standard input open too, its end would not tell.
            if os.getppid() != parent:
                return None
        piece = os.read(0, min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _write(body: bytes) -> None:
    view = memoryview(body)
    while view:
        view = view[os.write(1, view) :]


@dataclass(frozen=True, slots=True)
class _Known:
    """A template that was compiled, and all it needs to be compiled for outlines as well, when one is asked for."""

    template: jinja2.Template
    source: str
    now: datetime
    open: list[jinja2.Template | None]


def _answers(request: dict[str, Any], known: dict[str, _Known]) -> Iterator[tuple[Answer, str]]:
    """The answers, made one by one; a limit that was reached is the last one."""
    key = str(request["key"])
    if request["do"] == "compile":
        if len(known) >= MAX_TEMPLATES:
            known.clear()
        yield _limited(partial(_compile, key, request, known))
    elif key not in known:
        yield Answer.UNKNOWN, ""
    else:
        yield Answer.KNOWN, ""
        work = _outline if request["do"] == "outline" else _render
        for job in request["jobs"]:
            answer = _limited(partial(work, known[key], {**request["tokens"], **job}))
            yield answer
            if answer[0] is Answer.LIMIT:
                return


def _limited(work: Callable[[], tuple[Answer, str]]) -> tuple[Answer, str]:
    # SIGPROF is left as it is: it ends this process, in the middle of a C function too, which a handler could not.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        return work()
    except _LimitError as error:
        return Answer.LIMIT, str(error)
    except MemoryError:
        return Answer.LIMIT, f"it needs more than {MEMORY >> 20} MiB of memory"
    except _TROUBLE as error:
        return Answer.WORDS, str(error) or type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _compile(key: str, request: Mapping[str, Any], known: dict[str, _Known]) -> tuple[Answer, str]:
    seconds, offset, zone = request["now"]
    now = datetime.fromtimestamp(seconds, timezone(timedelta(seconds=offset), zone))
    environment = _environment(now)
    tree = environment.parse(str(request["source"]))
    seen = {
        "calls": _mentions(tree, "tool_calls"),
        "results": _mentions(tree, "tool"),
        "tools": "tools" in jinja2.meta.find_undeclared_variables(tree),
    }
    known[key] = _Known(_compiled(environment, tree), str(request["source"]), now, [])
    return Answer.COMPILED, json.dumps(seen)


def _compiled(environment: _Environment, tree: nodes.Template) -> jinja2.Template:
    template = environment.from_string(tree)
    # A chain of mappings, which each rendering would walk through; nothing is added to it any more.
    template.globals = dict(template.globals)
    return template


def _opened(known: _Known) -> jinja2.Template | None:
    """The template for outlines; None when it uses what these have not."""
    if not known.open:
        environment = _environment(known.now)
        symbolic(environment)
        try:
            known.open.append(_compiled(environment, environment.parse(known.source)))
        except jinja2.TemplateError:
            known.open.append(None)
    return known.open[0]


def _mentions(tree: nodes.Template, name: str) -> bool:
    """Whether the template looks at `name`, as an attribute or as a string."""
    if any(node.attr == name for node in tree.find_all(nodes.Getattr)):
        return True
    return any(node.value == name for node in tree.find_all(nodes.Const))


def _render(known: _Known, context: Mapping[str, Any]) -> tuple[Answer, str]:
    pieces: list[str] = []
    size = 0
    for piece in known.template.generate(context):
        size += len(piece)
        _check(size)
        pieces.append(piece)
    return Answer.TEXT, "".join(pieces)


def _outline(known: _Known, context: Mapping[str, Any]) -> tuple[Answer, str]:
    """The outline of a context whose contents are numbers, or words about why there is none."""
    template, premises = _opened(known), Premises()
    if template is None:
        return Answer.WORDS, "the template cannot be outlined"
    try:
        pieces = pieces_of(joined(template.generate(with_slots(context, premises))))
    except LookedError as looked:
        return Answer.WORDS, f"the template looks at a text: {looked}"
    # That is the proof; two renderings are to show that it is one.
    for filling in _FILLINGS:
        texts = [filling.format(slot=slot) for slot in range(len(context["messages"]))]
        if not premises.hold(texts):
            return Answer.WORDS, "the template looks for something that the fillings hold"
        made = "".join(piece if isinstance(piece, str) else piece.of(texts) for piece in pieces)
        if _render(known, with_texts(context, texts))[1] != made:
            return Answer.WORDS, "the outline is not what the template writes"
    return Answer.OUTLINE, outline(pieces, premises)


_FILLINGS: Final = ("\n {slot}w\u00e9 \n<b>1\t", "x{slot}\n\n y")
"""A text for each slot, with white space around it and without."""


class _LimitError(Exception):
    """A rendering that would become too large."""


def _check(size: int) -> None:
    if size > MAX_OUTPUT:
        raise _LimitError(f"it would write more than {MAX_OUTPUT} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, asking for the size at each call, arithmetic operation and concatenation."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check(max((value for value in args if isinstance(value, int)), default=0))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _BoundedConcat().visit(tree)
        return tree


class _BoundedConcat(NodeTransformer):
    """Turns `a ~ b` into a filter that asks for the size, so that doubling a text does not fill the memory."""

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


def _environment(now: datetime) -> _Environment:
    environment = _Environment()
    # A plain Python function, so a way to this module's globals, and random text is of no use to a chat template.
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _to_json
    environment.filters["luthier_concat"] = _concat
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _concat(parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)


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


if __name__ == "__main__":
    main()
