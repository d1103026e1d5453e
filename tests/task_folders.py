"""Folders with a tiny encoder or encoder-decoder and its tokenizer, as from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.model.tasks import Task, auto_class
from tests import task_models
from tests.data import kinds
from tests.task_models import ANSWERS, MASKED


def bert_folder(folder: Path) -> Path:
    """A tiny BERT-like model with the real vocabulary of an uncased BERT."""
    return _saved(folder, "bert", MASKED, kinds.zoo("bert"))


def roberta_folder(folder: Path) -> Path:
    """A tiny RoBERTa-like model, whose tokenizer ends each text in a token that ends answers elsewhere."""
    return _saved(folder, "roberta", MASKED, kinds.zoo("roberta"))


def t5_folder(folder: Path) -> Path:
    """A tiny T5-like model with a small tokenizer that ends a text in </s>."""
    return _saved(folder, "t5", ANSWERS, kinds.t5().raw)


def _saved(folder: Path, architecture: str, task: Task, tokenizer: Any) -> Path:
    config = task_models.config(architecture)
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto_class(task).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
