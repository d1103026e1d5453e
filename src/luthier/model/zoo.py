"""The zoo by the names that types need, without importing it.

Idea: the zoo is transformers. Importing one of its model classes, or one of its configs, takes longer than all else
that a start does, and what handles a module or a config mostly names its type alone. Who makes one imports the zoo
where it is made. What was never imported has no instances: so much is known without it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    ZooConfig = PreTrainedConfig
    ZooModule = PreTrainedModel
else:
    ZooConfig = Any
    ZooModule = nn.Module


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the zoo's linear layer that keeps its weight as (in, out), as GPT-2's are."""
    file = sys.modules.get("transformers.pytorch_utils")
    return file is not None and isinstance(module, file.Conv1D)
