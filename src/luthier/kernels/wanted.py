"""What LUTHIER_KERNELS says; read without torch, since there are kernels for work that needs none."""

from __future__ import annotations

import os
from collections.abc import Mapping

from luthier.core.errors import RecipeError

CHOICES = ("auto", "torch", "blocks", "native", "triton")


def wanted_kernels(environ: Mapping[str, str] = os.environ) -> str:
    """The kernels that are asked for; `chosen.py` says what each of them is."""
    value = environ.get("LUTHIER_KERNELS") or "auto"
    if value not in CHOICES:
        raise RecipeError(f"LUTHIER_KERNELS is {value!r}", allowed=", ".join(CHOICES))
    return value
