"""LoRA adapters as GGUF files: the same update of the same layers, with the rows as llama.cpp has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.core.errors import CorruptError, RecipeError
from luthier.maths.ggml import FORMATS
from luthier.model.files.adapter_config import CONFIG, TENSORS, read_config
from luthier.model.files.json_files import write_object
from luthier.model.files.tensor_files import load_tensors
from luthier.model.gguf.families import turn
from luthier.model.gguf.lora_file import lora_to_peft, require_writable, write_lora
from luthier.model.gguf.reading import GgufFile
from luthier.model.gguf.writing import Planned, real, text, write_gguf
from tests.model.gguf import models

pytest.importorskip("gguf")
PREFIX = "base_model.model.model.layers.0."
LAYERS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 64)}


def adapter(folder: Path, *, more: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """An adapter in PEFT's format, of rank 4, and of rank 2 at the projection down."""
    torch.manual_seed(0)
    tensors = dict(more or {})
    for name, (out, into) in LAYERS.items():
        rank = 2 if "down" in name else 4
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, into)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, rank)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / TENSORS)
    write_object(folder / CONFIG, {
        "peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"k_proj": 6}, "use_rslora": False, **changes,
    })  # fmt: skip
    return folder


def update(folder: Path, layer: str) -> torch.Tensor:
    """What PEFT adds to a weight, by its definition."""
    config, tensors = read_config(folder), load_tensors(folder / TENSORS)
    down, up = (tensors[f"{PREFIX}{layer}.lora_{one}.weight"] for one in "AB")
    alpha = next((own for end, own in config["alpha_pattern"].items() if layer.endswith(end)), config["lora_alpha"])
    return up @ down * (alpha / (len(down) ** 0.5 if config["use_rslora"] else len(down)))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_adapter_is_the_same_update_there_and_back(kind: str, rslora: bool, tmp_path: Path) -> None:
    folder, config = adapter(tmp_path / "peft", use_rslora=rslora), models.config(kind)
    write_lora(tmp_path / "a.gguf", folder, config, name="mine")
    file = GgufFile.open(tmp_path / "a.gguf")
    assert file.keys["general.type"] == "adapter" and file.keys["adapter.type"] == "lora"
    assert file.keys["general.architecture"] == kind and file.keys["adapter.lora.alpha"] == 16.0
    there = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    for layer, name in there.items():
        down, up = (file.tensor(f"blk.0.{name}.weight.lora_{one}") for one in "ab")
        wanted = update(folder, layer)
        if kind == "llama" and layer in heads:
            wanted = turn(wanted, heads[layer])
        # As llama.cpp adds it: alpha over the rank of the tensor.
        torch.testing.assert_close(up @ down * (16.0 / len(down)), wanted, rtol=1e-5, atol=1e-5)
    lora_to_peft(file, config, tmp_path / "back")
    for layer in there:
        torch.testing.assert_close(update(tmp_path / "back", layer), update(folder, layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"use_dora": True}, "of the kind DoRA"),
        ({"alpha_pattern": {".*k_proj": 3}}, r"alpha_pattern has the pattern"),
        ({"more": {f"{PREFIX}self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}}, "magnitude_vector"),
        ({"more": {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}}, "lm_head"),
    ],
    ids=["ia3", "dora", "pattern", "magnitude", "head"],
)
def test_adapters_without_a_place_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        require_writable(adapter(tmp_path / "peft", **changes), models.config("llama"))


def test_a_file_that_is_no_adapter_for_the_base_is_refused(tmp_path: Path) -> None:
    """Another architecture, another kind, half of the factors, factors that do not fit, and no scale."""
    config = models.config("llama")
    write_lora(tmp_path / "a.gguf", adapter(tmp_path / "peft"), config, name="mine")
    with pytest.raises(CorruptError, match="general.architecture is 'llama'"):
        lora_to_peft(GgufFile.open(tmp_path / "a.gguf"), models.config("qwen2"), tmp_path / "back")
    keys = {"general.architecture": text("llama"), "general.type": text("adapter"), "adapter.type": text("lora")}

    def forged(name: str, shape: tuple[int, ...], *, alpha: float = 1.0) -> GgufFile:
        write_gguf(tmp_path / "f.gguf", {**keys, "adapter.lora.alpha": real(alpha)},
                   [Planned(name, shape, FORMATS["F32"])], [(name, torch.ones(shape))])  # fmt: skip
        return GgufFile.open(tmp_path / "f.gguf")

    for name, shape, alpha, said in (
        ("blk.0.attn_q.weight.lora_a", (4, 32), 1.0, "1 factors for 1 layers"),
        ("blk.0.attn_q.weight.lora_a", (4, 31), 1.0, "has shape"),
        ("blk.9.attn_q.weight.lora_a", (4, 32), 1.0, "has no layer"),
        ("blk.0.attn_q.weight", (32, 32), 1.0, "has no layer"),
        ("blk.0.attn_q.weight.lora_a", (4, 32), -1.0, "adapter.lora.alpha is -1"),
    ):
        with pytest.raises(CorruptError, match=said):
            lora_to_peft(forged(name, shape, alpha=alpha), config, tmp_path / "back")
