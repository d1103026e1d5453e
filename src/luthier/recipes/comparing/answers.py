"""Answers to held-out prompts: what is asked, what is said, and how good it is.

Held-out rows with one prompt are one question, and their answers are its references: E2E NLG has several sentences for
each list of facts. A row of several turns is asked for its last one, after those before it as they stand in the row.
Answers are greedy, so that they are the same again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.data.prepare import Prepared, Views
from luthier.infer.engine import Engine
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from luthier.recipes.samples import question
from luthier.store.files import write_text

_DRAW = 0xA5C


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, and the texts that are known to answer it."""

    prompt: Ints
    references: tuple[str, ...]


def questions(data: Prepared, most: int, *, seed: int, max_new_tokens: int) -> list[Question]:
    """At most so many questions of the held-out rows, drawn by `seed`, in the order of the file, with all references.

    Raises RecipeError when nothing is held out.
    """
    if not len(data.held_out):
        raise RecipeError(
            f"{len(data.train):,} rows to train and none held out",
            allowed="at least one held-out row to ask for",
            do="set evaluation.fraction above 0, or data.evaluation",
        )
    known: dict[bytes, Question] = {}
    for prompt, reference in _asked(data.held_out, max_new_tokens):
        key = prompt.tobytes()
        before = known[key].references if key in known else ()
        known[key] = Question(prompt, (*before, text_of(data, reference)))
    drawn = np.random.default_rng([seed, _DRAW]).permutation(len(known))[:most]
    everything = list(known.values())
    return [everything[index] for index in sorted(drawn.tolist())]


def trained_prompts(data: Prepared, asked: Sequence[Question], *, max_new_tokens: int) -> int:
    """How many of the questions are prompts of training rows too: an evaluation file keeps no prompt on one side."""
    known = {prompt.tobytes() for prompt, _ in _asked(data.train, max_new_tokens)}
    return sum(one.prompt.tobytes() in known for one in asked)


def answered(
    model: LanguageModel, data: Prepared, asked: Sequence[Question], *, max_new_tokens: int, before: Ints | None = None
) -> list[str]:
    """What the model says to each question; `before` are tokens in front of every one, such as examples."""
    prompts = [one.prompt if before is None else np.concatenate([before, one.prompt]) for one in asked]
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=tuple(sorted(data.store.stop_ids)))
    speaker = Engine(model, decode=data.renderer.tokenizer.decode)
    return [text_of(data, spoken.tokens) for spoken in speaker.speak(prompts, sampling)]


def text_of(data: Prepared, tokens: Ints) -> str:
    """Tokens as text, without control tokens and the white space around."""
    tokenizer = data.renderer.tokenizer
    silent = tokenizer.special_ids | data.store.stop_ids
    return tokenizer.decode([int(token) for token in tokens if int(token) not in silent]).strip()


def write_answers(path: Path, data: Prepared, asked: Sequence[Question], answers: Sequence[str]) -> None:
    """A line of JSON for each question: prompt, references, answer."""
    rows = [
        {"prompt": text_of(data, one.prompt), "references": list(one.references), "answer": answer}
        for one, answer in zip(asked, answers, strict=True)
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _asked(views: Views, max_new_tokens: int) -> list[tuple[Ints, Ints]]:
    return [question(views[index], max_new_tokens) for index in range(len(views))]
