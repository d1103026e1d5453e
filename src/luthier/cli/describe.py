"""`luthier describe`: the card and the knobs of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from luthier.cli.options import Json
from luthier.cli.show import print_json
from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean


def describe(
    method: Annotated[
        str | None, typer.Argument(help="Method, FAMILY or FAMILY/METHOD; empty lists all.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """What a method does, where it comes from, what it costs, when to use it, and its knobs.

    \b
    Examples:
      luthier describe
      luthier describe lora
    """
    if method is None or method in catalog.families():
        return _list_all(catalog.families() if method is None else (method,), as_json=json)
    found = _called(method)
    if json:
        told = [_described(family, name) for family, name in found]
        # One object in any case: a name may be that of methods of several families.
        print_json(told[0] if len(told) == 1 else {"methods": told})
        return None
    for number, (family, name) in enumerate(found):
        if number:
            typer.echo("")
        _print_method(family, name)
    return None


def _called(method: str) -> list[tuple[str, str]]:
    """The methods of a name in all families, or in that before the name. Raises RecipeError where there are none."""
    family, _, name = method.rpartition("/")
    if found := [each for each in catalog.find(name) if family in ("", each[0])]:
        return found
    # Another module only for names that are no method's: that makes every other answer wait for nothing.
    from luthier.recipes.schemas.presets import PRESETS

    if method in PRESETS:
        parts = [f"{key}s/{value['method']}" for key, value in PRESETS[method].items() if isinstance(value, Mapping)]
        made_of = f"of {', '.join(parts)}" if parts else "that trains nothing: examples come before a question"
        raise RecipeError(
            f"{method} is a preset {made_of}", do=f"luthier describe {parts[0]}" if parts else "luthier compare --help"
        )
    everything = [name for family in catalog.families() for name in catalog.names(family)]
    raise RecipeError(f"no method is called {method!r}", do=did_you_mean(name, everything))


def _described(family: str, name: str) -> dict[str, Any]:
    card = catalog.card(family, name)
    return {"family": family, "method": name, "title": card.title, **card.sections, "knobs": _knobs(family, name)}


def _print_method(family: str, name: str) -> None:
    card, knobs = catalog.card(family, name), _knobs(family, name)
    typer.echo(f"{card.title}\n{family}/{name}\n")
    for key, text in card.sections.items():
        typer.echo(f"{key + ':':<10} {text}")
    typer.echo("\nknobs:" if knobs else "\nno knobs")
    for knob in knobs:
        value = "(has to be given)" if knob["required"] else f"= {knob['default']!r}"
        typer.echo(f"  {knob['name']} {value}\n      {knob['description']}")


def _list_all(families: Sequence[str], *, as_json: bool) -> None:
    cards = [catalog.card(family, name) for family in families for name in catalog.names(family)]
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
