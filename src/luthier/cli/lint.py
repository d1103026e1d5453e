"""`luthier lint`: what other servers will refuse in an adapter, or compute otherwise."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from luthier.cli.options import Json
from luthier.cli.show import print_json
from luthier.core.imports import uncollected


def lint(
    name: Annotated[str, typer.Argument(metavar="RUN|DIR", help="Run with an adapter, or an adapter folder.")],
    server: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="NAME", help="vllm, sglang or llama.cpp; repeatable, all when left out."),
    ] = None,
    max_rank: Annotated[
        int, typer.Option("--max-rank", min=1, metavar="N", help="The --max-lora-rank that vLLM is started with.")
    ] = 16,
    json: Json = False,
) -> None:
    """Tell what other servers refuse in an adapter, or compute otherwise; exits with 65 when there is something.

    \b
    Examples:
      luthier lint runs/2026-11-20-my-first
      luthier lint adapters/my-lora --for vllm --max-rank 64
    """
    with uncollected():
        from luthier.recipes.lint import SERVERS, lint

    servers = tuple(dict.fromkeys(server or SERVERS))
    found = lint(name, servers, max_rank=max_rank)
    if json:
        print_json({"findings": [asdict(each) for each in found]})
    for each in servers:
        own = [finding for finding in found if finding.server == each]
        for finding in own if not json else ():
            typer.echo(f"{each:10} {finding.kind}  {finding.what}; {finding.do}")
        if not own and not json:
            typer.echo(f"{each:10} takes it as it is")
    if found:
        raise typer.Exit(65)
