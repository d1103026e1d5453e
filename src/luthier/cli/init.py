"""`luthier init`: write a commented recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import DryRun, Json, Set
from luthier.cli.show import print_json
from luthier.core.errors import RefusedError
from luthier.store.files import write_text


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(metavar="NAME", help="Base model: hub id, folder, or seedling.")] = "seedling",
    data: Annotated[str, typer.Option(metavar="FILE", help="Training data file.")] = "rows.jsonl",
    set_: Set = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write a recipe with every knob, its meaning and its default.

    \b
    Examples:
      luthier init
      luthier init mine.yaml --model Qwen/Qwen2.5-0.5B --data my_rows.jsonl --set adapter.method=ia3
    """
    from luthier.recipes.schemas.files import write_template

    text = write_template(model=model, data=data, overrides=set_ or [])
    if dry_run:
        print_json({"recipe": str(path), "text": text}) if json else typer.echo(text, nl=False)
        return
    if path.exists():
        raise RefusedError(f"{path} exists and is not overwritten", do="name another file, or remove it first")
    write_text(path, text)
    print_json({"recipe": str(path)}) if json else typer.echo(f"wrote {path}; next: luthier train {path}")
