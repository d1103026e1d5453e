"""`luthier eval`: the held-out loss or reward of a run's result, computed anew, or the proof of the result repeated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import Json, Run, run_named
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected
from luthier.core.units import bytes_text


def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Another data file; empty takes the held-out rows.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Repeat the proof of the saved result: bytes, tensors, base, loss.")
    ] = False,
    json: Json = False,
) -> None:
    """Loss of base and tuned model on held-out rows, from the files of the run; or their reward on held-out prompts.

    \b
    Examples:
      luthier eval runs/2026-11-20-my-first --data other_rows.jsonl --json
      luthier eval runs/2026-11-20-my-first --verify
    """
    if verify:
        if data is not None:
            raise RecipeError("--verify and --data are both given", allowed="one of them: the proof has its own rows")
        from luthier.recipes.proving.verify import verify_run

        proved = verify_run(run_named(run))
        if json:
            print_json(proved)
        else:
            _print_proof(proved)
        return
    with uncollected():
        from luthier.recipes.evaluating.evaluate import evaluate_run

    found = evaluate_run(run_named(run), data=data)
    if json:
        print_json(found)
        return
    if "prompts" in found:
        _print_rewards(found)
        return
    typer.echo(f"rows {found['rows']}, trained tokens {found['trained_tokens']}")
    for who in ("base", "tuned"):
        rest = "  ".join(f"{name} {value:.3f}" for name, value in found[who].items() if name != "loss")
        typer.echo(f"{who:5} loss {found[who]['loss']:.4f}  {rest}")


def _print_rewards(found: Mapping[str, Any]) -> None:
    """What greedy answers are worth: the reward, then its parts one by one."""
    typer.echo(f"prompts {found['prompts']:,}, answered greedily")
    for name in dict.fromkeys([*found["base"], *found["tuned"]]):
        numbers = (found[who].get(name) for who in ("base", "tuned"))
        typer.echo(f"{name:20} " + " -> ".join("-" if value is None else f"{value:.4f}" for value in numbers))
    for who, count in found["not_scored"].items():
        if count:
            typer.echo(f"note: {count:,} answers of the {who} model could not be scored and are in no mean")


def _print_proof(proved: Mapping[str, Any]) -> None:
    """What was checked, with its figures."""
    lines = [
        f"files      {proved['files']} in {proved['result']}, {bytes_text(proved['bytes'])}, each as its manifest says",
        f"base       {proved['base']}, digest {proved['base_digest'][:12]} as recorded",
        f"tokenizer  digest {proved['tokenizer_digest'][:12]}, the base's",
        f"tensors    {proved['tensors']}, every one expected and found, all finite, not their start",
    ]
    if proved["reloaded_loss"] is not None:
        rows, tokens = f"{proved['held_out_rows']:,} rows", f"{proved['held_out_tokens']:,} trained tokens"
        loss = f"loss {proved['reloaded_loss']:.6f}, recorded {proved['eval_loss']:.6f}"
        lines.append(f"held out   {rows}, {tokens}: {loss}")
    for line in [*lines, *(f"note       {notice}" for notice in proved["notices"]), "verified"]:
        typer.echo(line)
