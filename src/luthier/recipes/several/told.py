"""What a run of several adapters tells of all of them together: its plan, each step, its summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from luthier.core.events import Event, Recorder
from luthier.core.units import bytes_text
from luthier.data.forest import Tree
from luthier.recipes.schemas.several import SeveralRecipe
from luthier.recipes.sizing.accounts import peak_memory_bytes
from luthier.train.batcher import Batcher
from luthier.train.pass_report import PassReport, add_up

if TYPE_CHECKING:
    from luthier.recipes.finetune import Work

_FOR_ALL = ("start", "step", "finish")
_EACH = ("trained", "gradients", "optimizer")
"""Parts of memory of which every adapter needs its own, with a copy to save it from, since others train on when one
ends; all others are needed once."""


@final
class Relay:
    """Hands on what happens to one adapter, with its name; plans, steps and summaries are told of all at once."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def record(self, event: Event) -> None:
        """Hand on an event."""
        if event.kind not in _FOR_ALL:
            self._recorder.record(Event(event.kind, {**event.values, "adapter": self._name}, step=event.step))


def plan_of(recipe: SeveralRecipe, works: Mapping[str, Work]) -> dict[str, Any]:
    """What is going to happen: of each adapter its own plan, and their sums."""
    plans = {name: work.bench.plan for name, work in works.items()}
    first = next(iter(plans.values()))
    notices = dict.fromkeys(
        f"{name}: {notice}" for name, work in works.items()
        for notice in (*plans[name]["notices"], *work.run.checkpoints.notices)
    )  # fmt: skip
    memory = memory_of(plans)
    if memory["total"] > memory["available"]:
        told = f"{bytes_text(memory['total'])} are needed for all adapters, {bytes_text(memory['available'])} are free"
        notices[f"memory: {told}"] = None
    return {
        "model": first["model"],
        "adapter": {"method": ", ".join(f"{name} ({each['adapter']['method']})" for name, each in plans.items())},
        "steps": max(plan["steps"] for plan in plans.values()),
        "resumed_at": max(work.state.step for work in works.values()),
        "parameters": first["parameters"],
        "trainable_parameters": sum(plan["trainable_parameters"] for plan in plans.values()),
        "memory": memory,
        "data": {
            key: sum(plan["data"][key] for plan in plans.values()) for key in ("train_views", "held_out_views")
        },
        "tokens": {key: sum(plan["tokens"][key] for plan in plans.values()) for key in ("total", "trained")},
        "adapters": plans,
        "notices": list(notices),
    }


def memory_of(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes that all adapters need together: the base and the largest pass once, what is trained for each."""
    memories = [plan["memory"] for plan in plans.values()]
    shared = max(memory["total"] - memory["saving"] - sum(memory[part] for part in _EACH) for memory in memories)
    own = sum(memory[part] for memory in memories for part in (*_EACH, "copy"))
    return {"total": shared + own, "available": min(memory["available"] for memory in memories)}


def step_of(
    batcher: Batcher, trees: Mapping[str, Sequence[Tree]], step: int
) -> tuple[dict[str, PassReport], Event]:
    """Make one pass for all, and what is to be told of it: the loss over everybody's tokens, and each one's own."""
    began = time.perf_counter()
    passes = batcher.forward_backward(trees)
    whole = add_up([*passes.values()])
    values = {
        "loss": whole.loss,
        "losses": {name: report.loss for name, report in passes.items()},
        "tokens": whole.tokens,
        "trained_tokens": whole.trained_tokens,
        "seconds": time.perf_counter() - began,
    }
    return passes, Event("step", values, step=step)


def summary_of(
    folder: Path, recipe: SeveralRecipe, summaries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What happened, for people and for `--json`: the sums, and the whole summary of each adapter."""
    total = sum(each["tokens"]["total"] for each in summaries.values())
    # All of them were trained in the same seconds.
    seconds = max(each["train_seconds"] for each in summaries.values())
    return {
        "run": str(folder),
        "status": "finished",
        "steps": max(each["steps"] for each in summaries.values()),
        "tokens": {"total": total, "trained": sum(each["tokens"]["trained"] for each in summaries.values())},
        "tokens_per_second": total / seconds if seconds else 0.0,
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "model": recipe.first.model,
        "adapters": {name: dict(summaries[name]) for name in recipe.adapters},
        **{
            kind: [f"{name}: {notice}" for name in recipe.adapters for notice in summaries[name][kind]]
            for kind in ("notices", "lessons")
        },
    }
