"""The proof of a merge: tensors of the written files, computed anew and whole, held against what the files hold.

Idea: the stream cuts tensors into blocks, shares them out and writes them from a thread of its own. A few tensors of
every kind are read from the parents and merged in one piece, without any of that; the files must hold the same numbers,
up to the last bit of their type, and for weighted sums of float32, since sums over other blocks may round otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Final

import numpy as np

from luthier.core.errors import GateError
from luthier.data.strict_json import excerpt
from luthier.kernels.floats import narrowed, smallest, step, widened
from luthier.merge.parents import Parent
from luthier.merge.plan import Job, Plan
from luthier.merge.source import Source
from luthier.mergers import WeightedSum
from luthier.model.editing.role_names import tensor_roles
from luthier.model.files.shards import Shards

LARGEST: Final = 1 << 22
"""Numbers of a tensor that is computed anew, at most, where memory allows for as many."""
_COPIES: Final = 10
"""Float32 copies of a tensor that are held for each parent, about."""
MOST: Final = 12
ROUNDED: Final = 2.0**-20
"""What sums in float32 may be off, in another order and with weights from such sums, by the largest of their terms."""


@np.errstate(all="ignore")
def prove(folder: Path, parents: Sequence[Parent], plan: Plan, memory_bytes: int) -> int:
    """How many tensors were compared. Raises GateError where a file holds other numbers than were computed."""
    chosen = _some_of_each_kind(plan, min(LARGEST, memory_bytes // (4 * _COPIES * len(parents))))
    with Shards(folder) as written:
        for job in chosen:
            part = Source(parents, job).part(0, job.slot.rows)
            wanted = widened(narrowed(job.method.whole(part), job.slot.dtype))
            found = widened(written.read(job.name, 0, job.slot.rows))
            # Equal, or neighbours: numbers of a type in a row have bit patterns in a row.
            apart = np.abs(wanted - found)
            allowed = step(job.slot.dtype) * np.abs(wanted)
            if isinstance(job.method, WeightedSum):
                # C++ adds up in another order: where numbers cancel, what is left is as uncertain as they were.
                for rows in part.models if part.base is None else (*part.models, part.base):
                    np.maximum(allowed, ROUNDED * np.abs(rows), out=allowed)
            # Asked this way round, what is no number is not near.
            near = apart <= allowed + smallest(job.slot.dtype)
            if not near.all():
                count = int((~near).sum())
                raise GateError(
                    f"{excerpt(job.name)} was written with {count} numbers that differ from those computed anew; "
                    "nothing was kept",
                    do="report this: it should not happen",
                )
    return len(chosen)


def _some_of_each_kind(plan: Plan, largest: int) -> list[Job]:
    """The smallest and then others: each role once, so far as tensors are small enough to be held whole."""
    found: dict[tuple[str, ...], Job] = {}
    for job in sorted(plan.jobs, key=lambda job: prod(job.slot.shape)):
        if not job.copied and 0 < prod(job.slot.shape) <= largest:
            found.setdefault(tensor_roles(job.name), job)
    return list(found.values())[:MOST]
