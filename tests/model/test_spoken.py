"""A CPU without bfloat16 instructions makes text in bfloat16 where our kernels are there and nothing is rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.kernels.chosen import backend_for
from luthier.model import load, spoken
from luthier.model.load import load_model
from tests.tiny import tiny_folder


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 alone and no cache to speak of; tests are skipped where there is no compiler."""
    for module in (load, spoken):
        monkeypatch.setattr(module, "multiplies_halves", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(spoken, "CACHED", 0)
    monkeypatch.setenv("LUTHIER_KERNELS", "auto")
    if backend_for("auto", torch.device("cpu"), torch.bfloat16)[0].name != "native":
        pytest.skip("there are no C++ kernels here")


def in_halves(kind: str, tmp_path: Path, *, but: str = "") -> str:
    """A tiny model whose files hold bfloat16, but for one tensor."""
    folder = tiny_folder(kind, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor if name == but else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def dtype(source: str, *, speaks: bool = True) -> torch.dtype:
    return load_model(source, device="cpu", speaks=speaks).dtype


def test_text_is_made_in_the_precision_of_the_files() -> None:
    """Breaks when a laptop reads twice the bytes for each token, or training loses its float32."""
    model = load_model("seedling", device="cpu", speaks=True)
    assert model.dtype == torch.bfloat16 and spoken.is_told(model.notices) == model.notices[0]
    trained = load_model("seedling", device="cpu")
    assert trained.dtype == torch.float32 and not spoken.is_told(trained.notices)
    asked = load_model("seedling", device="cpu", precision="float32")
    assert asked.dtype == torch.float32 and asked.notices[0].endswith("as asked")


def test_where_our_kernels_are_not_it_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when products that a library imitates are taken for fast ones."""
    for kernels in ("torch", "blocks"):
        monkeypatch.setenv("LUTHIER_KERNELS", kernels)
        assert dtype("seedling") == torch.float32
    monkeypatch.setenv("LUTHIER_KERNELS", "auto")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert dtype("seedling") == torch.float32


def test_what_would_be_rounded_or_is_in_a_cache_stays_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when weights lose bits that a user has not given up, or when a small model is rounded for nothing."""
    assert dtype(in_halves("llama", tmp_path / "one")) == torch.bfloat16
    assert dtype(in_halves("llama", tmp_path / "two", but="model.layers.1.mlp.up_proj.weight")) == torch.float32
    assert dtype(str(tiny_folder("llama", tmp_path / "three"))) == torch.float32
    assert dtype("fresh:" + in_halves("llama", tmp_path / "one")) == torch.float32
    monkeypatch.setattr(spoken, "CACHED", 64 << 20)
    assert dtype("seedling") == torch.float32


def test_blocks_that_the_zoo_runs_stay_float32(tmp_path: Path) -> None:
    """Breaks when a model whose products are not ours has its prompts multiplied number by number."""
    assert dtype(in_halves("gpt2", tmp_path)) == torch.float32
