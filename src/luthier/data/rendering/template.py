"""Chat templates: messages to text, in a process of its own.

Idea: a template is untrusted code of somebody else. It is compiled and rendered by `worker.py`, in a sandbox
inside a process without files, with limits of processor time (half a second each), memory and output. It gets what
transformers would give it, so both write the same text. The clock stands still while a template lives: all rows of a
run show the same date.

Which template: the model's own ("auto"), one that ships with luthier (by name), or a .jinja file (by path).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import RecipeError, StorageError, TemplateError
from luthier.core.nearest import did_you_mean
from luthier.data.rendering.process import Program, RenderProcess, Seen
from luthier.data.tokenizer import Tokenizer

MAX_SOURCE: Final = 1024 * 1024
"""Characters of a template; the longest in use have fifty thousand."""
SHIPPED: tuple[str, ...] = ("instruction", "chatml")
FALLBACK = "instruction"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One rendering that is asked for."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = False


@final
class Template:
    """A compiled chat template; `source` is the text to save with a model.

    Templates given the same `process` share it, otherwise each has its own, which ends with it. One that is not
    compiled `at_once` is with `compile`, or when something is first asked of it: rows that are cached need no process.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        name: str,
        now: datetime | None = None,
        process: RenderProcess | None = None,
        at_once: bool = True,
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source)} characters", allowed=f"at most {MAX_SOURCE}", where=name
            )
        self.source = source
        self.name = name
        self.special_tokens = dict(special_tokens)
        day = (now or datetime.now(UTC).astimezone()).replace(hour=0, minute=0, second=0, microsecond=0)
        offset, zone = day.utcoffset(), day.tzname()
        dated = day.date().isoformat() if "strftime_now" in source else ""
        state = json.dumps([source, sorted(self.special_tokens.items()), dated])
        self.digest = hashlib.sha256(state.encode()).hexdigest()
        self._program = Program(
            # Templates that share a process may differ in their day or tokens only.
            key=hashlib.sha256(f"{self.digest} {day.isoformat()} {zone}".encode()).hexdigest(),
            name=name,
            source=source,
            now=(day.timestamp(), offset.total_seconds() if offset else 0.0, zone or "UTC"),
            tokens=self.special_tokens,
        )
        self._process = process or RenderProcess()
        self._ahead: dict[str, str | TemplateError] = {}
        self._seen = self._process.compile(self._program) if at_once else None

    def compile(self) -> Seen:
        """What the template looks at. Raises TemplateError with jinja2's words when it does not compile."""
        if self._seen is None:
            self._seen = self._process.compile(self._program)
        return self._seen

    @property
    def pid(self) -> int | None:
        """The number of its process; None when there is none."""
        return self._process.pid

    @property
    def knows_calls(self) -> bool:
        """Whether it has a place for tool calls."""
        return self.compile().calls

    @property
    def knows_results(self) -> bool:
        """Whether it has a place for the results of tools."""
        return self.compile().results

    @property
    def knows_tools(self) -> bool:
        """Whether it has a place for tools on offer."""
        return self.compile().tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of `messages`; raises TemplateError with the template's own words, or the limit it reached."""
        job = _job(Wanted(messages, tools, add_generation_prompt), {})
        made = self._ahead.get(job)
        if made is None:
            made = self._process.render(self._program, [job])[0]
        if isinstance(made, TemplateError):
            raise TemplateError(made.received, allowed=made.allowed, do=made.do, where=made.where)
        return made

    def render_many(self, wanted: Sequence[Wanted]) -> list[str | TemplateError]:
        """What `render` would return or raise for each of `wanted`, in one exchange with the process.

        The outcomes are remembered until the next call: who knows what a row will need asks once, ahead.
        """
        written: dict[int, str] = {}
        jobs = [_job(one, written) for one in wanted]
        made = self._process.render(self._program, jobs)
        self._ahead = dict(zip(jobs, made, strict=True))
        return made

    def outlines(self, wanted: Sequence[Wanted]) -> list[str | None]:
        """What is written around the contents of `wanted` that are numbers, as JSON (see `outline.py`)."""
        written: dict[int, str] = {}
        return self._process.outline(self._program, [_job(one, written) for one in wanted])

    def close(self) -> None:
        """End the process; it is started again when it is needed."""
        self._process.close()


def _job(wanted: Wanted, written: dict[int, str]) -> str:
    """What the template sees of one rendering, besides the special tokens, as JSON.

    `written` are messages of the same call by identity: most of them stand in several renderings.
    """
    try:
        messages = ", ".join([written.get(id(each)) or _written(each, written) for each in wanted.messages])
        tools = json.dumps(_plain(wanted.tools) or None, ensure_ascii=False)
    except (RecursionError, ValueError) as error:  # ValueError: a number of very many digits
        raise TemplateError(f"a message cannot be written as JSON: {error}") from None
    ask = "true" if wanted.add_generation_prompt else "false"
    return f'{{"messages": [{messages}], "tools": {tools}, "documents": null, "add_generation_prompt": {ask}}}'


def _written(message: Mapping[str, Any], written: dict[int, str]) -> str:
    text = written[id(message)] = json.dumps(_plain(message), ensure_ascii=False)
    return text


def choose(
    choice: str,
    tokenizer: Tokenizer,
    *,
    notice: Callable[[str], None],
    now: datetime | None = None,
    at_once: bool = True,
) -> Template:
    """The template that `choice` names, for this tokenizer; `notice` hears when "auto" has to fall back.

    Without `at_once` it is compiled later (see `Template`).
    """
    own = tokenizer.chat_template
    tokens = tokenizer.special_tokens
    if choice == "auto" and own is not None:
        return Template(own, tokens, name="the model's own chat template", now=now, at_once=at_once)
    name = choice
    if choice == "auto":
        name = FALLBACK
        notice(f"the model has no chat template; luthier's {FALLBACK!r} template is used (set data.template to choose)")
    if name in SHIPPED:
        source = (resources.files("luthier.data.rendering") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        # Servers add no BOS to a chat, so a template that is to be saved with the model has to write it.
        if tokenizer.adds_bos:
            source = "{{- bos_token -}}" + source
        return Template(source, tokens, name=name, now=now, at_once=at_once)
    path = Path(choice).expanduser()
    if path.suffix != ".jinja":
        raise RecipeError(
            f"no chat template is called {choice!r}",
            allowed="auto, " + ", ".join(SHIPPED) + ", or a path to a .jinja file",
            do=did_you_mean(choice, ("auto", *SHIPPED)),
            where="data.template",
        )
    try:
        return Template(path.read_text(encoding="utf-8"), tokens, name=str(path), now=now, at_once=at_once)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the chat template cannot be read: {error}", where=str(path)) from error


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON types, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TemplateError(f"a message holds a {type(value).__name__}", allowed="JSON values")
