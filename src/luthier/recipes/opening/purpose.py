"""What a model is for: the task of a recipe's objective, how rows are read for it, and how a result keeps it.

A recipe's objective says what it needs of rows, tokenizer and model. That these fit is asked of the model's config
alone, before data are read or weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from luthier.adapters import Adapter
from luthier.core.errors import CorruptError, RecipeError
from luthier.data.conversation import Meaning
from luthier.data.prepare import Reading
from luthier.data.tokenizer import Tokenizer
from luthier.model.editing.edits import Edit
from luthier.model.files.adapter_config import TENSORS
from luthier.model.files.configs import config_of, start_token
from luthier.model.files.tensor_headers import tensor_shapes
from luthier.model.language_model import LanguageModel
from luthier.model.load import is_known_decoder, kind_of_source
from luthier.model.running.encoder_decoder import start_of
from luthier.model.tasks import CAUSAL, PEFT_TYPES, SCORES, Task, TaskName, class_for, kind_of
from luthier.objectives import Objective, Vocabulary

KEY: Final = "task"
"""Where a result says what its base was loaded for."""
SOME: Final = ("one", "another")
"""Classes to ask with, before the data have told theirs."""


def bound(objective: Objective, source: str, tokenizer: Tokenizer) -> Objective:
    """The objective with what it needs of the tokenizer, once it fits the model `source`. Raises RecipeError."""
    task = objective.task(SOME)
    # A decoder that is known goes on with a text, and no more is asked: nothing of the zoo is imported for it.
    if task.name != CAUSAL.name or not is_known_decoder(source):
        class_for(config_of(source), task, source)
    return objective.with_vocabulary(Vocabulary(tokenizer.vocabulary_size, tokenizer.mask_id))


def edits_for(adapter: Adapter, objective: Objective, model: LanguageModel) -> list[Edit]:
    """What is trained on a model: the adapter's edits, and parts that the objective has of its own."""
    size = int(model.config.get_text_config().hidden_size)
    return [*adapter.attach(model.sites), *objective.own(size, model.device)]


def read_for(reading: Reading, objective: Objective, source: str) -> Reading:
    """How rows are read for an objective and the model `source`."""
    kind = kind_of_source(source)
    start = start_token(source) if kind == "seq2seq" else None
    if kind == "seq2seq" and start is None:
        raise RecipeError(
            f"{source} does not say which token its answers start with", do="set decoder_start_token_id in config.json"
        )
    return replace(reading, kind=kind, start_id=start, wanted=objective.meanings)


def read_as(reading: Reading, model: LanguageModel) -> Reading:
    """How texts are read for a model that is loaded."""
    task, kind = model.task, kind_of(model.config)
    start = start_of(model.module) if kind == "seq2seq" else None
    wanted: tuple[Meaning, ...] | None = None
    if task == SCORES:
        # Its one class is the score, which no row names.
        return replace(reading, kind=kind, start_id=start, wanted=("preference", "judged"), classes=None)
    if task.classifies:
        wanted = ("labelled",) if task.name == "sequence_classes" else ("tagged",)
    return replace(reading, kind=kind, start_id=start, wanted=wanted, classes=task.classes or None)


def as_kept(task: Task) -> dict[str, Any]:
    """A task as a result keeps it."""
    return {"name": task.name, "classes": list(task.classes)}


def kept_task(
    extras: Mapping[str, Any], *, config: Mapping[str, Any] | None = None, folder: Path | None = None
) -> Task:
    """The task that a result was made for: as it says itself, or as PEFT's `config` in `folder` does.

    PEFT does not name classes; they are then called by their numbers. Raises CorruptError for what is no task.
    """
    said = extras.get(KEY)
    if said is not None:
        return _task(said)
    kind = str((config or {}).get("task_type"))
    names: list[TaskName] = [name for name, peft in PEFT_TYPES.items() if peft == kind and name != "masked_lm"]
    if not names:
        return CAUSAL
    task = Task(names[0])
    if not task.classifies or folder is None:
        return task
    saved = [str(name) for name in (config or {}).get("modules_to_save") or ()]
    return Task(task.name, tuple(map(str, range(_rows_of(folder, saved)))))


def _task(said: object) -> Task:
    known = {str(name): name for name in PEFT_TYPES}
    if isinstance(said, Mapping):
        name, classes = said.get("name"), said.get("classes", [])
        if name in known and isinstance(classes, Sequence) and all(isinstance(each, str) for each in classes):
            return Task(known[name], tuple(classes))
    raise CorruptError(f"the result says its task is {said!r:.80}", allowed=", ".join(known))


def _rows_of(folder: Path, saved: Sequence[str]) -> int:
    """The number of classes of a PEFT adapter: the rows of the last weight of its saved head."""
    shapes = {name: shape for name, shape in tensor_shapes(folder / TENSORS).items() if len(shape) == 2}
    rows = [shape[0] for name, shape in shapes.items() if any(f".{part}." in name for part in saved)]
    if not rows:
        raise CorruptError(f"{folder / TENSORS} holds no head for classes", do="save the adapter with its classifier")
    return min(rows)
