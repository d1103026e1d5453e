"""`luthier generate`: let a run or a model answer, alone or beside others."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import DRAFTED, DraftModel, Drafts, Json, require_no_lost_run
from luthier.cli.show import print_json
from luthier.core.errors import DataError, MissingError, RecipeError
from luthier.core.imports import uncollected

if TYPE_CHECKING:
    from luthier.infer.engine import Engine
    from luthier.infer.guides import Guide
    from luthier.infer.request import Request
    from luthier.model.speaker import Sampling, Spoken
    from luthier.recipes.opening.opened import Opened


Answers = list[list[list[tuple[str, "Spoken"]]]]
"""By model, prompt and choice: the text, and the tokens it was made of."""

Name = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder, hub id, or seedling.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; repeat it for several, or - to read stdin."),
]
Adapter = Annotated[str | None, typer.Option(metavar="DIR", help="Adapter folder (PEFT format) to put on a model.")]
Beside = Annotated[list[str] | None, typer.Option(metavar="RUN|MODEL", help="Let this one answer too; repeatable.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="System message.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="X", help="0 is greedy.")]
TopK = Annotated[int, typer.Option(metavar="N", help="Draw from the k likeliest tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(metavar="X", help="Draw from the likeliest tokens that reach this probability.")]
MinP = Annotated[
    float, typer.Option(metavar="X", help="Draw from tokens with this share of the likeliest's probability.")
]
RepetitionPenalty = Annotated[float, typer.Option(metavar="X", help="Above 1: less of what is there already.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the draws.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text at which an answer ends; repeatable.")]
Choices = Annotated[int, typer.Option(metavar="N", help="Answers to each prompt.")]
Beams = Annotated[int, typer.Option(metavar="N", help="Search for the likeliest answer with so many beams.")]
Schema = Annotated[Path | None, typer.Option(metavar="FILE", help="JSON schema that answers fit (extra: guided).")]
Regex = Annotated[str, typer.Option(metavar="PATTERN", help="Regular expression that answers match (extra: guided).")]
OneOf = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="A text that may be the answer; repeat it for each.")
]
Quantize = Annotated[
    str, typer.Option("--quantizer", metavar="NAME", help="Pack the weights, head included: int8, nf4, ...")
]
Precision = Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16.")]


def generate(
    name: Name,
    prompt: Prompts = None,
    adapter: Adapter = None,
    beside: Beside = None,
    system: System = "",
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    choices: Choices = 1,
    beams: Beams = 1,
    schema: Schema = None,
    regex: Regex = "",
    one_of: OneOf = None,
    drafts: Drafts = 0,
    draft_model: DraftModel = None,
    quantizer: Quantize = "none",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Answer prompts with a tuned or a base model.

    \b
    Examples:
      luthier generate runs/2026-11-20-my-first --beside seedling --prompt "What is 7 + 5?"
      luthier generate seedling --prompt "What is 7 + 5?" --temperature 0.8 --seed 1 --choices 3
    """
    with uncollected():
        from luthier.model.speaker import Sampling

    prompts = _prompts(prompt or [])
    _check(precision, adapter, beside or [])
    form = _Form(_schema(schema), regex, tuple(one_of or ()))
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    names = [name, *(beside or [])]
    answers: Answers = []
    for each in names:
        opened = _opened(each, draft_model, adapter=adapter, precision=precision, quantizer=quantizer)
        engine = opened.engine
        requests = _requests(
            opened, prompts, sampling, form, system=system, raw=raw, choices=choices, beams=beams,
            drafts=drafts or DRAFTED * bool(draft_model),
        )  # fmt: skip
        if max(len(requests), choices, len(names)) == 1 and not json:
            _stream(opened, requests[0], engine)
            return
        spoken = engine.answer(requests, draws=range(0, len(requests) * choices, choices))
        _tell_drafts(engine)
        answers.append([[(opened.text(one.tokens, sampling.stop), one) for one in own] for own in spoken])
    show = _print_json if json else _print_beside if len(names) > 1 else _print
    show(names, prompts, answers)


def _opened(name: str, draft_model: str | None, *, adapter: str | None, precision: str, quantizer: str) -> Opened:
    """What a name stands for, with the model that goes ahead of it if there is one."""
    with uncollected():
        from luthier.model.spoken import is_told
        from luthier.recipes.drafting import with_draft_model
        from luthier.recipes.opening.opened import open_named
        from luthier.recipes.opening.quantized import quantizer_named

    require_no_lost_run(name)
    packed = quantizer_named(quantizer)
    opened = open_named(
        name, adapter=adapter, precision=precision, quantizer=packed, speaks=True  # type: ignore[arg-type]
    )
    if told := is_told(opened.model.notices):
        typer.echo(f"{told} (--precision float32 for the other)", err=True)
    if draft_model is None:
        return opened
    return with_draft_model(opened, draft_model, precision=precision)  # type: ignore[arg-type]


def _check(precision: str, adapter: str | None, beside: Sequence[str]) -> None:
    if precision not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"precision is {precision!r}", allowed="auto, float32 or bfloat16")
    if adapter and beside:
        raise RecipeError(
            f"--adapter {adapter} and --beside {beside[0]} were given",
            allowed="one of them",
            do="name a run that has the adapter",
        )


def _prompts(given: Sequence[str]) -> list[str]:
    if not given:
        raise RecipeError("no prompt was given", do='add --prompt "your text", or --prompt - to read stdin')
    return [sys.stdin.read() if text == "-" else text for text in given]


class _Form:
    """What answers are to look like, at most one of the three."""

    def __init__(self, schema: dict[str, object] | None, regex: str, one_of: tuple[str, ...]) -> None:
        self.schema, self.regex, self.one_of = schema, regex, one_of
        given = [name for name, each in (("--schema", schema), ("--regex", regex), ("--one-of", one_of)) if each]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} were given", allowed="one of them")

    def guide(self, opened: Opened) -> Callable[[], Guide] | None:
        """What bounds an answer of this model."""
        if self.schema is None and not self.regex and not self.one_of:
            return None
        from luthier.infer.grammars import Grammars

        grammars = Grammars(opened.tokenizer, stops=frozenset(opened.stop_ids))
        if self.schema is not None:
            return grammars.json_schema(self.schema)
        return grammars.regex(self.regex) if self.regex else grammars.choices(self.one_of)


_SCHEMA = 'write one JSON schema into it, such as {"type": "object", "required": ["name"]}'


def _schema(path: Path | None) -> dict[str, object] | None:
    if path is None:
        return None
    if not path.is_file():
        raise MissingError(f"--schema: there is no file {path}", do="check the path")
    try:
        found = json_module.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as failure:
        raise DataError(f"it is no JSON: {failure}", where=str(path), do=_SCHEMA) from None
    if not isinstance(found, dict):
        raise DataError(f"it holds a {type(found).__name__}", where=str(path), do=_SCHEMA)
    return found


def _requests(
    opened: Opened,
    prompts: Sequence[str],
    sampling: Sampling,
    form: _Form,
    *,
    system: str,
    raw: bool,
    choices: int,
    beams: int,
    drafts: int,
) -> list[Request]:
    from dataclasses import replace

    from luthier.infer.request import Request

    own, guide = replace(sampling, stop_ids=opened.stop_ids), form.guide(opened)
    return [
        Request(prompt=opened.prompt(text, system=system, raw=raw), sampling=own, choices=choices, beams=beams,
                guide=guide, drafts=drafts)
        for text in prompts
    ]  # fmt: skip


def _tell_drafts(engine: Engine) -> None:
    """How many tokens of drafts were right, beside the answers."""
    counts = engine.counts
    if counts.drafted:
        typer.echo(f"drafts: {counts.agreed} of {counts.drafted} tokens were right", err=True)


def _stream(opened: Opened, request: Request, engine: Engine) -> None:
    """An answer, as it grows."""
    for piece in opened.stream(request, engine):
        sys.stdout.write(piece)
        sys.stdout.flush()
    typer.echo()
    _tell_drafts(engine)


def _print_json(names: Sequence[str], prompts: Sequence[str], answers: Answers) -> None:
    several = any(len(own) > 1 for one in answers for own in one)
    found = [
        {"prompt": text, **({"model": name} if len(names) > 1 else {}), **({"choice": choice} if several else {}),
         "text": said, "tokens": [int(token) for token in answer.tokens], "ended": answer.ended,
         "log_probs": answer.log_probs}
        for name, one in zip(names, answers, strict=True)
        for text, own in zip(prompts, one, strict=True)
        for choice, (said, answer) in enumerate(own)
    ]  # fmt: skip
    print_json({"answers": found})


def _print(names: Sequence[str], prompts: Sequence[str], answers: Answers) -> None:
    for text, own in zip(prompts, answers[0], strict=True):
        if len(prompts) > 1:
            typer.echo(f"> {text}")
        for said, _ in own:
            typer.echo(f"- {said}" if len(own) > 1 else said)


def _print_beside(names: Sequence[str], prompts: Sequence[str], answers: Answers) -> None:
    """A column for each model, a row for each prompt."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, expand=False)
    for title in ("prompt", *names):
        table.add_column(Text(title), overflow="fold", ratio=1)
    for index, text in enumerate(prompts):
        said = ["\n".join(each for each, _ in one[index]) for one in answers]
        table.add_row(*map(Text, (text, *said)))
    Console().print(table)
