"""transformers with bitsandbytes as the oracle of packed model folders: ours load there, theirs load here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from luthier.model.files.packed_files import save_packed
from luthier.model.packed import PackedWeight
from luthier.quantizers.nf4 import NF4
from luthier.recipes.opening.quantized import load_base, quantize
from tests import forests
from tests.tiny import tiny_config

bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle")
# What it warns of in its own and the zoo's code is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)


def folder_of(architecture: str, folder: Path) -> Path:
    """A small model whose matrices have whole blocks in each row: bitsandbytes 0.50.2 gives back wrong numbers for
    others on a CPU, because it counts blocks from the beginning of each row there."""
    config = tiny_config(architecture)
    if architecture == "gpt2":
        config.n_embd = 64
    else:
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    forests.shake(module.parameters())
    module.save_pretrained(folder)
    return folder


def their_logits(folder: Path) -> torch.Tensor:
    """What transformers computes from a folder with bitsandbytes' own 4-bit layers."""
    module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    layers = [each for each in module.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert layers and not isinstance(module.get_output_embeddings(), bitsandbytes.nn.Linear4bit)
    # In evaluation mode a CPU with bfloat16 products takes another way, which rounds.
    module.train()
    with torch.no_grad():
        return module(input_ids=torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_transformers_loads_what_was_saved_with_equal_logits(architecture: str, double: bool, tmp_path: Path) -> None:
    """Breaks when a name, a shape, the order of halves or a nested scale is not what bitsandbytes reads."""
    model = load_base(str(folder_of(architecture, tmp_path / "base")), precision="float32")
    quantize(model, NF4(double=double))
    save_packed(model, tmp_path / "packed")
    ours = forests.logits(model, IDS)
    assert forests.relative_error(their_logits(tmp_path / "packed"), ours) <= 2e-6
    again = load_base(str(tmp_path / "packed"), precision="float32")
    assert torch.equal(forests.logits(again, IDS), ours)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_transformers_has_saved_loads_here_with_equal_logits(
    architecture: str, double: bool, tmp_path: Path
) -> None:
    """Breaks when a setting or tensor that their files hold is refused or read as something else."""
    base = folder_of(architecture, tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    module: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    module.save_pretrained(tmp_path / "theirs")
    model = load_base(str(tmp_path / "theirs"), precision="float32")
    packed = [each for each in model.module.parameters() if isinstance(each, PackedWeight)]
    assert len(packed) == len([site for site in model.sites.linear() if site.layer is not None])
    assert forests.relative_error(forests.logits(model, IDS), their_logits(tmp_path / "theirs")) <= 2e-6
