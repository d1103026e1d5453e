"""Kept decompositions: found by what was decomposed, checked when read, and bounded in room."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from luthier.model.base_spectra import BaseSpectra

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
        for age, path in enumerate(tmp_path.glob("*.safetensors")):
            os.utime(path, (1000 + number, 1000 + number + age * 0))
    assert [spectra.has(WEIGHT + number) for number in range(3)].count(True) == 2 and spectra.has(WEIGHT + 2)
    assert not BaseSpectra(tmp_path / "none", most_bytes=10).has(WEIGHT)
    BaseSpectra(tmp_path / "none", most_bytes=10).of(WEIGHT)
    assert not list((tmp_path / "none").glob("*.safetensors"))


def _only(spectra: BaseSpectra, weight: torch.Tensor) -> bytes:
    spectra.of(weight)
    (path,) = (spectra.folder or Path()).glob("*.safetensors")
    return path.read_bytes()
