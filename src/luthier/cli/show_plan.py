"""How a plan is printed: a table with a bar of its parts, whether it fits, and what would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import typer

from luthier.core.units import bytes_text, count_text, duration_text, percent_text, rate_text

BAR: Final = 48
"""Letters of the bar."""
LETTERS: Final = {
    "weights": "W", "trained": "T", "gradients": "G", "optimizer": "O", "activations": "A", "working": "w",
    "libraries": "l", "saving": "s", "cache": "C",
}  # fmt: skip
"""The parts of memory, in the order in which they are stacked."""


def print_needs(plan: Mapping[str, Any]) -> None:
    """What training takes, for people."""
    parameters, memory, speed = plan["parameters"], plan["memory"], plan["speed"]
    total, trained = parameters["total"], parameters["trained"]
    typer.echo(f"parameters {count_text(total)}, {count_text(trained)} trained ({percent_text(trained / total)})")
    _print_memory(memory, plan["fits"])
    if memory["host"]:
        typer.echo(f"host       {bytes_text(memory['host'])} in its memory")
    again = f", {memory['recomputed']} of {memory['blocks']} blocks made again" if memory["recomputed"] else ""
    typer.echo(f"pass       {memory['tokens']:,} tokens at once, rows of {memory['longest']:,}{again}")
    cut = plan["plan"]["data"]["rendered"] if "plan" in plan else {}
    if cut.get("truncated") or cut.get("dropped"):
        typer.echo(f"rows       {cut['truncated']:,} truncated, {cut['dropped']:,} dropped")
    if handbook := plan.get("handbook"):
        logits, total = bytes_text(handbook["logits"]), bytes_text(handbook["total"])
        typer.echo(f"handbooks  {total} in other engines: 18 bytes a trained parameter, and logits of {logits} at once")
    typer.echo(f"work       {count_text(plan['flops_per_token'])}FLOP a token")
    if plan["seconds_per_1k_tokens"] is None:
        typer.echo("time       unknown: the device is not here; name its rate with --tflops")
    else:
        rate = rate_text(speed["flops_per_second"])
        typer.echo(
            f"time       at least {_seconds_text(plan['seconds_per_1k_tokens'])} for 1,000 tokens: products at {rate}"
            f"{' each' if speed['devices'] > 1 else ''}, {percent_text(speed['efficiency'])} of it reached"
        )
    if cost := plan.get("cost"):
        _print_cost(cost)
    if (largest := plan.get("largest")) and largest["batch"] is not None:
        rows, row = _at_least(largest, "batch"), _at_least(largest, "sequence")
        typer.echo(f"largest    {rows} rows of {memory['longest']:,} tokens at once, or one row of {row}")
    _print_advice(plan.get("advice") or ())
    _print_notices(plan["notices"])


def print_inference(plan: Mapping[str, Any], clients: int, context: int) -> None:
    """What answering takes, for people."""
    memory, largest = plan["memory"], plan["largest"]
    typer.echo(f"parameters {count_text(plan['parameters']['total'])}")
    _print_memory(memory, plan["fits"])
    each = bytes_text(memory["cache_per_client"])
    typer.echo(
        f"cache      {bytes_text(memory['cache_per_token'])} a token, {each} a text of {context:,}; {clients:,} of them"
    )
    typer.echo(f"handbooks  1.2 x weights = {bytes_text(memory['rule_of_thumb'])}, caches left out")
    typer.echo(
        f"work       {count_text(plan['flops_per_token'])}FLOP a new token, {count_text(plan['prefill_flops'])}FLOP to "
        "read a text"
    )
    if plan["seconds_per_1k_tokens"] is None:
        typer.echo("time       unknown: name the rates of the device with --tflops and --bandwidth")
    else:
        typer.echo(
            f"time       at least {_seconds_text(plan['seconds_per_1k_tokens'])} for 1,000 new tokens of all; products "
            f"are what takes time from {plan['ridge_rows']:,.0f} texts up"
        )
    if largest["clients"] is not None:
        texts, longest = _at_least(largest, "clients"), _at_least(largest, "context")
        typer.echo(f"largest    {texts} texts of {context:,} tokens, or {clients:,} of {longest}")
    _print_notices(plan["notices"])


def print_explained(formulas: Mapping[str, str]) -> None:
    """The formulas, if they were asked for."""
    if formulas:
        typer.echo("formulas")
    for name, text in formulas.items():
        typer.echo(f"  {name:<14} {text}")


def bar(parts: Mapping[str, int], whole: float, *, width: int = BAR) -> str:
    """Parts as letters, stacked; dots for what is left of the whole, `|` where that ends."""
    total = sum(parts.values())
    scale = width / max(total, whole, 1)
    letters, reach = "", 0.0
    for name, size in parts.items():
        reach += size * scale
        letters += LETTERS[name] * (round(reach) - len(letters))
    letters = letters.ljust(width if whole else len(letters), ".")
    end = round(whole * scale)
    return f"{letters[:end]}|{letters[end:].rstrip('.')}" if whole else letters


def _print_memory(memory: Mapping[str, Any], fits: bool | None) -> None:
    """Total and parts, with the bar and what its letters mean."""
    available = memory["available"]
    parts = {name: memory[name] for name in LETTERS if memory.get(name)}
    verdict = {None: "", True: ": it fits", False: ": it does not fit"}[fits]
    of = "" if available is None else f" of {bytes_text(available)}"
    typer.echo(f"memory     {bytes_text(memory['total'])}{of}{verdict}")
    typer.echo(f"           [{bar(parts, available or 0)}]")
    for name, size in parts.items():
        share = percent_text(size / memory["total"])
        typer.echo(f"           {LETTERS[name]} {name:<12} {bytes_text(size):>9} {share:>8}")


def _at_least(largest: Mapping[str, Any], name: str) -> str:
    """What fits, and whether it was the most that was tried."""
    return f"{'at least ' if name in largest['at_least'] else ''}{largest[name]:,}"


def _print_cost(cost: Mapping[str, Any]) -> None:
    if cost["seconds"] is None:
        return
    price = "" if cost["price"] is None else f", for {cost['price']:,.2f}"
    typer.echo(f"run        {count_text(cost['tokens'])} tokens: at least {duration_text(cost['seconds'])}{price}")


def _print_advice(changes: Sequence[Mapping[str, Any]]) -> None:
    """What would fit, cheapest first."""
    for change in changes:
        mark = "fits with " if change["fits"] else "not enough"
        typer.echo(
            f"{mark} {change['change']}: {bytes_text(change['total'])} ({change['price']}); "
            f"--set {' --set '.join(change['set'])}"
        )


def _seconds_text(seconds: float) -> str:
    """Three digits, and from where these would need an exponent the units of a clock."""
    return f"{seconds:.3g} s" if seconds < 1000 else duration_text(seconds)


def _print_notices(notices: Sequence[str]) -> None:
    for notice in notices:
        typer.echo(f"note       {notice}")
