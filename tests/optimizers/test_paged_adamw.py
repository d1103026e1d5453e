"""Paged AdamW: AdamW's numbers, and memory that is given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.optimizers import paged_adamw
from luthier.optimizers.adamw import AdamW
from luthier.optimizers.paged_adamw import PagedAdamW, kind_of_file_system, require_disk_folder


def trained(method: AdamW | PagedAdamW, shape: tuple[int, ...] = (70, 30)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"m": torch.randn(*shape, generator=generator), "t": torch.randn(9, 5, generator=generator).t(),
               "none": torch.randn(0, 3)}  # fmt: skip
    optimizer = method.build(tensors)
    for _ in range(5):
        for tensor in tensors.values():
            # With the strides of its tensor, as autograd makes it.
            tensor.grad = torch.empty_like(tensor).copy_(torch.randn(tensor.shape, generator=generator))
        optimizer.step()
    return tensors


@pytest.mark.parametrize("piece", [7, 2**20])
def test_the_numbers_are_adamws(piece: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Breaks when a piece is stepped twice or left out, or a tensor that is not contiguous is stepped as a copy."""
    monkeypatch.setattr(paged_adamw, "PIECE", piece)
    knobs = {"learning_rate": 0.02, "weight_decay": 0.1, "epsilon": 1e-4}
    found, expected = trained(PagedAdamW(**knobs, folder=str(tmp_path))), trained(AdamW(**knobs))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, torch, psutil
from luthier.core import catalog
torch.set_num_threads(1)
weight = torch.ones(16_000_000)
weight.grad = torch.ones_like(weight)
optimizer = catalog.load("optimizers", sys.argv[1])().build({"w": weight})
torch._foreach_add_([torch.ones(10)], 1.0)
open("/proc/self/clear_refs", "w").write("5")
before = psutil.Process().memory_info().rss
for _ in range(2):
    optimizer.step()
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(max(peak, psutil.Process().memory_info().rss) - before)
"""


def test_moments_take_no_memory_in_a_step_or_between_steps() -> None:
    """Breaks when the moments of 16 million numbers, 128 MB, are in memory at once, be it for a moment."""
    grown = {}
    for name in ("adamw", "paged_adamw"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout)
    assert grown["adamw"] > 120e6 and grown["paged_adamw"] < 40e6, grown


def test_a_folder_in_memory_is_refused(tmp_path: Path) -> None:
    """Breaks when pages save nothing and nobody says so, or a folder is not found only at the first step."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\ntmpfs {tmp_path}/fast tmpfs rw 0 0\n", "utf-8")
    (tmp_path / "fast" / "deep").mkdir(parents=True)
    assert kind_of_file_system(tmp_path / "fast" / "deep", mounts) == "tmpfs"
    assert kind_of_file_system(tmp_path, mounts) == "ext4"
    assert kind_of_file_system(tmp_path, tmp_path / "none") == ""
    with pytest.raises(RecipeError, match="is no folder"):
        require_disk_folder(tmp_path / "missing")
    if Path("/dev/shm").is_dir() and kind_of_file_system(Path("/dev/shm")) == "tmpfs":
        with pytest.raises(RecipeError, match="lies in memory"):
            PagedAdamW(folder="/dev/shm").build({"w": torch.ones(2)})
