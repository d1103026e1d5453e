"""Places: where luthier keeps what is its own, and where runs go.

Runs lie in the project, in plain sight (`./runs/<date>-<name>`). What can be made again lies in the cache. Environment
variables are read at each call, so that a test or a notebook can change them.
"""

from __future__ import annotations

import datetime
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from luthier.core.errors import RecipeError

RUNS: Final = "runs"
_LONGEST_NAME: Final = 60


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """What can be made again: LUTHIER_CACHE, else luthier in XDG_CACHE_HOME or ~/.cache."""
    return _own(environ, "LUTHIER_CACHE") or _shared(environ, "XDG_CACHE_HOME", Path(".cache"))


def run_folder(name: str, *, today: datetime.date, parent: Path = Path(RUNS)) -> Path:
    """A folder of `parent` that does not exist yet: `<date>-<name>`, and `-2`, `-3`, ... while it does."""
    base = f"{today.isoformat()}-{slug(name)}"
    candidates = (parent / (base if number == 1 else f"{base}-{number}") for number in range(1, 10_000))
    for candidate in candidates:
        if not candidate.exists() and not candidate.is_symlink():
            return candidate
    raise RecipeError(f"{parent} has 9,999 runs called {base}", do="choose another name with run:")


def slug(name: str) -> str:
    """`name` as part of a folder name: ASCII letters, digits, dots, dashes; never empty, hidden or long."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii").lower()
    words = re.sub(r"[^a-z0-9.]+", "-", ascii_name).strip("-.")
    return words[:_LONGEST_NAME].rstrip("-.") or "run"


def _own(environ: Mapping[str, str], variable: str) -> Path | None:
    value = environ.get(variable)
    return Path(value).expanduser() if value else None


def _shared(environ: Mapping[str, str], variable: str, default: Path) -> Path:
    value = environ.get(variable)
    # The XDG specification: a relative path is to be ignored.
    base = Path(value) if value and Path(value).is_absolute() else Path.home() / default
    return base / "luthier"
