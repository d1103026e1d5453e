"""Many short runs in one process: the command line called as a function, its result proved without a fresh process."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from luthier.core.paths import cache_folder
from tests.cli.commands import Said
from tests.cli.commands import luthier as _luthier


def luthier(*arguments: object) -> Said:
    """A command line in this process; its result is proved here too: a fresh process takes longer than the run."""
    with proved_here():
        return _luthier(*arguments)


@contextlib.contextmanager
def proved_here() -> Iterator[None]:
    """Within the block, what would be verified in a fresh process is verified in this one."""
    if importlib.util.find_spec("luthier.recipes.proving.verify") is None:
        yield
        return
    verify = importlib.import_module("luthier.recipes.proving.verify")
    apart, here = verify.verify_apart, verify.verify_run
    holders = [module for name, module in sys.modules.items() if name.startswith("luthier.")]
    changed = [module for module in holders if vars(module).get("verify_apart") is apart]
    for module in changed:
        module.verify_apart = here  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in changed:
            module.verify_apart = apart  # type: ignore[attr-defined]


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """With LUTHIER_CACHE there, and no hub; kernels that are compiled already are taken along."""
    folder.mkdir(parents=True, exist_ok=True)
    native, compiled = folder / "native", cache_folder() / "native"
    if compiled.is_dir() and not native.exists():
        native.symlink_to(compiled.resolve())
    before = {name: os.environ.get(name) for name in ("LUTHIER_CACHE", "HF_HUB_OFFLINE")}
    os.environ.update({"LUTHIER_CACHE": str(folder), "HF_HUB_OFFLINE": "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
