"""The C++ beside this file as a library for this CPU: compiled once, kept in the cache, loaded with ctypes.

Idea: plain C functions over pointers need no header of torch, so compiling takes seconds where torch's own extension
loader takes most of a minute and needs ninja besides; each file is compiled by a process of its own, as many at once as
there are processors for us; and a library for exactly this CPU may use all of its
instructions. What shares its work out runs on torch's own OpenMP threads: torch has loaded libgomp under the name that
the linker looks for.
The name of the file is a digest of sources, compiler and CPU, so that another machine that shares the cache makes its
own. At its end is a digest of its name and the rest: a file that has been damaged is compiled anew.
Use when: a compiler is there, on Linux. Not when: it is not; the twin in Python does the same, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final, NamedTuple

from luthier.core.child import start_child
from luthier.core.errors import MissingError
from luthier.core.paths import cache_folder

SOURCES: Final = Path(__file__).parent / "native"
COMPILERS: Final = ("g++", "c++", "clang++")
# Neither -ffast-math nor a part of it that assumes finite numbers: a NaN has to come out as one.
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
                "-fopenmp", "-fPIC", "-shared")  # fmt: skip
SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.02
_DIGEST_BYTES: Final = 32


def library(folder: Path, flags: tuple[str, ...], *, headers: Sequence[Path] = ()) -> tuple[ctypes.CDLL, str]:
    """A folder's sources as a library, and what tells it from others; compiled where the cache has none like it.

    `headers` are those of other folders that the sources include.

    Raises MissingError when there is no compiler, it fails, or this is no Linux.
    """
    compiler = _compiler()
    sources, place = _named(folder, compiler, flags, headers)
    if not is_whole(place):
        _compile(compiler, sources, place, flags)
    try:
        return ctypes.CDLL(str(place)), place.stem[:12]
    except OSError as failure:
        raise MissingError(f"{place} cannot be loaded: {failure}", do=f"remove {place}") from failure


def is_built(folder: Path, flags: tuple[str, ...]) -> bool:
    """Whether `library` would find it in the cache."""
    try:
        return is_whole(_named(folder, _compiler(), flags)[1])
    except MissingError:
        return False


def is_whole(place: Path) -> bool:
    """Whether a library is there as it was compiled: one with another bit, or another's, may compute something else."""
    try:
        held = place.read_bytes() if place.is_file() else b""
    except OSError:
        return False
    code, digest = held[:-_DIGEST_BYTES], held[-_DIGEST_BYTES:]
    return bool(code) and _seal(place.name, code) == digest


def _seal(name: str, code: bytes) -> bytes:
    """What stands at the end of a library of that name."""
    return hashlib.sha256(name.encode() + b"\0" + code).digest()


def _compiler() -> str:
    if sys.platform != "linux":
        raise MissingError(f"C++ kernels are not built on {sys.platform}")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise MissingError(
            "C++ kernels need a compiler, and none is in PATH",
            allowed=", ".join(COMPILERS),
            do="install one (apt-get install g++)",
        )
    return compiler


def _named(
    folder: Path, compiler: str, flags: tuple[str, ...], headers: Sequence[Path] = ()
) -> tuple[list[Path], Path]:
    """The files to be compiled, and the place of their library."""
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    place = cache_folder() / "native" / f"{_digest([*sources, *headers], compiler, flags)}.so"
    return [path for path in sources if path.suffix == ".cpp"], place


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
            # The longest first: it is waited for in any case.
            ordered = sorted(sources, key=lambda path: path.stat().st_size, reverse=True)
            made, objects = Path(folder) / place.name, [Path(folder) / f"{path.stem}.o" for path in ordered]
            command = [compiler, *flags, *wide]
            _run([[*command, "-c", "-o", str(into), str(path)] for path, into in zip(ordered, objects, strict=True)])
            _run([[*command, "-o", str(made), *map(str, objects)]])
            # Behind the library, where no loader looks: so both are there or neither is.
            seal = _seal(place.name, made.read_bytes())
            with made.open("ab") as file:
                file.write(seal)
            made.replace(place)
    except (OSError, subprocess.SubprocessError) as failure:
        raise MissingError(f"the C++ kernels cannot be compiled into {place.parent}: {failure}") from failure


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Run a compiler once for each command, as many at once as there are processors for us.

    The first that fails ends all others; nothing that they have started lives longer than we do.
    """
    waiting, running = list(reversed(commands)), list[_Running]()
    deadline = time.monotonic() + SECONDS
    with ExitStack() as opened:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                running.append(opened.enter_context(_started(waiting.pop())))
            running = [one for one in running if not _succeeded(one)]
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(commands[0]), SECONDS)
            time.sleep(_LOOK_SECONDS)


class _Running(NamedTuple):
    """A compiler at work, and the file of what it says."""

    compiler: str
    child: subprocess.Popen[bytes]
    words: IO[bytes]


@contextmanager
def _started(command: Sequence[str]) -> Iterator[_Running]:
    """A compiler that ends with the block, with all that it has started."""
    with tempfile.TemporaryFile() as words:
        child = start_child("luthier.core.guarded", command, stderr=words.fileno())
        try:
            yield _Running(command[0], child, words)
        finally:
            # The end of its input ends it.
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
            child.wait()


def _succeeded(running: _Running) -> bool:
    """Whether it has ended. Raises MissingError with its first line where it has failed."""
    code = running.child.poll()
    if code:
        running.words.seek(0)
        words = running.words.read().decode("utf-8", "replace").strip().splitlines()[:1] or [f"exit {code}"]
        raise MissingError(f"{running.compiler} does not compile the C++ kernels: {words[0]}")
    return code == 0
