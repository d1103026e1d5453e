"""Small models and adapters that are exported to GGUF, and a peer that may read what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from luthier.model.files.adapter_config import CONFIG, TENSORS
from luthier.model.files.json_files import write_object

PREFIX = "base_model.model.model.layers."
TARGETS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.up_proj": (48, 32)}


def lora_folder(folder: Path, **changes: Any) -> Path:
    """A LoRA adapter of rank 4 for the tiny llama, in PEFT's format."""
    torch.manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, (out, into) in TARGETS.items():
            tensors[f"{PREFIX}{layer}.{name}.lora_A.weight"] = torch.randn(4, into) * 0.2
            tensors[f"{PREFIX}{layer}.{name}.lora_B.weight"] = torch.randn(out, 4) * 0.2
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    write_object(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "use_rslora": True, "bias": "none",
        "base_model_name_or_path": "tiny", "target_modules": ["q_proj", "k_proj", "up_proj"], "lora_dropout": 0.0,
        "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "inference_mode": True, **changes,
    })  # fmt: skip
    return folder
