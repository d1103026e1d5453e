"""The parity of a merge: what the written folder computes, held against the parents merged once more.

Idea: the source of a merge is no model that anybody has. So it is made again from the parents, without the workers, the
queue and the writer of the stream, and in one piece where memory has room for copies; the result is read back by
the library that everybody else reads it with. Both go through the zoo's own forward, a few rows at a time, with the
same prompts; every tensor is sketched on the way. Products are in float32, so that what is seen is the rounding of the
files and nothing else.
Cost: two more reads of each parent and one of the result; the products of a forward for each prompt, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from safetensors import safe_open

from luthier.core.errors import CorruptError, GateError, LuthierError
from luthier.data.prepare import Reading
from luthier.data.rendering.renderer import Renderer
from luthier.kernels.blas_threads import one_blas_thread
from luthier.kernels.floats import FLOAT32, DType, is_real
from luthier.kernels.vectors import vectors_for
from luthier.kernels.wanted import wanted_kernels
from luthier.merge.folder import GENERATION
from luthier.merge.parents import TOKENIZER, Parent
from luthier.merge.plan import Plan
from luthier.merge.source import Source, copied
from luthier.merge.stream import Room
from luthier.merge.vocabulary import United
from luthier.model.comparing.parity import ParityReport, Questions, Side, compare, hear
from luthier.model.comparing.parity_sides import StreamedSide, folder_texts
from luthier.model.comparing.streamed import NO_MODEL, RowSource, StreamedModel
from luthier.model.comparing.tolerances import Tolerance, tolerance_for
from luthier.model.files.array_files import DTYPES
from luthier.model.files.array_views import array_of, tensor_type
from luthier.model.files.generation_files import read_stop_ids
from luthier.model.files.shards import Slot
from luthier.model.load import config_of

ANEW: Final = "the parents, merged anew"
_PIECE: Final = 1 << 22
"""Numbers of a block that is read back."""
_SHARE: Final = 8
"""Of the memory one part in so many may be logits that are kept."""
_FOLDER: Final = "the merged folder"
_REPORT: Final = "report this: it should not happen"
Texts = tuple[Renderer | None, frozenset[int] | None]
"""What renders rows, and where answers end; nothing for files that no tokenizer can be made of."""


@final
@dataclass(frozen=True, kw_only=True)
class Merge:
    """What was merged; `room` is what comparing may hold, `stacked` says that layers come from slices."""

    parents: Sequence[Parent]
    plan: Plan
    united: United
    dtype: DType
    room: Room
    stacked: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was measured, or `why_not` for logits that could not be; `cost` is that of a cut that was asked for."""

    report: ParityReport
    why_not: str = ""
    cost: ParityReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values; nothing has passed where nothing was compared."""
        told = {"not_compared": self.why_not} if self.why_not else {"numbers": self.report.numbers()}
        return {**self.report.as_dict(), "passed": None if self.why_not else self.report.passed, **told}


def parity(
    merge: Merge, place: Path, questions: Questions, *, noticed: Callable[[str], None] = lambda _line: None
) -> Parity:
    """What was measured of the folder `place`. Raises GateError where it is not the merge of its parents.

    Parents that are no causal language models of the zoo are asked for no logits, and it says why; `noticed` hears why
    no rows could be rendered.
    """
    renderer, stop_ids = _texts_of(merge.parents[0], noticed)
    their_renderer, their_stop_ids = _texts_in(place, needed=renderer is not None)
    model, why_not = _anew(merge, place)
    asked = replace(questions, prompts=()) if why_not else _cut(questions, merge)
    if renderer is not None and their_renderer is not None and not renderer.template.source:
        # Without a template of its own the first parent has no word on how rows are rendered by another's.
        asked = replace(asked, rows=() if their_renderer.template.source else asked.rows)
    said = StreamedSide(ANEW, model, asked.prompts, renderer=renderer, stop_ids=stop_ids)
    found = None if why_not else _read_back(place)
    artefact = StreamedSide(_FOLDER, found, asked.prompts, renderer=their_renderer, stop_ids=their_stop_ids)
    report = side_by_side(said, artefact, asked, tolerance_for(tensor_type(merge.dtype)))
    wider = merge.dtype != FLOAT32
    report.require(instead="write it in a wider type: --set dtype=float32" if wider else "merge it again")
    return Parity(report=report, why_not=why_not)


def side_by_side(said: Side, artefact: Side, questions: Questions, tolerance: Tolerance) -> ParityReport:
    """What was found of two sides, each of which is one thread's work; they remember what they have answered."""
    with _one_thread_each(), ThreadPoolExecutor(1, "artefact") as beside:
        answers = beside.submit(hear, artefact, questions)
        heard = hear(said, questions)
        answers.result()
        return compare(heard, artefact, tolerance)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Each side has a thread; more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_blas_thread():
            yield
    finally:
        torch.set_num_threads(before)


@final
class Anew(RowSource):
    """The tensors of a merge, computed from the parents when they are asked for."""

    def __init__(self, merge: Merge) -> None:
        self.merge, self.slots = merge, merge.plan.slots
        self._vectors = vectors_for(wanted_kernels())
        self._jobs = {job.name: job for job in merge.plan.jobs}

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """In one piece, or in blocks where memory has no room for one."""
        job, room, parents = self._jobs[name], self.merge.room, self.merge.parents
        slot, count = job.slot, len(job.origins)
        if job.copied:
            yield copied(parents, job)
            return
        source = Source(parents, job, self._vectors)
        # What makes no copies is as fast in blocks, and the heap stays in one piece.
        whole = not source.lean and room.holds(count, slot.rows * slot.columns)
        height = max(1, slot.rows) if whole else room.block(count, slot.columns, lean=source.lean)
        firsts = range(0, max(1, slot.rows), height)
        seen = source.looks(firsts, height, lambda work: (each() for each in work))
        for first in firsts:
            yield source.merged(first, height, seen)


@final
class Written(RowSource):
    """The tensors of a folder as the safetensors library reads them."""

    def __init__(self, folder: Path) -> None:
        self.slots: dict[str, Slot] = {}
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    piece = file.get_slice(name)
                    self.slots[name] = Slot(DTYPES[piece.get_dtype()], tuple(piece.get_shape()))
                    self._files[name] = path

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A few rows, for which the file is opened and closed: what it maps does not stay in memory."""
        slot = self.slots[name]
        if len(slot.shape) < 2:
            yield self._read(name, None)
            return
        step = max(1, _PIECE // max(1, slot.rows * slot.columns // slot.shape[0]))
        for first in range(0, slot.shape[0], step):
            yield self._read(name, slice(first, first + step))

    def _read(self, name: str, part: slice | None) -> np.ndarray:
        slot = self.slots[name]
        with safe_open(self._files[name], "pt") as file:
            found: torch.Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
            found = found.reshape(-1, slot.columns)
            return array_of(found.float() if is_real(slot.dtype) else found.clone())


def _anew(merge: Merge, place: Path) -> tuple[StreamedModel | None, str]:
    """The merge of the parents as a model, or why the zoo has none."""
    # What a stack of layers or another vocabulary changes in a config stands in the new one alone.
    new = merge.stacked or bool(merge.united.count)
    try:
        config = config_of(str(place) if new else merge.parents[0].files.source)
        return StreamedModel(config, Anew(merge), merge.parents[0].name), ""
    except NO_MODEL as failure:
        if new and isinstance(failure, CorruptError):
            raise _not_whole(failure) from failure
        return None, failure.received


def _read_back(place: Path) -> StreamedModel:
    try:
        return StreamedModel(config_of(str(place)), Written(place), str(place))
    except NO_MODEL as failure:
        raise _not_whole(failure) from failure


def _not_whole(failure: LuthierError) -> GateError:
    return GateError(f"what was written is no whole model: {failure.received}; nothing was kept",
                     allowed=failure.allowed, do=_REPORT)  # fmt: skip


def _cut(questions: Questions, merge: Merge) -> Questions:
    """As many tokens as logits may be kept of; one at least."""
    rows = max((job.slot.rows for job in merge.plan.jobs), default=1)
    left, prompts = max(1, merge.room.memory_bytes // _SHARE // (4 * rows)), []
    for prompt in questions.prompts:
        if left and len(prompt):
            prompts.append(prompt[:left])
            left -= len(prompts[-1])
    return replace(questions, prompts=tuple(prompts))


def _texts_of(parent: Parent, noticed: Callable[[str], None]) -> Texts:
    """What a parent speaks with. A tokenizer or a template that we do not read compares no rows."""
    path, named = parent.texts.find(TOKENIZER), parent.find(GENERATION)
    if path is None:
        return None, None
    try:
        renderer, stop_ids = folder_texts(path.parent, Reading())
    except LuthierError as failure:
        noticed(f"no rows were rendered with the texts of {parent.name} ({failure.received:.200})")
        return None, None
    return renderer, stop_ids if named is None else stop_ids | read_stop_ids(named.parent)


def _texts_in(place: Path, *, needed: bool) -> Texts:
    if not needed:
        return None, None
    try:
        return folder_texts(place, Reading())
    except LuthierError as failure:
        raise _not_whole(failure) from failure
