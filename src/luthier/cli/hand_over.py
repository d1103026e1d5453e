"""`luthier serve RUN --engine NAME --url URL`: hand a run over to an engine that runs, and prove that it took it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected

if TYPE_CHECKING:
    from luthier.infer.dialects import Dialect
    from luthier.recipes.exporting.hand_over import HandedOver

TOKEN: Final = "LUTHIER_ENGINE_TOKEN"
Engine = Annotated[
    str | None, typer.Option(metavar="NAME", help="Hand over to an engine that runs: vllm, luthier, sglang, llama.cpp.")
]
Url = Annotated[str, typer.Option(metavar="URL", help="Its address; its token is LUTHIER_ENGINE_TOKEN.")]
As = Annotated[str, typer.Option("--as", metavar="NAME", help="What the model is called there.")]
There = Annotated[str, typer.Option("--path", metavar="DIR", help="Where the adapter lies on the engine's machine.")]
Rank = Annotated[int, typer.Option("--max-rank", min=1, metavar="N", help="The --max-lora-rank vLLM was started with.")]
Tolerance = Annotated[
    float, typer.Option(min=1e-6, max=10, metavar="X", help="Mean difference of log-probabilities that is let pass.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Load it anew under a name that the engine serves already.")]
_OWN: Final = ("engine", "url", "as_name", "path", "max_rank", "tolerance", "replace")
_COMMON: Final = ("name", "adapter", "json", "insecure_http")


def hands_over(ctx: typer.Context) -> bool:
    """Whether an engine is named. Raises RecipeError for options that go with the other way of serving."""
    given = [name for name in ctx.params if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"]
    named = bool(ctx.params["engine"] or ctx.params["url"])
    if named and not (ctx.params["engine"] and ctx.params["url"]):
        raise RecipeError(f"--engine is {ctx.params['engine']} and --url is {ctx.params['url']!r:.200}",
                          allowed="both or none")  # fmt: skip
    odd = [name for name in given if name not in _COMMON and (name in _OWN) != named]
    if odd:
        shown = ", ".join("--as" if name == "as_name" else f"--{name.replace('_', '-')}" for name in odd)
        what = "a server of our own, and --engine names another" if named else "--engine, which is not there"
        raise RecipeError(f"{shown} goes with {what}", do="leave it out")
    return named


def hand_over(values: Mapping[str, Any]) -> None:
    """Do it, and tell how to ask for it. `values` are the options as they were given."""
    with uncollected():
        from luthier.infer.dialects import dialect_named
        from luthier.infer.wire import Wire
        from luthier.recipes.exporting.hand_over import Wanted, hand_over

    wire = Wire(values["url"], token=os.environ.get(TOKEN, ""), insecure=values["insecure_http"])
    wanted = Wanted(name=values["name"], adapter=values["adapter"], model=values["as_name"], path=values["path"],
                    max_rank=values["max_rank"], tolerance=values["tolerance"], replace=values["replace"])  # fmt: skip
    engine = dialect_named(values["engine"], wire)
    done = hand_over(wanted, engine, told=lambda line: print(line, "...", file=sys.stderr, flush=True))
    if values["json"]:
        print_json(done.as_dict())
    else:
        _tell(done, engine)


def _tell(done: HandedOver, engine: Dialect) -> None:
    """What was found, and a request for it that can be pasted."""
    sync = done.sync
    typer.echo(f"{engine.name} at {engine.wire.shown} computes {done.model or 'the base'} as we do: log-probabilities "
               f"of {sync.tokens} tokens differ by {sync.apart}")  # fmt: skip
    if sync.from_base is not None and sync.share is not None:
        typer.echo(f"it is {sync.from_base} away from the base: {sync.share:.3f} of what the adapter changes")
    if not done.loaded and sync.from_base is not None:
        typer.echo(f"{done.model} was there already and was left as it is")
    path = "/completion" if "model" not in engine.use(done.model) else "/v1/completions"
    asked = {**engine.use(done.model), "prompt": "Hello", "max_tokens": 32}
    token = f' -H "Authorization: Bearer ${TOKEN}"' if engine.wire.token else ""
    typer.echo(f"curl {engine.wire.shown}{path} -H \"Content-Type: application/json\"{token} -d '{dumps(asked)}'")
