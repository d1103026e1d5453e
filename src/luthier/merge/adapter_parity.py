"""The parity of merged adapters: the base with the new adapter on it, held against the base with what was computed.

Idea: what adapters add to a base is known without their files' words: the weighted sum of their products, or a method
applied to these as whole matrices. That is the source. The artefact is the base with the new folder put on it by the
reader that everybody uses. Where a rank was cut the two are not the same, and what that costs is told, not refused;
the files must hold what is left of the sum all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, final

import numpy as np
from jaxtyping import Float

from luthier.adapters import saved_adapter
from luthier.core.errors import GateError
from luthier.kernels.floats import is_real
from luthier.merge.adapters import Joined, Joining, merged_change, share_lost
from luthier.merge.lora import placed
from luthier.merge.parents import Parent
from luthier.merge.parity import Parity, side_by_side
from luthier.mergers import WeightedSum
from luthier.model.comparing.parity import Questions, compare, hear
from luthier.model.comparing.parity_sides import StreamedSide
from luthier.model.comparing.streamed import NO_MODEL, RowSource, StreamedModel
from luthier.model.comparing.tolerances import EXACT
from luthier.model.editing import attachment as surgery
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.sites import find_sites
from luthier.model.files.adapter_files import fill
from luthier.model.load import config_of

Adds = Callable[[Float[np.ndarray, "rows columns"], int], None]
"""Adds its rows, from a first one on, to those of the base."""
_PIECE: Final = 1 << 22
"""Numbers of a block of the base."""
_WHOLE: Final = 1e-6
"""What is lost of a sum where only rounding takes from it, as a share of its norm."""
_CLOSE: Final = replace(EXACT, form="factors in float32", weights=None)


def adapter_parity(
    base: Parent, joining: Joining, found: Mapping[str, Joined], place: Path, questions: Questions
) -> Parity:
    """Hold the folder `place` against what was merged. Raises GateError where it computes something else."""
    try:
        wanted = StreamedModel(config_of(base.files.source), OnBase(base, _by_tensor(base, joining)), base.name)
    except NO_MODEL as failure:
        nobody = StreamedSide(base.name, None, ())
        return Parity(report=compare(hear(nobody, Questions(())), nobody, _CLOSE), why_not=failure.received)
    artefact = StreamedSide("the merged adapter", _read_back(base, place), questions.prompts, bare=False)
    said, cost = StreamedSide("the base with the adapters", wanted, questions.prompts), None
    if share_lost(list(found.values())) > _WHOLE:
        cost = side_by_side(said, artefact, questions, _CLOSE)
        left = placed({module: each.factors for module, each in found.items()}, base.shards.slots, str(place))
        kept = OnBase(base, {name: factors.add_to for name, factors in left.items()})
        model = StreamedModel(config_of(base.files.source), kept, base.name)
        said = StreamedSide("the base with what is left of the sum", model, questions.prompts)
    report = side_by_side(said, artefact, questions, _CLOSE)
    report.require()
    return Parity(report=report, cost=cost)


@final
class OnBase(RowSource):
    """The tensors of a base, and what is added to some of them."""

    def __init__(self, base: Parent, changes: Mapping[str, Adds]) -> None:
        self.base, self.changes, self.slots = base, changes, base.shards.slots

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A few rows at a time."""
        slot = self.slots[name]
        if not is_real(slot.dtype):
            yield self.base.shards.read(name)
            return
        step = max(1, _PIECE // max(1, slot.columns))
        for first in range(0, slot.rows, step):
            rows = self.base.rows(name, first, min(first + step, slot.rows))
            if name in self.changes:
                self.changes[name](rows, first)
            yield rows


def _by_tensor(base: Parent, joining: Joining) -> dict[str, Adds]:
    """What is added to each tensor before any rank is cut."""
    found: dict[str, Adds] = {}
    for module in joining.modules:
        name = next(iter(placed({module: joining.of(module)[0]}, base.shards.slots, base.name)))
        found[name] = partial(_add, joining, module)
    return found


def _add(joining: Joining, module: str, rows: Float[np.ndarray, "rows columns"], first: int) -> None:
    """Add the rows of a module's change: of a weighted sum by thin factors, of a method's by whole matrices."""
    parts = joining.of(module)
    if joining.method is None:
        for part, weight in zip(parts, joining.weights, strict=True):
            replace(part, up=part.up * weight).add_to(rows, first)
    elif isinstance(joining.method, WeightedSum):
        changes = [np.zeros(part.shape, np.float32) for part in parts]
        for change, part in zip(changes, parts, strict=True):
            part.add_to(change, 0)
        rows += merged_change(module, changes, joining.weights, joining.method)[first : first + len(rows)]
    else:
        # In what basis numbers are kept or dropped is the method's own; only the cut of the rank is left out.
        joining.joined(module, sum(len(part.down) for part in parts)).factors.add_to(rows, first)


def _read_back(base: Parent, place: Path) -> StreamedModel:
    """The base with the new adapter on it, as `luthier generate --adapter` puts it there."""
    model = StreamedModel(config_of(base.files.source), OnBase(base, {}), base.name)
    try:
        sites = find_sites(model.module)
        attachment = Attachment("merged", saved_adapter(place, sites).attach(sites))
        surgery.put_on(model.module, attachment)
        fill(attachment, place)
    except NO_MODEL as failure:
        raise GateError(f"what was written is no whole adapter: {failure.received}; nothing was kept",
                        allowed=failure.allowed, do="report this: it should not happen") from failure  # fmt: skip
    return model
