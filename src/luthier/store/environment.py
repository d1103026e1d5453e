"""The environment receipt: what a run was made with, so that a later one can say what has changed.

No library is imported to learn its version; what only the running process knows (threads, device) is handed in.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

_PACKAGES: Final = (
    "luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "jaxtyping", "pyarrow",
)  # fmt: skip
_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
_GIT_SECONDS: Final = 5


def receipt(command: Sequence[str], *, folder: Path = Path(), more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Versions, machine, variables that matter, the git commit of `folder` if it has one, and the exact command."""
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    variables |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("LUTHIER_")}
    return {
        "command": shlex.join(command),
        "folder": str(folder.resolve()),
        "python": platform.python_version(),
        "packages": versions(),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            "threads": os.cpu_count() or 1,
            "memory_bytes": psutil.virtual_memory().total,
        },
        "variables": variables,
        "git": git_state(folder),
        **(more or {}),
    }


def versions() -> dict[str, str]:
    """The versions of the packages whose change could change a result."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is at and whether files differ from it; None without git or a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed_files": len(changed.splitlines()) if changed is not None else None}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The name of the processor."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
