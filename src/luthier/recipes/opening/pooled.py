"""Adapters at hand: names and folders, from which they come onto a model when somebody asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from luthier.infer.adapter_pool import AdapterPool
from luthier.model.language_model import LanguageModel
from luthier.recipes.opening.opened import put_on
from luthier.store.runs import ADAPTER, is_run


def pool_of(model: LanguageModel, adapters: Mapping[str, Path] | None = None, *, most: int = 64) -> AdapterPool:
    """A pool for `model` in which `adapters` are registered: folders in PEFT's format, or runs that made one."""
    pool = AdapterPool(model, partial(bring, model), most=most)
    for name, folder in (adapters or {}).items():
        pool.register(name, adapter_folder(folder))
    return pool


def adapter_folder(path: Path) -> Path:
    """Where the adapter of a folder or of a run lies."""
    return path / ADAPTER if is_run(path) else path


def bring(model: LanguageModel, folder: Path, name: str) -> None:
    """Put the adapter of a folder onto `model`, for rows that name it, as it is: nobody trains it."""
    # Edits are drawn before they are filled; whoever samples or trains beside this must not draw other numbers for it.
    with torch.random.fork_rng(devices=[]):
        put_on(model, folder, name=name, named_only=True)
    for parameter in model.attachments[name].named_parameters().values():
        parameter.requires_grad_(False)
