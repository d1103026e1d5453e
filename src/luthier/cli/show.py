"""How the commands speak: data on stdout, progress on stderr, plain lines where there is no terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from luthier.core.events import plain
from luthier.core.units import bytes_text, count_text, duration_text, percent_text, rate_text, signed_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from luthier.recipes.inspect_data import Measured

ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "blue", "tool": "yellow", "text": "white"}
CLASS_STYLE = "bold yellow"
TRAINED_STYLE = "black on green"
WIDE = 10_000
MARKS = {"fine": ("ok", "green"), "note": ("--", "yellow"), "missing": ("!!", "red")}


def print_json(values: Mapping[str, Any]) -> None:
    """One line of JSON on stdout."""
    typer.echo(json.dumps(plain(values), ensure_ascii=False, allow_nan=False))


def console_of() -> Console:
    """Stdout. What is printed are facts, so brackets are no markup and no line is cut or broken in a pipe."""
    # Here and below: most commands print lines and JSON, and are done before rich would be imported.
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """A table with whole cells: folded to the terminal, as wide as they are where there is none."""
    from rich.console import Console

    console = console_of()
    piped = not console.is_terminal and "COLUMNS" not in os.environ
    (Console(highlight=False, markup=False, width=WIDE) if piped else console).print(table, soft_wrap=False)


def print_plan(origins: Sequence[tuple[str, Any, str]], plan: Mapping[str, Any]) -> None:
    """The resolved recipe with the origin of each value, and what would happen."""
    print_origins(origins)
    console = console_of()
    console.print()
    _print_plan_numbers(console, plan)


def print_origins(origins: Sequence[tuple[str, Any, str]]) -> None:
    """The resolved recipe with the origin of each value."""
    from rich.text import Text

    table = _table("key", "value", "origin", title="recipe")
    for key, value, origin in origins:
        table.add_row(key, Text(str(value)), Text(origin, style="dim" if origin == "default" else "bold"))
    print_table(table)


def _print_plan_numbers(console: Console, plan: Mapping[str, Any]) -> None:
    data, tokens = plan["data"], plan["tokens"]
    for file in data["files"]:
        console.print(f"data       {file['path']}: {file['rows']:,} rows, format {file['format']} ({file['why']})")
    rendered = data["rendered"]
    console.print(
        f"rows       {data['read']:,} read = {data['kept']:,} kept + {data['rejected']:,} rejected; "
        f"{data['train_views']:,} to train, {data['held_out_views']:,} held out; "
        f"{rendered['truncated']:,} truncated, {rendered['dropped']:,} dropped"
    )
    share = percent_text(tokens["trained"] / max(1, tokens["total"]))
    console.print(f"tokens     {count_text(tokens['total'])}, {share} of them trained")
    trainable = percent_text(plan["trainable_parameters"] / plan["parameters"])
    console.print(
        f"model      {plan['model']}: {count_text(plan['parameters'])} parameters, "
        f"{count_text(plan['trainable_parameters'])} trained ({trainable})"
    )
    for line in _room_lines(plan["memory"], plan["disk"]):
        console.print(line)
    speed = plan["speed"]
    console.print(
        f"speed      at most {speed['tokens_per_second']:,.0f} tokens/s: {count_text(speed['flops_per_token'])}FLOP a "
        f"token, and {speed['dtype']} products at {rate_text(speed['flops_per_second'])} here"
    )
    console.print(f"steps      {plan['steps']:,}")
    for notice in plan["notices"]:
        console.print(f"note       {notice}", style="yellow")


def _room_lines(memory: Mapping[str, int], disk: Mapping[str, int]) -> list[str]:
    """What the run needs of memory and disk, and what there is."""
    about = ("total", "available", "tokens", "longest", "recomputed", "blocks", "without", "host")
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in memory.items() if name not in about)
    needed, there = bytes_text(memory["total"]), bytes_text(memory["available"])
    written, free = bytes_text(disk["total"]), bytes_text(disk["free"])
    return [
        f"memory     about {needed} of {there}: {parts} (for {memory['tokens']:,} tokens at once)",
        f"disk       about {written} of {free}: {disk['kept']:,} checkpoints of {bytes_text(disk['checkpoint'])}, "
        f"result {bytes_text(disk['result'])}",
    ]


_NEXT = {
    "causal_lm": 'generate {run} --prompt "..."',
    "seq2seq_lm": 'generate {run} --prompt "..."',
    "sequence_classes": 'classify {run} "..."',
    "token_classes": 'classify {run} "..."',
    "masked_lm": "eval {run}",
}
"""What there is to do with a result."""


def print_summary(summary: Mapping[str, Any], *, again: bool = False) -> None:
    """What a run did, in a few lines, with what it has to be told; `again` with what was told before it began too."""
    loss, tokens = summary["loss"], summary["tokens"]
    seconds = duration_text(summary["train_seconds"])
    typer.echo(f"{summary['status']}: {summary['steps']:,} steps, {seconds} of training")
    if loss["eval"] is not None and loss["eval_first"] is not None and "reward" in summary["metrics"]:
        # The held-out loss of rollouts is minus the mean reward.
        first, last = (signed_text(-loss[when]) for when in ("eval_first", "eval"))
        typer.echo(f"held-out reward {first} -> {last} (best at step {loss['best_step']})")
    elif loss["eval"] is not None and loss["eval_first"] is not None:
        typer.echo(f"held-out loss {loss['eval_first']:.4f} -> {loss['eval']:.4f} (best at step {loss['best_step']})")
    typer.echo(f"training loss {_number(loss['first'])} -> {_number(loss['last'])}")
    typer.echo(
        f"{count_text(tokens['total'])} tokens ({count_text(tokens['trained'])} trained), "
        f"{summary['tokens_per_second']:,.0f} tokens/s ({percent_text(summary['share_of_limit'])} of this machine's "
        f"limit), peak memory {bytes_text(summary['peak_memory_bytes'])}"
    )
    proof = summary["proof"]
    if proof["reloaded_loss"] is not None:
        typer.echo(f"saved, reloaded ({proof['tensors']} tensors), held-out loss reproduced")
    else:
        typer.echo(f"saved and reloaded ({proof['tensors']} tensors); nothing was held out to compare on")
    typer.echo(f"result  {summary['result']}\nreport  {summary['run']}/report.html")
    for name, (before, after) in summary["metrics"].items():
        if "/" in name:  # a part of a part of a reward
            continue
        typer.echo(f"{name} {signed_text(before, 3)} -> {signed_text(after, 3)}")
    print_notices(summary, again=again)
    if verb := _NEXT.get(summary["task"], ""):
        typer.echo(f'next    luthier {verb.format(run=summary["run"])}')


def print_notices(summary: Mapping[str, Any], *, again: bool) -> None:
    """What a run has taught in words, and `again` what its plan had said; nothing where there is nothing to say."""
    # Summaries of before had no lessons of their own.
    for notice in summary["notices"] if again else summary.get("lessons", ()):
        typer.echo(f"note    {notice}")


def print_runs(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of runs."""
    if not rows:
        typer.echo("no runs here yet; start one with: luthier demo")
        return
    from rich.text import Text

    table = _table("run", "state", "model", "adapter", "step", "before", "after")
    for row in rows:
        cells = [row["name"], row["state"], row["model"], row["adapter"], str(row["step"])]
        table.add_row(*map(Text, cells), _number(row["loss_before"]), _number(row["loss_after"]))
    print_table(table)


def print_checks(checks: Sequence[Mapping[str, str]]) -> None:
    """The doctor's findings."""
    from rich.text import Text

    console = console_of()
    for check in checks:
        mark, style = MARKS[check["state"]]
        console.print(Text.assemble((mark, style), f" {check['what']:<26} {check['detail']}"))


def print_rows(shown: Mapping[str, Any]) -> None:
    """Rows as coloured text: trained tokens stand out, context is dim, special tokens are visible."""
    from rich.text import Text

    console = console_of()
    for file in shown["files"]:
        console.print(_format_line(file), style="dim")
    for notice in shown["notices"]:
        console.print(f"note: {notice}", style="yellow")
    plain_text = not console.is_terminal or console.no_color
    console.print(_legend(coloured=not plain_text))
    for row in shown["rows"]:
        trained = sum(1 for token in row["tokens"] if token["weight"])
        console.print(f"--- row {row['row']} ({row['where']}): {len(row['tokens'])} tokens, {trained} trained")
        text = Text()
        for token in row["tokens"]:
            style = TRAINED_STYLE if token["weight"] else f"dim {ROLE_STYLES.get(token['role'], 'white')}"
            text.append(token["text"], style=style)
            if "class" in token:
                text.append(f"[{token['class']}]", style=CLASS_STYLE)
        console.print(text, soft_wrap=True)
        if classes := [f"{token['text'].strip()} = {token['class']}" for token in row["tokens"] if "class" in token]:
            console.print("class:" if len(classes) == 1 else "classes:", ", ".join(classes))
        elif plain_text:
            # Without colours the trained text must still be told from the rest.
            console.print("trained:", "".join(token["text"] for token in row["tokens"] if token["weight"]))


def _legend(*, coloured: bool) -> Text:
    """How trained tokens are told from context."""
    from rich.text import Text

    if not coloured:
        return Text("each row in full, then the part that is trained; the rest is context and carries no loss")
    roles = [part for role, style in ROLE_STYLES.items() for part in (" ", (role, f"dim {style}"))]
    return Text.assemble(
        ("trained", TRAINED_STYLE), " carries loss; context does not, and has the colour of its role:", *roles
    )


def print_check(found: Mapping[str, Any]) -> None:
    """What a check of a file found."""
    for file in found["files"]:
        typer.echo(_format_line(file))
    counts = found["counts"]
    typer.echo(
        f"{found['read']:,} read = {found['kept']:,} kept + {found['rejected']:,} rejected; {found['views']:,} views, "
        f"{counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained"
    )
    if found["classes"]:
        typer.echo("classes: " + ", ".join(f"{name} {count:,}" for name, count in found["classes"].items()))
    for warning in found["warnings"]:
        typer.echo(f"note: {warning}")
    for problem in found["problems"]:
        typer.echo(problem)
    if not found["problems"]:
        typer.echo("clean")


def print_histogram(found: Measured) -> None:
    """The length histogram, which ends with the token counts."""
    for file in found.files:
        typer.echo(_format_line(file))
    if (rows := found.counts["rows"]) != found.histogram.row_count:
        typer.echo(f"{rows:,} rows became {found.histogram.row_count:,} views, which are counted here")
    typer.echo(found.histogram.draw())


def _format_line(file: Mapping[str, str]) -> str:
    return f"{file['path']}: format {file['format']} ({file['why']})"


def _table(*names: str, title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
