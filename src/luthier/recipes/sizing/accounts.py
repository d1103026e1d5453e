"""What a run says of itself: the plan before it, the facts a checkpoint is tied to, the summary after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from luthier.core.units import bytes_text, count_text, duration_text, signed_text
from luthier.data.forest import Tree
from luthier.data.prepare import Prepared
from luthier.data.tokenizer import Tokenizer
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import base_parameters
from luthier.model.language_model import LanguageModel
from luthier.recipes.schemas.finetune import BudgetKnobs, FinetuneRecipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.sizing import limits, memory
from luthier.store.environment import processor
from luthier.train.source import DataSource
from luthier.train.state import LoopState

DEFAULT_EPOCHS = 3.0
WORST_ROWS = 20
PROVED = ("tensors", "differs_from_start", "eval_loss", "reloaded_loss", "process", "seconds")
_NO_MATTER: Final[Any] = {"run": True, "batch": {"recompute"}, "rollouts": {"engine"}}
LIBRARIES = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def total_steps(budget: BudgetKnobs, source: DataSource) -> int:
    """Optimizer steps of the run: the smaller of what epochs and steps allow."""
    by_epochs = math.inf
    if budget.epochs is not None or budget.steps is None:
        by_epochs = source.steps_in(budget.epochs or DEFAULT_EPOCHS)
    return max(1, int(min(by_epochs, budget.steps or math.inf)))


def rollout_steps(recipe: ReinforceRecipe, prompts: int) -> int:
    """Optimizer steps of a run of rollouts: the smaller of what epochs over the prompts and steps allow."""
    by_epochs = math.inf
    if recipe.budget.epochs is not None or recipe.budget.steps is None:
        rollouts = max(1, round((recipe.budget.epochs or DEFAULT_EPOCHS) * prompts / recipe.rollouts.prompts))
        by_epochs = rollouts * recipe.learner.passes * recipe.learner.minibatches
    return max(1, int(min(by_epochs, recipe.budget.steps or math.inf)))


def plan(
    recipe: FinetuneRecipe,
    data: Prepared,
    model: LanguageModel,
    attachment: Attachment,
    source: DataSource,
    *,
    pooled: bool = False,
) -> dict[str, Any]:
    """What is going to happen, in numbers that are known before the first step.

    `pooled` is whether CPU tensors come from the pool (kernels/pool.py).
    """
    steps = total_steps(recipe.budget, source)
    if isinstance(recipe, ReinforceRecipe):
        steps = rollout_steps(recipe, len(data.train))
    saves = memory.most_saves(recipe, data, steps)
    needed = memory.plan_memory(recipe, model, attachment, source, steps, saves=saves, pooled=pooled)
    written = memory.plan_disk(recipe, data, model, attachment, saves=saves)
    tokens = data.store.token_count
    flow = limits.flow_of(model, source, _trained_share(recipe, data, source))
    speed = limits.plan_speed(
        model,
        attachment,
        flow,
        at_once=recipe.batch.micro_tokens,
        step_tokens=int(data.train.lengths.sum()) // max(1, source.steps_in(1.0)),
        recomputed=needed["recomputed"],
        # What the reference says is looked up where it is kept.
        looks=limits.looks_of(source) - recipe.reference.cache,
    )
    asked = []
    if recipe.reference.cache:
        all_tokens = int(data.train.lengths.sum())
        seconds = all_tokens * limits.look_flops(model, attachment, flow) / speed["flops_per_second"]
        asked = [
            f"reference: asked about {count_text(all_tokens)} tokens before the first step, {duration_text(seconds)} "
            f"at best; at most {bytes_text(4 * data.store.trained_count)} of it are kept in the run directory"
        ]
    base = {id(parameter): parameter for parameter in base_parameters(model.module).values()}.values()
    return {
        "model": recipe.model,
        "adapter": recipe.adapter.as_recipe(),
        "objective": recipe.objective.as_recipe(),
        "task": model.task.name,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in base),
        "trainable_parameters": attachment.parameter_count,
        "memory": needed,
        "disk": written,
        "speed": speed,
        "data": data.counts(),
        "tokens": {"total": tokens, "trained": data.store.trained_count},
        "notices": [
            *model.notices, *data.notices, *asked, *_elsewhere(recipe), *memory.notices(needed, written, speed),
        ],
    }  # fmt: skip


def _elsewhere(recipe: FinetuneRecipe) -> list[str]:
    """Who samples, where it is not this process; then no memory is needed here for the keys and values of rollouts."""
    if not isinstance(recipe, ReinforceRecipe) or not (engine := recipe.rollouts.engine).url:
        return []
    return [f"rollouts are sampled by {engine.dialect} at {engine.url}, held-out prompts are answered here"]


def _trained_share(recipe: FinetuneRecipe, data: Prepared, source: DataSource) -> float:
    """The part of all tokens that the head is asked about; of prompts, that of the answers that stand in for all."""
    if isinstance(recipe, ReinforceRecipe):
        answers = recipe.rollouts.answers * recipe.rollouts.max_new_tokens
        return answers / float(source.lengths.mean())
    return data.store.trained_count / max(1, data.store.token_count)


def facts(recipe: FinetuneRecipe, data: Prepared, model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint depends on. A resumed run whose facts differ would not continue the same run."""
    return {
        # Where a run lies, what is made again instead of kept, and where an engine is, change no bit of it.
        "recipe": recipe.model_dump(mode="json", exclude_none=True, exclude=_NO_MATTER),
        "base": model.digest,
        "tokenizer": tokenizer.digest,
        "data": data.store.folder.name,
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        # What `auto` has chosen: another machine, or a better measurement, may choose otherwise.
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": model.kernels,
        # Another processor may add up in another order, even of the same kind.
        "processor": processor(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def held_out_trees(recipe: FinetuneRecipe, data: Prepared) -> list[Tree]:
    """The trees that evaluations look at."""
    count = min(len(data.held_out), recipe.evaluation.max_rows)
    return [tree for index in range(count) for tree in recipe.objective.trees(data.held_out[index])]


def summary(
    planned: Mapping[str, Any],
    run: Path,
    state: LoopState,
    *,
    status: str,
    proof: Mapping[str, Any],
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """What happened, for people, reports and `--json`."""
    notices = [*more, *_not_better(state)]
    if state.skipped_steps:
        notices.append(
            f"{state.skipped_steps:,} of {state.step:,} steps had a number that was not finite and were not applied; "
            "the bad_step events name the rows"
        )
    speed = state.tokens / state.train_seconds if state.train_seconds else 0.0
    if speed > planned["speed"]["tokens_per_second"]:
        notices.append(
            f"speed: {speed:,.0f} tokens/s are more than this machine is said to allow: its rates were measured while "
            "it was busy (luthier doctor measures them again)"
        )
    return {
        "run": str(run),
        "status": status,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "tokens": {"total": state.tokens, "trained": state.trained_tokens},
        "loss": {
            "first": state.first_loss,
            "last": state.last_loss,
            "eval": proof["eval_loss"],
            "eval_first": state.first_eval_loss,
            "best": state.best_eval_loss,
            "best_step": state.best_step,
        },
        "metrics": {
            name: (before, state.metrics.get("best", {}).get(name, before))
            for name, before in state.metrics.get("first", {}).items()
        },
        "tokens_per_second": speed,
        "share_of_limit": speed / planned["speed"]["tokens_per_second"],
        "train_seconds": state.train_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "model": planned["model"],
        "adapter": planned["adapter"],
        "task": planned["task"],
        "parameters": planned["parameters"],
        "trainable_parameters": planned["trainable_parameters"],
        "data": planned["data"],
        "result": proof["result"],
        "proof": {key: proof[key] for key in PROVED},
        "notices": [*planned["notices"], *notices],
        "lessons": notices,  # those of them that nobody could know before the first step
    }


def _not_better(state: LoopState) -> list[str]:
    """That nothing was won on what was held out, where it is so."""
    first, best = state.first_eval_loss, state.best_eval_loss
    if best is None or first is None or not best >= first:
        return []
    # The held-out loss of rollouts is minus the mean reward.
    what, sign = ("reward", -1) if "reward" in state.metrics.get("first", {}) else ("loss", 1)
    before, after = signed_text(sign * first), signed_text(sign * best)
    return [f"the held-out {what} did not improve ({before} before, {after} best)"]


def worst_rows(
    row_excess: Mapping[int, float], data: Prepared, tokenizer: Tokenizer, *, count: int = WORST_ROWS
) -> list[dict[str, Any]]:
    """The training rows whose loss was furthest above the mean of their step when last seen, with their text."""
    worst = sorted(row_excess.items(), key=lambda item: -item[1])[:count]
    views: dict[int, Sequence[int]] = {}
    wanted = {row for row, _ in worst}
    for index in range(len(data.store)):
        if (row := int(data.store.rows[index])) in wanted:
            views.setdefault(row, [int(token) for token in data.store[index].tokens])
    return [{"row": row, "loss": loss, "text": tokenizer.decode(views.get(row, []))} for row, loss in worst]


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU when there is one, else resident on the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
