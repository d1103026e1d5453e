"""How the commands speak of a run of AI feedback: what is planned, what the judge decided, what became of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from luthier.cli.show import print_origins, print_summary
from luthier.core.units import count_text, percent_text


def print_feedback_plan(origins: Sequence[tuple[str, Any, str]], plan: Mapping[str, Any]) -> None:
    """The resolved recipe, and what would happen stage by stage."""
    print_origins(origins)
    typer.echo(f"\nprompts    {plan['prompts']:,}")
    typer.echo(
        f"answer     {plan['answers']:,} answers of {plan['speaker']}, at most "
        f"{count_text(plan['most_answer_tokens'])} tokens"
    )
    typer.echo(f"judge      {plan['pairs']:,} pairs, each in both orders, by {plan['judge']}")
    stages = "a reward model, then the policy by rollouts" if len(plan["stages"]) > 3 else "the policy"
    typer.echo(f"train      {stages}, with objective {plan['objective']}, on what the judge decides")


def print_feedback(summary: Mapping[str, Any]) -> None:
    """What the judge decided, and what the policy has become."""
    figures = summary["feedback"]
    lost = ", ".join(
        f"{figures[key]:,} {told}"
        for key, told in (("same_answer", "with one answer twice"), ("ties", "ties"), ("failed", "without a verdict"))
        if figures[key]
    )
    typer.echo(
        f"{figures['pairs']:,} pairs became {figures['preferences']:,} preferences{f' ({lost})' if lost else ''}, "
        f"{percent_text(figures['certainty'])} sure in the mean"
    )
    typer.echo(
        f"the judge prefers the first place by {figures['position_bias']:+.3f}; in "
        f"{percent_text(figures['decided_by_place'])} of pairs the place decided (both orders are averaged)"
    )
    policy = summary["policy"]
    for notice in summary["notices"]:
        # Those of the policy's that nobody has seen yet follow with what it did.
        if notice not in policy.get("lessons", ()):
            typer.echo(f"note    {notice}")
    print_summary(policy)
    typer.echo(f"data    {summary['run']}/preferences.jsonl")
