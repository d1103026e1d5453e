"""`luthier reward`: what the reward of a recipe gives for answers that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import Json, Set
from luthier.cli.show import print_json
from luthier.core.imports import uncollected

_SHOWN = 160


def reward(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe of recipe: reinforce.", show_default=False)],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows with answers, and the columns that the reward reads.")
    ],
    column: Annotated[
        str, typer.Option("--column", metavar="NAME", help="The column with the answer.")
    ] = "completion",
    set_: Set = None,
    json: Json = False,
) -> None:
    """Score answers with the reward of a recipe, before a model is trained on it; nothing is written.

    \b
    Examples:
      luthier reward sums.yaml answers.jsonl
      luthier reward kernels.yaml answers.jsonl --column answer --set reward.device=interpreter --json
    """
    with uncollected():
        from luthier.recipes.evaluating.score_answers import score_answers
        from luthier.recipes.schemas.files import load_recipe

    found = score_answers(load_recipe(recipe, overrides=set_ or []).recipe, file, column=column)
    print_json(found) if json else _print(found)


def _print(found: Mapping[str, Any]) -> None:
    """Each answer with its value and why, then the mean of each part."""
    low, high = found["bounds"]
    typer.echo(f"{found['reward']}, from {low:g} to {high:g}")
    for each in found["answers"]:
        value = "no score" if each["value"] is None else f"{each['value']:.4f}"
        reason = " ".join(each["reason"].split())
        typer.echo(f"row {each['row']:<4} {value:>8}  {reason[:_SHOWN]}".rstrip())
    typer.echo("means")
    for name, value in found["means"].items():
        typer.echo(f"  {name:<28} {value:.4f}")
    counts = found["counts"]
    if lost := counts["failed"] + counts["unasked"]:
        typer.echo(f"note: {lost:,} of {counts['samples']:,} answers have no score and are in no mean")
