"""What a measured process runs in: which Python, and variables under which it reads and writes nothing but HOME."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"


def interpreter(environment: str | None, home: Path) -> Path:
    """The Python of a peer's virtual environment in HOME; ours where there is none to name."""
    return Path(sys.executable) if environment is None else home / f"venv-{environment}" / "bin" / "python"


def variables(home: Path, *, threads: int | None = None, device: str = "cpu") -> dict[str, str]:
    """Offline, on the chosen device, with this checkout first on the import path, and all caches in HOME.

    The number of threads is left to each program where none is given.
    """
    paths = [str(SOURCE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf"),
        "LUTHIER_CACHE": str(home / "luthier-cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
