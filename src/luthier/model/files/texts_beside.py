"""What lies beside weights so that they speak as they were trained: tokenizer, chat template, stop tokens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from luthier.data.tokenizer import Tokenizer
from luthier.model.files.generation_files import save_generation_config
from luthier.model.files.json_files import read_object, write_object
from luthier.model.files.old_keys import tokenizer_with_old_keys
from luthier.model.language_model import LanguageModel


def save_texts(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer, *, chat_template: str | None, stop_ids: Collection[int]
) -> None:
    """Write them into `folder`, for readers of transformers 4 and 5; a model that says no text stops nowhere."""
    tokenizer.save(folder, chat_template=chat_template)
    path = folder / "tokenizer_config.json"
    write_object(path, tokenizer_with_old_keys(read_object(path), chat_template=chat_template))
    if model.task.speaks:
        save_generation_config(folder, model, stop_ids, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id)
