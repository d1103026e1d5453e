"""`luthier generate`: let a run or a model answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import Json, require_no_lost_run
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected

if TYPE_CHECKING:
    from luthier.model.speaker import Spoken


def generate(
    name: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder, hub id, or seedling.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; repeat it for several, or - to read stdin."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="Adapter folder (PEFT format) to put on a model.")
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="X", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Draw from the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Draw from the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text at which an answer ends; repeatable.")
    ] = None,
    precision: Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16.")] = "auto",
    json: Json = False,
) -> None:
    """Answer prompts with a tuned or a base model.

    \b
    Examples:
      luthier generate runs/2026-11-20-my-first --prompt "Write as JSON: ..."
      luthier generate seedling --prompt "What is 7 + 5?" --temperature 0.8 --seed 1
    """
    with uncollected():
        from luthier.model.speaker import Sampling
        from luthier.recipes.opened import open_named

    prompts = [sys.stdin.read() if text == "-" else text for text in prompt or []]
    if not prompts:
        raise RecipeError("no prompt was given", do='add --prompt "your text", or --prompt - to read stdin')
    if precision not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"precision is {precision!r}", allowed="auto, float32 or bfloat16")
    require_no_lost_run(name)
    opened = open_named(name, adapter=adapter, precision=precision)  # type: ignore[arg-type]  # checked above
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=opened.stop_ids,
        stop=tuple(stop or ()),
    )
    spoken = opened.engine.speak([opened.prompt(text, system=system, raw=raw) for text in prompts], sampling)
    texts = [opened.text(answer.tokens) for answer in spoken]
    _print_json(prompts, texts, spoken) if json else _print(prompts, texts)


def _print_json(prompts: Sequence[str], texts: Sequence[str], spoken: Sequence[Spoken]) -> None:
    answers = [
        {"prompt": text, "text": said, "tokens": [int(token) for token in answer.tokens], "ended": answer.ended,
         "log_probs": answer.log_probs}
        for text, said, answer in zip(prompts, texts, spoken, strict=True)
    ]  # fmt: skip
    print_json({"answers": answers})


def _print(prompts: Sequence[str], texts: Sequence[str]) -> None:
    for text, said in zip(prompts, texts, strict=True):
        if len(texts) > 1:
            typer.echo(f"> {text}")
        typer.echo(said)
