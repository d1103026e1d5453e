"""The C++ is compiled once, and what stands in its way is told and costs nothing but speed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
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


DAMAGES = {
    "another bit": lambda held: held[: len(held) // 2] + bytes([held[len(held) // 2] ^ 1]) + held[len(held) // 2 + 1 :],
    "cut": lambda held: held[: len(held) // 2],
    "longer": lambda held: held + b"\0",
    "nothing": lambda held: b"",
    "zeros": lambda held: bytes(len(held)),
    "that of another": lambda held: held[:-32] + hashlib.sha256(held[:-32]).digest(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_anew(own_cache: Path, tmp_path: Path, damage: str) -> None:
    """Breaks when machine code with another bit is run, or half of it ends in a traceback."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "seven.cpp").write_text('extern "C" int seven() { return 7; }', "utf-8")
    flags = ("-shared", "-fPIC")
    loaded, _ = native_build.library(sources, flags)
    assert loaded.seven() == 7 and native_build.is_built(sources, flags)
    [place] = own_cache.iterdir()
    whole = place.read_bytes()
    # Another file: this process runs the old one.
    place.unlink()
    place.write_bytes(DAMAGES[damage](whole))
    assert not native_build.is_built(sources, flags)
    assert native_build.library(sources, flags)[0].seven() == 7 and place.read_bytes() == whole


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


SLOW_COMPILER = """#!{python}
import os, pathlib, sys, time
log = pathlib.Path({log!r})
made = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
source = sys.argv[-1]
def tell(what):
    with log.open("a") as file:
        file.write(f"{{what}} {{os.getpid()}} {{pathlib.Path(source).name}}\\n")
tell("begin")
if "-c" in sys.argv:
    if source.endswith("wrong.cpp"):
        while log.read_text().count("begin") < 2:
            time.sleep(0.01)
        sys.exit("wrong.cpp:1: no such thing")
    time.sleep({seconds})
made.write_text("made of " + source)
tell("end")
"""


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[str], *, seconds: float) -> Path:
    """A folder of sources for a compiler that takes its time and logs when it begins and ends; the log."""
    sources, log, compiler = tmp_path / "sources", tmp_path / "log", tmp_path / "slow-compiler"
    sources.mkdir()
    for name in names:
        (sources / name).write_text("", "utf-8")
    compiler.write_text(SLOW_COMPILER.format(python=sys.executable, log=str(log), seconds=seconds), "utf-8")
    compiler.chmod(0o755)
    monkeypatch.setattr(native_build, "COMPILERS", (str(compiler),))
    return log


@pytest.mark.parametrize("processors", [1, 3])
def test_files_are_compiled_side_by_side_and_then_linked(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    """Breaks when one waits for another, more run than there are processors, or the library lacks one."""
    names = [f"{name}.cpp" for name in "abcdef"]
    log = fake(tmp_path, monkeypatch, names, seconds=0.5)
    monkeypatch.setattr(native_build.os, "sched_getaffinity", lambda _: set(range(processors)))
    with pytest.raises(MissingError, match="cannot be loaded"):
        native_build.library(tmp_path / "sources", ())
    running = most = 0
    lines = log.read_text("utf-8").splitlines()
    for line in lines:
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert most == processors and len(lines) == 2 * (len(names) + 1)
    assert sorted(line.split()[-1] for line in lines[:-2] if line.startswith("begin")) == names
    (made,) = own_cache.iterdir()
    assert made.suffix == ".so" and made.read_bytes()[:-32].endswith(b".o")


def test_one_that_fails_ends_the_others_and_leaves_nothing(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a compiler goes on for minutes after its library was given up."""
    log = fake(tmp_path, monkeypatch, ["slow.cpp", "wrong.cpp"], seconds=600)
    monkeypatch.setattr(native_build.os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(MissingError, match="no such thing"):
        native_build.library(tmp_path / "sources", ())
    begun = [line.split() for line in log.read_text("utf-8").splitlines()]
    (slow,) = [int(pid) for what, pid, name in begun if (what, name) == ("begin", "slow.cpp")]
    # It is killed together with what we wait for, and may take a moment longer.
    assert not psutil.wait_procs([psutil.Process(slow)] if psutil.pid_exists(slow) else [], timeout=30)[1]
    assert not list(own_cache.iterdir())
