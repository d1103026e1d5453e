"""`luthier data`: look at exactly what a model will be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import DryRun, Json
from luthier.cli.show import print_check, print_histogram, print_json, print_rows
from luthier.core.errors import RefusedError
from luthier.core.imports import uncollected

app = typer.Typer(help="Show, check and measure data files.", no_args_is_help=True, rich_markup_mode=None)

File = Annotated[str, typer.Argument(metavar="FILE", help="Data file, folder, glob, or FILE#500.", show_default=False)]
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="Model whose tokenizer and chat template are used.")
]
Format = Annotated[str | None, typer.Option("--format", metavar="NAME", help="Data format; empty detects it.")]
Template = Annotated[
    str, typer.Option("--template", metavar="NAME", help="auto, a shipped template, or a .jinja file.")
]
TrainOn = Annotated[str, typer.Option("--train-on", metavar="WHICH", help="answers, last or all.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="Longest row; empty takes the model's limit.")
]
OverLength = Annotated[str, typer.Option("--over-length", metavar="WHAT", help="raise, drop or truncate.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", metavar="ROLE=COLUMN", help="Such as prompt=mr and answer=ref.")
]
For = Annotated[str, typer.Option("--for", metavar="KIND", help="Kind of model: causal, encoder or seq2seq.")]
Evaluation = Annotated[
    str | None, typer.Option("--evaluation", metavar="FILE", help="Held-out data: checked too, and compared.")
]


@app.command("show")
def show(
    file: File,
    model: Model = "seedling",
    rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", min=1, help="How many rows.")] = 3,
    format: Format = None,
    template: Template = "auto",
    train_on: TrainOn = "answers",
    max_tokens: MaxTokens = None,
    over_length: OverLength = "raise",
    column: Columns = None,
    kind: For = "causal",
    json: Json = False,
) -> None:
    """Print the exact tokens of the first rows, trained ones and context in different colours.

    \b
    Examples:
      luthier data show rows.jsonl --model seedling
      luthier data show reviews.jsonl --model google-bert/bert-base-uncased --for encoder --rows 1 --json
    """
    with uncollected():
        from luthier.recipes.inspect_data import reading, show_rows

    how = reading(format, template, train_on, max_tokens, over_length, column, kind)
    shown = show_rows(file, model, how, rows=rows)
    print_json(shown) if json else print_rows(shown)


@app.command("check")
def check(
    file: File,
    model: Model = "seedling",
    format: Format = None,
    template: Template = "auto",
    train_on: TrainOn = "answers",
    max_tokens: MaxTokens = None,
    over_length: OverLength = "raise",
    column: Columns = None,
    kind: For = "causal",
    evaluation: Evaluation = None,
    json: Json = False,
) -> None:
    """Prove the promises about every row of a file; exits with 65 when one is broken.

    What is odd about sound rows is said too: empty answers, copies, one answer for everything, a template that changes
    history, rows that are in the evaluation data as well.

    \b
    Examples:
      luthier data check rows.jsonl --model seedling
      luthier data check rows.jsonl --evaluation held-out.jsonl --max-tokens 512 --json
    """
    with uncollected():
        from luthier.recipes.inspect_data import check_file, reading

    how = reading(format, template, train_on, max_tokens, over_length, column, kind)
    found = check_file(file, model, how, evaluation=evaluation)
    print_json(found.as_dict()) if json else print_check(found.as_dict())
    found.demand()


@app.command("stats")
def stats(
    file: File,
    model: Model = "seedling",
    format: Format = None,
    template: Template = "auto",
    train_on: TrainOn = "answers",
    max_tokens: MaxTokens = None,
    over_length: OverLength = "raise",
    column: Columns = None,
    kind: For = "causal",
    json: Json = False,
) -> None:
    """Draw the length histogram of a file and count its tokens.

    \b
    Examples:
      luthier data stats rows.jsonl
      luthier data stats rows.jsonl --model Qwen/Qwen2.5-0.5B --json
    """
    with uncollected():
        from luthier.recipes.inspect_data import measure, reading

    how = reading(format, template, train_on, max_tokens, over_length, column, kind)
    found = measure(file, model, how)
    print_json(found.as_dict()) if json else print_histogram(found)


@app.command("kernels")
def kernels(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("kernels.jsonl"),
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write small PyTorch operators that are to be replaced by Triton kernels, as rows for the reward `kernel`.

    \b
    Examples:
      luthier data kernels
      luthier data kernels operators.jsonl --dry-run
    """
    from luthier.assets.kernels import kernel_rows
    from luthier.store.files import write_text

    rows = kernel_rows()
    if path.exists() and not dry_run:
        raise RefusedError(f"{path} exists and is not overwritten", do="name another file, or remove it first")
    if not dry_run:
        write_text(path, rows)
    count = len(rows.splitlines())
    told = f"{'would write' if dry_run else 'wrote'} {path}: {count} rows"
    print_json({"file": str(path), "rows": count, "written": not dry_run}) if json else typer.echo(told)
