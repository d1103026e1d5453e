"""PEFT as the oracle of our adapter files: ours load there, theirs load here, with equal logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter, adapter_of
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.model.adapter_files import check_base, fill, read_config
from luthier.train.result import save_result
from tests import forests

peft = pytest.importorskip("peft")
# What PEFT warns of in its own and the zoo's code is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)
OURS: dict[str, Adapter] = {
    "lora": LoRA(rank=4, alpha=8.0),
    "rslora": LoRA(rank=4, alpha=8.0, rslora=True, dropout=0.1, targets=("q", "down")),
    "ia3": IA3(),
    "prefix": PrefixTuning(prefix_tokens=4),
}
EACH = [
    *((architecture, name) for architecture in ("llama", "qwen2", "gpt2", "mistral") for name in OURS),
    ("gemma", "lora"), ("gemma", "ia3"), ("gemma", "prefix"),
]  # fmt: skip


def their_logits(module: torch.nn.Module) -> Tensor:
    """Logits of a PEFT model in evaluation mode."""
    module.eval()
    with torch.no_grad():
        found: Tensor = module(input_ids=torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]
    return found


@pytest.mark.parametrize(("architecture", "name"), EACH)
def test_ours_load_in_peft_with_equal_logits(architecture: str, name: str, tmp_path: Path) -> None:
    """Breaks when a key, an orientation, a scale or a list of targets means something else to PEFT."""
    model = forests.language_model(architecture)
    attachment = model.attach(OURS[name].attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = save_result(tmp_path, model, attachment, OURS[name], {})
    theirs = peft.PeftModel.from_pretrained(forests.zoo(architecture, ours=False), str(folder))
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5


def test_one_layer_alone_is_one_layer_in_peft(tmp_path: Path) -> None:
    """Breaks when a full name is shortened to an ending that matches in every layer."""
    model = forests.language_model("llama")
    method = LoRA(rank=4, targets=("layers.1.mlp.down_proj",))
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = save_result(tmp_path, model, attachment, method, {})
    theirs = peft.PeftModel.from_pretrained(forests.zoo("llama", ours=False), str(folder))
    assert sum("lora_A" in key for key in theirs.state_dict()) == 1
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5


def config_of(architecture: str, name: str) -> object:
    """The same method as PEFT is asked for it."""
    conv = architecture == "gpt2"
    linear = ["c_attn", "c_proj", "c_fc"] if conv else "all-linear"
    if name == "lora":
        return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear, fan_in_fan_out=conv)
    if name == "rslora":
        targets = ["c_attn"] if conv else ["q_proj", "down_proj"]
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules=targets, fan_in_fan_out=conv
        )
    if name == "ia3":
        forward = ["mlp.c_proj"] if conv else ["down_proj"]
        targets = ["c_attn", *forward] if conv else ["k_proj", "v_proj", *forward]
        return peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=forward, fan_in_fan_out=conv
        )
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize(("architecture", "name"), EACH)
def test_theirs_load_here_with_equal_logits(architecture: str, name: str, tmp_path: Path) -> None:
    """Breaks when a file as PEFT writes it is refused, or computes something else here."""
    base = forests.zoo(architecture, ours=False)
    theirs = peft.get_peft_model(base, config_of(architecture, name))
    forests.shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = forests.language_model(architecture)
    check_base(tmp_path, model)
    attachment = model.attach(adapter_of(read_config(tmp_path)).attach(model.sites))
    fill(attachment, tmp_path)
    assert forests.relative_error(forests.logits(model, IDS), expected) <= 1e-5
