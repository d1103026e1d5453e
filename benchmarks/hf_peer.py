"""What the peers built on transformers' Trainer share: the clock, the LoRA start, what a step saw, what has changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import worker
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Tells the step clock when a step has ended."""

    def __init__(self, clock: worker.StepClock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_ended()


@torch.no_grad()
def set_start(model: nn.Module, path: Path) -> None:
    """Copy the prepared first factors into a PEFT model; all of them have to find a place, and none may be left out."""
    start = load_file(path)
    for name, parameter in model.named_parameters():
        site, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if found:
            parameter.copy_(start.pop(site))
    if start:
        raise SystemExit(f"the peer has no LoRA at {sorted(start)[:3]}")


def batch_of(inputs: Mapping[str, torch.Tensor]) -> worker.Batch:
    """What a step saw, as lists."""
    ids, mask, labels = (inputs[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
    return worker.Batch(ids, mask, labels)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is trained, as it is now."""
    return {name: item.detach().clone() for name, item in model.named_parameters() if item.requires_grad}


def changed_since(at_start: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, Any]:
    """How many trained tensors there are, how many have changed, their elements and precision."""
    now = {name: item for name, item in model.named_parameters() if item.requires_grad}
    return {
        "tensors": len(now),
        "changed": sum(not torch.equal(at_start[name], item) for name, item in now.items()),
        "count": sum(item.numel() for item in now.values()),
        "dtype": str(next(iter(now.values())).dtype),
    }
