"""What source and artefact of an export or a merge are asked: held-out rows of a run, and training rows to render.

Idea: the gate shall judge where the model will be used, so the rows that its run held out come first, then its training
rows. A model that brings none is asked plain sentences. Each is cut short: beside 150,000 words a token's logits are
half a megabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from luthier.core.errors import DataError, MissingError, StorageError
from luthier.core.knobs import validate
from luthier.data.conversation import Conversation, Message, Role, Row
from luthier.data.forest import Ints
from luthier.data.prepare import sources_of
from luthier.data.reading.rows import open_source
from luthier.data.tokenizer import Tokenizer
from luthier.model.comparing.parity import Questions
from luthier.recipes.bench import reading_of
from luthier.recipes.evaluating.evaluate import held_out_of
from luthier.recipes.opening.places import located
from luthier.recipes.opening.results import started_in
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.store.runs import RunDirectory

PROMPTS: Final = 8
"""Rows whose logits are compared."""
LONGEST: Final = 64
"""Tokens of a row."""
RENDERED: Final = 16
"""Training rows that are rendered again."""
SENTENCES: Final = (
    "The ship left the harbour at dawn, and nobody on the quay said a word.",
    "def add(first, second):\n    return first + second\n",
    "Question: What is 17 + 25?\nAnswer: 42",
    "Water boils at 100 degrees Celsius at sea level; higher up, it boils sooner.",
)
"""Texts for a model that brings no rows of its own."""
_TALKS: Final[tuple[tuple[tuple[Role, str], ...], ...]] = (
    (("user", "Who are you?"), ("assistant", "A model.")),
    (("system", "Answer in one word."), ("user", "7 + 5?"), ("assistant", "12"), ("user", "And 6?"),
     ("assistant", "18")),
)  # fmt: skip
"""Talks for its template."""


def questions_for(
    tokenizer: Tokenizer,
    run: RunDirectory | None = None,
    *,
    classes: tuple[str, ...] | None = None,
    noticed: Callable[[str], None] = lambda _line: None,
) -> Questions:
    """What the sides are asked: of a run its rows, or plain sentences where there is none or its data are gone.

    `classes` are those of a trained model; `noticed` hears why a run's own rows could not be taken.
    """
    plain = tuple(_begun(tokenizer, text)[:LONGEST] for text in SENTENCES)
    if run is None:
        return Questions(plain, _talks())
    values = run.read_recipe()
    recipe = located(validate(kind_of_recipe(values), values), started_in(run))
    try:
        prepared, _ = held_out_of(recipe, classes=classes or None)
        rows = tuple(_rows(recipe))
    except (DataError, MissingError, StorageError) as failure:
        noticed(f"the rows of {run.folder} cannot be read ({failure.received:.200}), so plain sentences are compared")
        return Questions(plain, _talks())
    views = prepared.held_out if len(prepared.held_out) else prepared.train
    prompts = tuple(views[index].tokens[:LONGEST] for index in range(min(PROMPTS, len(views))))
    return Questions(prompts or plain, rows)


def _talks() -> tuple[Row, ...]:
    made = (Conversation(tuple(Message(role, text) for role, text in said)) for said in _TALKS)
    return tuple(Row(number, f"talk {number + 1}", each) for number, each in enumerate(made))


def _begun(tokenizer: Tokenizer, text: str) -> Ints:
    ids, _ = tokenizer.encode(text)
    begins = tokenizer.bos_id is not None and tokenizer.adds_bos
    return np.concatenate([np.array([tokenizer.bos_id] * begins, np.int32), ids])


def _rows(recipe: FinetuneRecipe) -> Iterator[Row]:
    """The first training rows that can be read."""
    how = reading_of(recipe)
    count = 0
    for source in sources_of(recipe.data.train if isinstance(recipe.data.train, str) else list(recipe.data.train), how):
        for item in open_source(source).items:
            if count >= RENDERED:
                return
            if isinstance(item, Row):
                count += 1
                yield item
