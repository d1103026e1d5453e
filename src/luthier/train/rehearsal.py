"""The rehearsal: the largest micro-batch of a run, forward and backward, before its first step.

Idea: where memory will not suffice it shows now and not at step 9,000, and micro-batches are cut smaller from the
beginning. Gradients are thrown away and random generators put back, so a run with a rehearsal is the run without it,
bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.core.units import bytes_text
from luthier.train.random_state import RandomState
from luthier.train.shortage import Split, exhausted, shortage
from luthier.train.source import DataSource, MicroBatch
from luthier.train.stepper import Stepper


@dataclass(frozen=True)
class Rehearsal:
    """What was rehearsed: the tokens and rows of the largest micro-batch, how long it took, how often it was split."""

    tokens: int
    rows: int
    seconds: float
    splits: tuple[Split, ...]


def rehearse(stepper: Stepper, source: DataSource, steps: int) -> Rehearsal:
    """Run the largest micro-batches of a run of `steps` steps once; nothing of it remains but `stepper.micro_tokens`.

    Raises MemoryExhaustedError when even the smallest micro-batch does not fit. A loss that is not finite is left to
    the real step, which names it.
    """
    random, training = RandomState.now(stepper.model.device), stepper.model.module.training
    began = time.perf_counter()
    splits: list[Split] = []
    state = None
    if stepper.in_backward is not None:
        stepper.in_backward.rehearses = True
    try:
        state = _make_room(stepper)
        while found := _split(stepper, batches := source.largest_micro_batches(stepper.micro_tokens, steps), source):
            # Cut smaller, other rows come together: the largest micro-batch is another one now.
            splits += found
    finally:
        del state
        if stepper.in_backward is not None:
            stepper.in_backward.rehearses = False
        stepper.zero_grad()
        stepper.model.train(training)
        random.restore()
    seconds = time.perf_counter() - began
    return Rehearsal(batches[0].tokens, len(batches[0].indices), seconds, tuple(splits))


def rehearse_together(rehearsed: Mapping[str, tuple[Stepper, DataSource, int]]) -> Rehearsal:
    """The largest micro-batches of several learners that share a batcher, cut together, as `rehearse` does for one."""
    steppers = [stepper for stepper, _, _ in rehearsed.values()]
    batcher = steppers[0].batcher
    random, training = RandomState.now(batcher.model.device), batcher.model.module.training
    began = time.perf_counter()
    try:
        rooms = [_make_room(stepper) for stepper in steppers]
        found = batcher.forward_backward({
            name: [tree for batch in source.largest_micro_batches(batcher.micro_tokens, steps)
                   for tree in source.trees_of(batch)]
            for name, (_, source, steps) in rehearsed.items()
        })  # fmt: skip
        del rooms
    finally:
        for stepper in steppers:
            stepper.zero_grad()
        batcher.model.train(training)
        random.restore()
    count = min(batcher.micro_tokens, sum(report.tokens for report in found.values()))
    rows = sum(len(report.row_losses) for report in found.values())
    return Rehearsal(count, rows, time.perf_counter() - began, next(iter(found.values())).splits)


def _split(stepper: Stepper, batches: Sequence[MicroBatch], source: DataSource) -> list[Split]:
    """How micro-batches had to be split to run these; none when they fit."""
    found: list[Split] = []
    for batch in batches:
        found += stepper.forward_backward(source.trees_of(batch)).splits
        if stepper.in_backward is not None:
            # Each is a step of its own there.
            stepper.zero_grad()
    return found


def _make_room(stepper: Stepper) -> Tensor | None:
    """Gradients as if other micro-batches had come before, and something in the place of the optimizer's state.

    Both are filled, since memory that nobody has written to is not taken yet.
    """
    masters = list(stepper.masters.values())
    size = stepper.method.resident_bytes({name: tuple(master.shape) for name, master in stepper.masters.items()})
    try:
        for master in masters if stepper.in_backward is None else ():
            master.grad = torch.zeros_like(master)
        return None if stepper.optimizer.state else torch.ones(size, dtype=torch.uint8, device=masters[0].device)
    except (MemoryError, RuntimeError) as failure:
        reason = shortage(failure)
        if reason is None:
            raise
        what = f"for gradients and the optimizer's state of {bytes_text(size)}: {reason}"
        raise exhausted(None, what, stepper.planned_bytes) from None
