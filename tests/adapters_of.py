"""Adapters of tiny models, as a run would have saved them, and what an engine may take them for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from luthier.adapters.lora import LoRA
from luthier.model.files.adapter_config import CONFIG, TENSORS
from luthier.model.files.adapter_files import save_adapter
from luthier.recipes.opening.opened import open_named
from tests import forests


def adapter_folder(base: Path, folder: Path, *, std: float = 0.1) -> Path:
    """A LoRA of `base` with weights that change what it says."""
    opened = open_named(str(base), precision="float32")
    method = LoRA(rank=4, alpha=8.0)
    attachment = opened.model.attach(method.attach(opened.model.sites))
    forests.shake(attachment.named_parameters().values(), seed=1, std=std)
    config, extras = method.peft_config(opened.model.sites), {"base_digest": opened.model.digest}
    save_adapter(folder, attachment, peft_type="LORA", config=config, base=str(base), extras=extras)
    return folder


def rescaled(folder: Path, factor: float, place: Path) -> Path:
    """The same with another lora_alpha."""
    shutil.copytree(folder, place)
    config = json.loads((place / CONFIG).read_text())
    config["lora_alpha"] *= factor
    (place / CONFIG).write_text(json.dumps(config))
    return place


def moved(folder: Path, share: float, place: Path) -> Path:
    """The same after, or before, some steps of training: each tensor moved by a share of its size."""
    shutil.copytree(folder, place)
    draws = torch.Generator().manual_seed(7)
    tensors = load_file(place / TENSORS)
    changed = {name: each + share * each.std() * torch.randn(each.shape, generator=draws) for name, each in
               tensors.items()}  # fmt: skip
    save_file(changed, place / TENSORS, metadata={"format": "pt"})
    return place
