"""Kept decompositions: found by what was decomposed, checked when read, and bounded in room."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from luthier.model.comparing.base_spectra import ABANDONED, MOST_BYTES, BaseSpectra

WEIGHT = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))


def test_the_same_matrix_is_found_and_another_is_not(tmp_path: Path) -> None:
    """Breaks when a decomposition goes by a name, or is made anew each time."""
    spectra = BaseSpectra(tmp_path)
    made = spectra.of(WEIGHT)
    (path,) = tmp_path.glob("*.safetensors")
    written = path.read_bytes()
    kept = spectra.of(WEIGHT.to(torch.float64))
    assert torch.equal(made.left, kept.left) and torch.equal(made.right, kept.right) and path.read_bytes() == written
    assert spectra.has(WEIGHT) and not spectra.has(WEIGHT + 1e-3)
    other = spectra.of(2 * WEIGHT)
    assert torch.allclose(other.sizes, 2 * made.sizes) and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_or_wrong_file_is_made_anew(tmp_path: Path) -> None:
    """Breaks when a file is believed for its name."""
    spectra = BaseSpectra(tmp_path)
    true = spectra.of(WEIGHT)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    BaseSpectra(tmp_path / "other").of(torch.randn(20, 30))
    (wrong,) = (tmp_path / "other").glob("*.safetensors")
    for data in (whole[:100], b"", whole[:-8] + b"\xff" * 8, wrong.read_bytes()):
        path.write_bytes(data)
        assert torch.allclose(spectra.of(WEIGHT).sizes, true.sizes)
        assert torch.allclose(BaseSpectra(None).of(WEIGHT).sizes, true.sizes)


def test_old_files_go_when_the_folder_is_full(tmp_path: Path) -> None:
    """Breaks when the cache grows without end, or forgets what was used last."""
    one = len(_only(BaseSpectra(tmp_path / "one"), WEIGHT))
    spectra = BaseSpectra(tmp_path, most_bytes=2 * one + 10)
    for number in range(3):
        spectra.of(WEIGHT + number)
        for path in tmp_path.glob("*.safetensors"):
            os.utime(path, (1000 + number, 1000 + number))
    assert [spectra.has(WEIGHT + number) for number in range(3)].count(True) == 2 and spectra.has(WEIGHT + 2)
    assert not BaseSpectra(tmp_path / "none", most_bytes=10).has(WEIGHT)
    BaseSpectra(tmp_path / "none", most_bytes=10).of(WEIGHT)
    assert not list((tmp_path / "none").glob("*.safetensors"))


def test_what_is_kept_is_told(tmp_path: Path) -> None:
    """Breaks when nobody can see what the cache takes, and where."""
    spectra = BaseSpectra(tmp_path)
    assert spectra.kept() == {} == BaseSpectra(None).kept()
    size = len(_only(spectra, WEIGHT))
    assert spectra.kept() == {"folder": str(tmp_path), "files": 1, "bytes": size, "most_bytes": MOST_BYTES}


def test_what_a_killed_process_has_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    """Breaks when half-written files pile up beside the bound, or another process loses its own."""
    for name, age in (("old", ABANDONED + 60), ("new", 0)):
        (tmp_path / f".{name}.safetensors.1.tmp").write_bytes(b"half")
        os.utime(tmp_path / f".{name}.safetensors.1.tmp", (time.time() - age,) * 2)
    BaseSpectra(tmp_path).of(WEIGHT)
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".new.safetensors.1.tmp"]


def test_several_at_once_each_get_the_truth_within_the_bound(tmp_path: Path) -> None:
    """Breaks when a file that another takes away, or has half written, ends a look or is believed."""
    one = len(_only(BaseSpectra(tmp_path / "one"), WEIGHT))
    spectra = BaseSpectra(tmp_path / "all", most_bytes=3 * one + 10)
    weights = [WEIGHT + number % 5 for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(spectra.of, weights))
    for weight, each in zip(weights, found, strict=True):
        assert torch.allclose(each.left @ (each.sizes[:, None] * each.right.t()), weight, atol=1e-4)
    spectra.of(WEIGHT + 9)
    assert spectra.kept()["bytes"] <= spectra.most_bytes


def _only(spectra: BaseSpectra, weight: torch.Tensor) -> bytes:
    spectra.of(weight)
    (path,) = (spectra.folder or Path()).glob("*.safetensors")
    return path.read_bytes()
