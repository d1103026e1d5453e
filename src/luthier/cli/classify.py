"""`luthier classify`: the class of texts, or of each word, as a tuned model sees it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import Json, require_no_lost_run
from luthier.cli.show import print_json
from luthier.core.errors import RecipeError
from luthier.core.imports import uncollected

if TYPE_CHECKING:
    from luthier.data.conversation import Content, Message
    from luthier.recipes.opening.opened import Classes


def classify(
    name: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, or a model folder with classes.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts to classify; - reads one from each line of stdin.")
    ] = None,
    pair: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Second text of a pair, where the model compares two; the answer to score."),
    ] = "",
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="Adapter folder (PEFT format) to put on a model.")
    ] = None,
    json: Json = False,
) -> None:
    """Tell the class of texts, and how probable it is; for a model of words, that of each word.

    A reward model is given a prompt and, as --pair, an answer to it, and tells the answer's score.

    \b
    Examples:
      luthier classify runs/2026-11-28-topics "The ship left the harbour at dawn."
      luthier classify runs/2026-11-28-reward "Who are you?" --pair "A ship's carpenter."
    """
    with uncollected():
        from luthier.recipes.opening.opened import open_named

    asked = [line for text in texts or [] for line in (_lines() if text == "-" else [text])]
    if not asked:
        raise RecipeError("no text was given", allowed="one or more", do="add a text, or - to read lines from stdin")
    require_no_lost_run(name)
    opened = open_named(name, adapter=adapter)
    if opened.model.task.name == "scores":
        _tell_scores(asked, pair, opened.scores(_conversations(asked, pair)), json=json)
        return
    words = opened.model.task.name == "token_classes"
    found = opened.classify(_contents(asked, pair, words=words))
    if json:
        print_json({"texts": [_plain(text, each, words=words) for text, each in zip(asked, found, strict=True)]})
        return
    for text, each in zip(asked, found, strict=True):
        _print(text, each, words=words)


def _conversations(prompts: Sequence[str], answer: str) -> list[tuple[Message, ...]]:
    from luthier.data.conversation import Message

    if not answer.strip():
        raise RecipeError(
            "the model scores answers, and there is none", allowed="a prompt and an answer", do="add --pair ANSWER"
        )
    return [(Message("user", prompt), Message("assistant", answer)) for prompt in prompts]


def _tell_scores(prompts: Sequence[str], answer: str, scores: Sequence[float], *, json: bool) -> None:
    if json:
        told = zip(prompts, scores, strict=True)
        print_json({"texts": [{"text": text, "pair": answer, "score": score} for text, score in told]})
        return
    for text, score in zip(prompts, scores, strict=True):
        typer.echo(f"{score:.4f}  {text} -> {answer}")


def _lines() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _contents(texts: Sequence[str], pair: str, *, words: bool) -> list[Content]:
    """The texts as what is classified; which class they have is what is asked."""
    from luthier.data.conversation import Labelled, Tagged

    if words:
        return [Tagged(tuple(text.split()), ("",) * len(text.split())) for text in texts]
    return [Labelled(text, "", pair) for text in texts]


def _plain(text: str, found: Classes, *, words: bool) -> dict[str, object]:
    scores = [dict(zip(found.names, map(float, each), strict=True)) for each in found.scores]
    if not words:
        return {"text": text, "class": found.best[0], "probabilities": scores[0]}
    return {
        "text": text,
        "words": [
            {"word": word, "class": name, "probabilities": each}
            for word, name, each in zip(text.split(), found.best, scores, strict=True)
        ],
    }


def _print(text: str, found: Classes, *, words: bool) -> None:
    if not words:
        typer.echo(f"{found.best[0]}  {found.scores[0].max():.3f}  {text}")
        return
    typer.echo("  ".join(f"{word}/{name}" for word, name in zip(text.split(), found.best, strict=True)))
