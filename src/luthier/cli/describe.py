"""`luthier describe`: the card and the knobs of a method."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from luthier.cli.options import Json
from luthier.cli.show import print_json
from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean


def describe(
    method: Annotated[str | None, typer.Argument(help="Method name; empty lists all.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """What a method does, where it comes from, what it costs, when to use it, and its knobs.

    \b
    Examples:
      luthier describe
      luthier describe lora
    """
    if method is None:
        return _list_all(as_json=json)
    found = catalog.find(method)
    if not found:
        everything = [name for family in catalog.families() for name in catalog.names(family)]
        raise RecipeError(f"no method is called {method!r}", do=did_you_mean(method, everything))
    for family, name in found:
        card = catalog.card(family, name)
        knobs = _knobs(family, name)
        if json:
            print_json({"family": family, "method": name, "title": card.title, **card.sections, "knobs": knobs})
            continue
        typer.echo(f"{card.title}\n{family}/{name}\n")
        for key, text in card.sections.items():
            typer.echo(f"{key + ':':<10} {text}")
        typer.echo("\nknobs:" if knobs else "\nno knobs")
        for knob in knobs:
            value = "(has to be given)" if knob["required"] else f"= {knob['default']!r}"
            typer.echo(f"  {knob['name']} {value}\n      {knob['description']}")
    return None


def _list_all(*, as_json: bool) -> None:
    cards = [catalog.card(family, name) for family in catalog.families() for name in catalog.names(family)]
    if as_json:
        print_json({"methods": [{"family": card.family, "method": card.name, "title": card.title} for card in cards]})
        return
    family = ""
    for card in cards:
        if card.family != family:
            family = card.family
            typer.echo(f"{family}:")
        typer.echo(f"  {card.name:<16} {card.title}")


def _knobs(family: str, name: str) -> list[dict[str, Any]]:
    from luthier.core.told_knobs import told_knobs

    return [asdict(each) for each in told_knobs(family, name)]
