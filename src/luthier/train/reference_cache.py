"""Reference log-probabilities of all rows, found once before the first step and kept on disk.

Idea: a reference that does not change says the same in every epoch. So all rows are gone through once, in the order in
which they lie, without the adapter; what each trained token is worth there is a column of float32 in the run directory,
which is mapped into memory and noted on trees as they come. Blocks of rows are computed each by itself, so that what
was found before a kill is what would be found again, to the bit, and the next start goes on behind it.
Equation: row i, token t: log ref(y_t | y_<t), at the policy's temperature.
Source: as precompute_ref_log_probs in TRL's DPO trainer (arXiv 2305.18290 leaves it open); Rafailov et al., section 4.
Cost: one forward pass over all rows, 4 bytes for each trained token; then no pass of the reference in any step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import CorruptError
from luthier.data.forest import Tree, pack
from luthier.objectives import Objective
from luthier.train.reference import noted, trained_count, with_reference
from luthier.train.source import Rows
from luthier.train.stepper import Stepper

BLOCK: Final = 64
"""Rows that are computed by themselves, and are on disk when the next ones begin."""
COLUMN: Final = "log_probs.f32"
FACTS: Final = "facts.json"
Write = Callable[[Path, Mapping[str, Any]], None]
"""Puts plain values in a file, durably."""
Read = Callable[[Path], dict[str, Any]]


@final
@dataclass(frozen=True)
class ReferenceCache:
    """What the reference says of the trained tokens of each row: those of row i are `offsets[i]` to `offsets[i + 1]`.

    `seconds` is how long it took to find what was not there yet, `found` how many rows these were.
    """

    log_probs: NDArray[np.float32]
    offsets: NDArray[np.int64]
    found: int = 0
    seconds: float = 0.0

    def on(self, row: int, trees: Sequence[Tree], objective: Objective) -> list[Tree]:
        """The trees of a row with their notes. Raises CorruptError where they are not those that were gone through."""
        said = np.array(self.log_probs[self.offsets[row] : self.offsets[row + 1]], dtype=np.float32)
        counts = [trained_count(tree) if objective.refers(tree) else 0 for tree in trees]
        if sum(counts) != len(said):
            raise CorruptError(
                f"row {row} has {sum(counts)} trained tokens, and the reference was asked about {len(said)}",
                do="start the run anew",
            )
        made, start = [], 0
        for tree, count in zip(trees, counts, strict=True):
            made.append(with_reference(tree, said[start : start + count]) if count else tree)
            start += count
        return made


def remembered(
    folder: Path, stepper: Stepper, rows: Rows, *, facts: Mapping[str, Any], micro_tokens: int, write: Write, read: Read
) -> ReferenceCache:
    """The cache in `folder`, with what is missing of it found now.

    `facts` are what it depends on: of others it is made anew. Raises CorruptError for a column that is damaged.
    """
    began = time.perf_counter()
    offsets = _offsets(stepper.objective, rows)
    column, told = folder / COLUMN, folder / FACTS
    wanted = {**facts, "tokens": int(offsets[-1]), "rows": len(rows)}
    kept = read(told) if told.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    if {key: kept.get(key) for key in wanted} != wanted:
        write(told, wanted)
        kept = wanted
        column.unlink(missing_ok=True)
    held = column.stat().st_size // 4 if column.is_file() else 0
    # What a kill has left of a block is computed again.
    blocks = range(0, len(rows), BLOCK)
    first = next((start for start in blocks if offsets[min(start + BLOCK, len(rows))] > held), len(rows))
    if "digest" in kept and (first < len(rows) or kept["digest"] != _digest(column)):
        raise CorruptError(
            f"{column} is not what the run has written", do=f"remove {folder}: it is made again, to the same bits"
        )
    if first < len(rows) or "digest" not in kept:
        with column.open("r+b" if held else "wb") as file:
            file.truncate(int(offsets[first]) * 4)
            file.seek(0, 2)
            for start in range(first, len(rows), BLOCK):
                stop = min(start + BLOCK, len(rows))
                file.write(_said(stepper, rows, range(start, stop), micro_tokens).tobytes())
                file.flush()
        write(told, {**wanted, "digest": _digest(column)})
    mapped = np.memmap(column, np.float32, "r") if offsets[-1] else np.zeros(0, np.float32)
    return ReferenceCache(mapped, offsets, len(rows) - first, time.perf_counter() - began)


def _offsets(objective: Objective, rows: Rows) -> NDArray[np.int64]:
    counts = [
        sum(trained_count(tree) for tree in objective.trees(rows[index]) if objective.refers(tree))
        for index in range(len(rows))
    ]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _said(stepper: Stepper, rows: Rows, block: range, micro_tokens: int) -> NDArray[np.float32]:
    """What the reference says of the trained tokens of some rows, row after row."""
    objective, said = stepper.objective, []
    trees = [tree for index in block for tree in objective.trees(rows[index]) if objective.refers(tree)]
    for forest in pack(trees, max_tokens=micro_tokens):
        told = noted(
            stepper.model, forest, lambda tree: True, temperature=objective.policy_temperature,
            reference=stepper.batcher.reference,
        )  # fmt: skip
        said.append(told.layout.notes["reference"])
    return np.concatenate(said).astype(np.float32) if said else np.zeros(0, np.float32)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
