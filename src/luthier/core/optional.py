"""Optional packages: imported where they are needed, with the command that installs them when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from luthier.core.errors import MissingError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """The module `module`, which comes with `luthier[extra]` and is needed for `purpose`.

    Raises MissingError with the install command when it, or something it imports, is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        package = module.partition(".")[0]
        absent = failure.name is not None and failure.name.partition(".")[0] == package
        raise MissingError(
            f"{purpose} needs the package {package}, which {'is not installed' if absent else 'cannot be imported'}"
            + ("" if absent else f" ({failure})"),
            do=f'install it with: pip install "luthier[{extra}]"',
        ) from failure
