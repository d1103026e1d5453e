"""What the gates of a merge ask and tell: models against their parents merged anew, adapters against their sum.

Idea: of a run its own held-out rows are asked; a model that brings none is asked plain sentences, and one without a
tokenizer tokens that were drawn. What is told are plain values, with a sentence where no logits could be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from luthier.core.errors import LuthierError
from luthier.data.tokenizer import Tokenizer
from luthier.merge.adapter_parity import adapter_parity
from luthier.merge.adapters import Joined, Joining
from luthier.merge.lora import config_of
from luthier.merge.parents import TOKENIZER, Parent
from luthier.merge.parity import Merge, Parity, parity
from luthier.model.comparing.parity import Questions
from luthier.model.editing.role_names import tensor_roles
from luthier.model.files.sources import resolve_source
from luthier.recipes.exporting.questions import questions_for
from luthier.recipes.opening.results import model_from, started_in
from luthier.store.runs import RunDirectory, is_run

_DRAWN: Final = 4
"""Prompts that nobody wrote."""
_LONG: Final = 24
"""Tokens of each."""


def parity_of_models(merge: Merge, place: Path, noticed: Callable[[str], None]) -> dict[str, Any]:
    """What was measured of a merged model. Raises GateError where it is another than the merge of its parents."""
    return parity(merge, place, _questions(merge.parents[0], noticed), noticed=noticed).as_dict()


def parity_of_adapters(
    name: str, folder: Path, joining: Joining, found: Mapping[str, Joined], place: Path
) -> dict[str, Any]:
    """What was measured of a merged adapter, the first of which is called `name` and lies in `folder`.

    Raises GateError where the base computes something else with it. A base that is not here computes nothing.
    """
    base = str(config_of(folder).get("base_model_name_or_path"))
    if is_run(Path(name)):
        base = model_from(base, started_in(RunDirectory.open(Path(name))))
    try:
        parent = Parent.open(name, resolve_source(base))
    except LuthierError as failure:
        why_not = f"the base {base} cannot be opened ({failure.received:.200})"
        return {"passed": None, "not_compared": why_not, "base": base, "cut": None}
    with parent.shards:
        measured = adapter_parity(parent, joining, found, place, _questions(parent, lambda _line: None))
    cost = None if measured.cost is None else Parity(report=measured.cost).as_dict()
    return {**measured.as_dict(), "base": base, "cut": cost}


def _questions(first: Parent, noticed: Callable[[str], None]) -> Questions:
    """What a merge is asked: of a run its rows, else sentences; tokens that were drawn where there is no tokenizer."""
    path = first.texts.find(TOKENIZER)
    try:
        if path is not None:
            run = RunDirectory.open(Path(first.name)) if is_run(Path(first.name)) else None
            return questions_for(Tokenizer.load(path.parent), run, noticed=noticed)
    except LuthierError as failure:
        noticed(f"the tokenizer of {first.name} cannot be used ({failure.received:.200}), so drawn tokens are compared")
    rows = max((slot.rows for name, slot in first.shards.slots.items() if "embed" in tensor_roles(name)), default=1)
    drawn = np.random.default_rng(0).integers(0, max(1, rows), (_DRAWN, _LONG)).astype(np.int32)
    return Questions(tuple(drawn))
