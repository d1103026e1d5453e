"""luthier: a fine-tuning workshop for language models.

    import luthier
    run = luthier.finetune(model="seedling", data="rows.jsonl", adapter=luthier.LoRA(rank=16))

Names are looked up when they are first used, so that importing this package is instant: `finetune`, `Run`; what comes
before and after it (`plan`, `plan_training`, `plan_inference`, `evaluate`, `probe`, `merge_models`, `merge_adapters`,
`export`, `compare`); `load`, `Session`, `load_several`, `SeveralSession`; `open_named` (a run or a model, to be asked),
`Opened`, `Engine`, `Request`, `Sampling`; `LuthierError`, which every error is; and the class of every method of the
catalog (`LoRA`, `IA3`, ...).
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

_HOMES = {
    "finetune": "luthier.api",
    "Run": "luthier.api",
    **dict.fromkeys(
        # There is no `merge`: the machine that merges is a folder of that name.
        ("plan", "plan_training", "plan_inference", "evaluate", "probe", "merge_models", "merge_adapters", "export",
         "compare"), "luthier.verbs"),
    "load": "luthier.recipes.opening.session",
    "Session": "luthier.recipes.opening.session",
    "load_several": "luthier.recipes.several.session",
    "SeveralSession": "luthier.recipes.several.session",
    "open_named": "luthier.recipes.opening.opened",
    "Opened": "luthier.recipes.opening.opened",
    "Engine": "luthier.infer.engine",
    "Request": "luthier.infer.request",
    "Sampling": "luthier.model.speaker",
    "LuthierError": "luthier.core.errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    found = _method_classes().get(name)
    if found is None:
        raise AttributeError(f"luthier has no {name!r}; it offers {', '.join(__dir__())}")
    from luthier.core import catalog

    return catalog.load(*found)


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_method_classes()])


def _method_classes() -> dict[str, tuple[str, str]]:
    """Class name -> (family, method), read from the files without importing them."""
    # Not at the top: every small process of ours imports this package, and the catalog takes longer than all of it.
    from luthier.core import catalog

    found = {}
    for family in catalog.families():
        for name in catalog.names(family):
            contract = re.search(r"^class (\w+)\(Method\b", _text(catalog.ROOT / family / "__init__.py"), re.MULTILINE)
            text = _text(catalog.ROOT / family / f"{name}.py")
            if contract and (made := re.search(rf"^class (\w+)\({contract[1]}\b", text, re.MULTILINE)):
                found[made[1]] = (family, name)
    return found


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""
