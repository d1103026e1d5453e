"""How the commands speak of a run of several adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from luthier.cli.show import print_notices
from luthier.core.units import bytes_text, count_text, duration_text


def print_several(summary: Mapping[str, Any], *, again: bool = False) -> None:
    """What a run of several adapters did: all of them together, and what has become of each; as `print_summary`."""
    tokens = summary["tokens"]
    typer.echo(
        f"{summary['status']}: {len(summary['adapters'])} adapters, {summary['steps']:,} steps, "
        f"{duration_text(summary['train_seconds'])} of training"
    )
    typer.echo(
        f"{count_text(tokens['total'])} tokens ({count_text(tokens['trained'])} trained), "
        f"{summary['tokens_per_second']:,.0f} tokens/s, peak memory {bytes_text(summary['peak_memory_bytes'])}"
    )
    for name, each in summary["adapters"].items():
        loss = each["loss"]
        told = "nothing was held out"
        if loss["eval"] is not None and loss["eval_first"] is not None:
            told = f"held-out loss {loss['eval_first']:.4f} -> {loss['eval']:.4f}"
        typer.echo(f"{name}: {told} in {each['steps']:,} steps; {each['result']}")
    print_notices(summary, again=again)
    first = next(iter(summary["adapters"].values()))
    typer.echo(f'next    luthier generate {first["run"]} --prompt "..."')


def print_several_plans(recipe: Mapping[str, Any], plans: Mapping[str, Mapping[str, Any]]) -> None:
    """The resolved recipe, and what would happen to each adapter."""
    # Not at the top: every command imports this file, and takes long enough to begin without it.
    import yaml

    typer.echo(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120))
    for name, plan in plans.items():
        typer.echo(
            f"{name}: {plan['data']['train_views']:,} rows to train, {plan['data']['held_out_views']:,} held out, "
            f"{count_text(plan['trainable_parameters'])} parameters trained with {plan['adapter']['method']}, "
            f"{plan['steps']:,} steps"
        )
        for notice in plan["notices"]:
            typer.echo(f"note: {name}: {notice}")
