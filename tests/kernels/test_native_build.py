"""The C++ is compiled once, and what stands in its way is told and costs nothing but speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.core.errors import MissingError
from luthier.kernels import native_build
from luthier.kernels.chosen import backend_for
from luthier.kernels.native_backend import NativeBackend
from luthier.model.load import load_model

CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    # Nothing here asks how fast it is.
    hasty = tuple("-O0" if flag == "-O3" else flag for flag in native_build.FLAGS)
    monkeypatch.setattr(native_build, "FLAGS", hasty)
    return tmp_path / "native"


def test_it_is_compiled_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when every process compiles anew, or something is left beside the library."""
    first = NativeBackend.build()
    made = list(own_cache.iterdir())
    assert [path.suffix for path in made] == [".so"] and first.identity.startswith("native ")
    monkeypatch.setattr(native_build, "_compile", None)
    assert NativeBackend.build().identity == first.identity


def test_other_sources_are_another_library(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a new version of luthier runs the C++ of the old one."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in native_build.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    before = NativeBackend.build().identity
    monkeypatch.setattr(native_build, "SOURCES", sources)
    assert NativeBackend.build().identity == before
    (sources / "rows.cpp").write_text((sources / "rows.cpp").read_text("utf-8") + "\n// another version\n")
    assert NativeBackend.build().identity != before


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("PATH", str(tmp_path))
    return "need a compiler"


def with_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'no space in hell' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native_build, "COMPILERS", (str(compiler),))
    return "no space in hell"


def with_a_cache_that_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "native").write_text("in the way")
    return "cannot be compiled into"


def with_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    NativeBackend.build()
    # A library that is loaded stays what it is; one of another name is read from the disk.
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-DOTHER"))
    monkeypatch.setattr(native_build, "_compile", lambda _, sources, place, flags: place.write_text("no library"))
    return "cannot be loaded"


@pytest.mark.parametrize(
    "trouble", [without_compiler, with_a_broken_one, with_a_cache_that_is_a_file, with_a_library_that_is_none]
)
def test_trouble_is_told_and_the_twin_runs(
    trouble: object, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a machine without a working compiler cannot train, or trains slower without a word."""
    words = trouble(monkeypatch, tmp_path)  # type: ignore[operator]
    backend, missing = backend_for("auto", CPU, torch.float32)
    assert backend.name == "blocks" and words in missing
    with pytest.raises(MissingError, match=words):
        backend_for("native", CPU, torch.float32)
    model = load_model("seedling", precision="float32")
    assert model.kernels == "our blocks, blocks" and any(words in notice for notice in model.notices)


def test_float64_is_left_to_the_twin() -> None:
    """Breaks when a precision that the C++ does not have is handed to it."""
    assert backend_for("native", CPU, torch.float64)[0].name == "blocks"
