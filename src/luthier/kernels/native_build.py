"""The C++ beside this file as a library for this CPU: compiled once, kept in the cache, loaded with ctypes.

Idea: plain C functions over pointers need no header of torch, so compiling takes seconds where torch's own extension
loader takes most of a minute and needs ninja besides; and a library for exactly this CPU may use all of its
instructions. It runs on torch's own OpenMP threads: torch has loaded libgomp under the name that the linker looks for.
The name of the file is a digest of sources, compiler and CPU, so that another machine that shares the cache makes its
own. Use when: a compiler is there, on Linux. Not when: it is not; the twin in plain torch does the same, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from luthier.core.child import start_child
from luthier.core.errors import MissingError
from luthier.core.paths import cache_folder

SOURCES: Final = Path(__file__).parent / "native"
COMPILERS: Final = ("g++", "c++", "clang++")
# Neither -ffast-math nor a part of it that assumes finite numbers: a NaN has to come out as one.
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
                "-fopenmp", "-fPIC", "-shared")  # fmt: skip
SECONDS: Final = 600.0


def library(folder: Path, flags: tuple[str, ...], *, headers: Sequence[Path] = ()) -> tuple[ctypes.CDLL, str]:
    """A folder's sources as a library, and what tells it from others; compiled where the cache has none like it.

    `headers` are those of other folders that the sources include.

    Raises MissingError when there is no compiler, it fails, or this is no Linux.
    """
    if sys.platform != "linux":
        raise MissingError(f"C++ kernels are not built on {sys.platform}")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise MissingError(
            "C++ kernels need a compiler, and none is in PATH",
            allowed=", ".join(COMPILERS),
            do="install one (apt-get install g++)",
        )
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    place = cache_folder() / "native" / f"{_digest([*sources, *headers], compiler, flags)}.so"
    if not place.is_file():
        _compile(compiler, [path for path in sources if path.suffix == ".cpp"], place, flags)
    try:
        return ctypes.CDLL(str(place)), place.stem[:12]
    except OSError as failure:
        raise MissingError(f"{place} cannot be loaded: {failure}", do=f"remove {place}") from failure


def _digest(sources: list[Path], compiler: str, flags: tuple[str, ...]) -> str:
    total = hashlib.sha256(" ".join(flags).encode())
    for path in sources:
        total.update(path.read_bytes())
    stat = Path(compiler).resolve().stat()
    total.update(f"{compiler} {stat.st_size} {stat.st_mtime_ns} {platform.machine()} {_processor()}".encode())
    return total.hexdigest()[:32]


def _processor() -> str:
    """The name of this CPU and what it can do; two of one name may differ in that, in virtual machines for one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    told = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(told.get(key, "") for key in ("model name", "CPU part", "flags", "Features"))


def _compile(compiler: str, sources: list[Path], place: Path, flags: tuple[str, ...]) -> None:
    """Compile into a file of another name beside `place` and rename it, so that no process sees half of one."""
    wide = ["-mprefer-vector-width=512"] if "avx512f" in _processor().split() else []
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=place.parent) as folder:
            made = Path(folder) / place.name
            command = [compiler, *flags, *wide, "-o", str(made), *map(str, sources)]
            code, said = _run(command)
            if code != 0:
                words = said.strip().splitlines()[:1] or [f"exit {code}"]
                raise MissingError(f"{compiler} does not compile the C++ kernels: {words[0]}")
            made.replace(place)
    except (OSError, subprocess.SubprocessError) as failure:
        raise MissingError(f"the C++ kernels cannot be compiled into {place.parent}: {failure}") from failure


def _run(command: list[str]) -> tuple[int, str]:
    """The exit code of a compiler and what it said; nothing that it has started lives longer than we do."""
    with tempfile.TemporaryFile() as words:
        child = start_child("luthier.core.guarded", command, stderr=words.fileno())
        try:
            code = child.wait(timeout=SECONDS)
        finally:
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
            child.wait()
        words.seek(0)
        return code, words.read().decode("utf-8", "replace")
