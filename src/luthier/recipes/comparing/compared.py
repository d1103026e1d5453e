"""One method of a comparison, in a process of its own: train it or not, measure it, say what came out.

Without a metric quality is exp(-loss): the geometric mean of the probabilities that the trained tokens of the held-out
rows get. It is between 0 and 1, needs no sampling, and every method has it, in-context learning too. With a metric it
is what that says of the answers generated for the held-out prompts.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.child import bound_to_parent
from luthier.core.errors import LuthierError, RecipeError
from luthier.core.events import plain
from luthier.core.knobs import validate
from luthier.data.conversation import Row, Text
from luthier.data.forest import Segment, Tree
from luthier.data.prepare import Prepared
from luthier.model.files.sources import SEEDLING
from luthier.model.language_model import LanguageModel
from luthier.objectives.language_model import LanguageModelling
from luthier.recipes.comparing.answers import answered, questions, trained_prompts, write_answers
from luthier.recipes.comparing.compare import Job, Measures
from luthier.recipes.comparing.rates import tried
from luthier.recipes.demo import forgotten
from luthier.recipes.evaluating.evaluate import held_out_of
from luthier.recipes.finetune import start
from luthier.recipes.measuring import mean_loss
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.opening.quantized import load_base
from luthier.recipes.progress import progress
from luthier.recipes.samples import question
from luthier.recipes.schemas.files import load_recipe
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.presets import IN_CONTEXT
from luthier.recipes.sizing.accounts import peak_memory_bytes
from luthier.recipes.teacher import reference_of
from luthier.store.comparison import ANSWERS

ACCURACY = "accuracy"
"""What an objective that chooses tells of itself: quality, where no metric of generated answers is asked for."""
BATCH = 16
"""Held-out rows that share one pass over the examples."""
_DRAW = 0x1C1
KEPT_PIECE = 2000
"""Characters of a kept text that are one row."""


def measured(job: Job) -> dict[str, Any]:
    """What a method is: quality, what it trained, what it takes."""
    recipe = load_recipe(Path(job.recipe), overrides=job.sets).recipe
    measures = validate(Measures, job.measures)
    answers = Path(job.run).with_suffix(ANSWERS)
    if job.method == IN_CONTEXT:
        return in_context(recipe, measures, answers)
    with progress() as recorder:
        if job.trial:
            return tried(recipe, recorder=recorder)
        result = start(recipe, recorder=recorder)
    summary = result.summary
    plan = json.loads((result.path / "plan.json").read_text("utf-8"))
    folder = Path(summary["result"])
    loss = summary["loss"]["eval"]
    if loss is None:
        raise RecipeError(
            f"nothing of {recipe.data.train} is held out", do="set evaluation.fraction above 0, or data.evaluation"
        )
    prepared, trees = held_out_of(recipe)
    found = {
        "quality": math.exp(-loss),
        "loss": loss,
        "loss_before": summary["loss"]["eval_first"],
        "trained_parameters": summary["trainable_parameters"],
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "seconds": summary["train_seconds"],
        "forgetting": forgetting(recipe, result.path, measures.keep),
        "training_flops": plan["speed"]["flops_per_token"] * summary["tokens"]["total"],
        "query_flops": 2.0 * summary["parameters"] * _mean_tokens(trees),
        "held_out_rows": len(prepared.held_out),
        "learning_rate": recipe.optimizer.peak_learning_rate,
        "run": str(result.path),
    }
    if measures.metric is not None:
        found |= judged(open_named(str(result.path)).model, recipe, prepared, measures, path=answers)
    elif own := summary["metrics"].get(ACCURACY):
        found |= {"quality": own[1], "judged_by": ACCURACY}
    return found


def in_context(recipe: FinetuneRecipe, measures: Measures, answers: Path) -> dict[str, Any]:
    """The base model with training rows before each held-out one; for the loss they are computed once for many."""
    prepared, trees = held_out_of(recipe)
    model = load_base(
        recipe.model, precision=recipe.precision, device=recipe.device, seed=recipe.seed, own_modules=True
    )
    root = shots(prepared, trees, measures.examples, room=model.context_tokens, seed=recipe.seed)
    together = behind(root, trees)
    size, reference = recipe.batch.micro_tokens, reference_of(recipe, prepared)
    loss, _ = mean_loss(model, recipe.objective, together, micro_tokens=size, reference=reference)
    alone, _ = mean_loss(model, recipe.objective, trees, micro_tokens=size, reference=reference)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    found = {
        "quality": math.exp(-loss),
        "loss": loss,
        "loss_before": alone,
        "trained_parameters": 0,
        "file_bytes": 0,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": 0.0,
        "forgetting": 0.0,
        "training_flops": 0.0,
        "query_flops": 2.0 * parameters * (_mean_tokens(trees) + len(root)),
        "held_out_rows": len(prepared.held_out),
        "examples": measures.examples,
        "example_tokens": len(root),
    }
    if measures.metric is not None:
        found |= judged(model, recipe, prepared, measures, path=answers, before=root)
    return found


def judged(
    model: LanguageModel,
    recipe: FinetuneRecipe,
    prepared: Prepared,
    measures: Measures,
    *,
    path: Path,
    before: np.ndarray | None = None,
) -> dict[str, Any]:
    """What a metric says of the answers to the held-out prompts, which are written to `path`."""
    if measures.metric is None:
        return {}
    room = measures.max_new_tokens
    asked = questions(prepared, measures.questions, seed=recipe.seed, max_new_tokens=room)
    answers = answered(model, prepared, asked, max_new_tokens=room, before=before)
    write_answers(path, prepared, asked, answers)
    references = [one.references for one in asked]
    return {
        "quality": measures.metric.of(answers, references),
        "questions": len(asked),
        "references": sum(map(len, references)),
        "trained_prompts": trained_prompts(prepared, asked, max_new_tokens=room),
    }


def shots(prepared: Prepared, trees: Sequence[Tree], examples: int, *, room: int | None, seed: int) -> np.ndarray:
    """The tokens of training rows with different prompts, drawn by `seed`, end to end.

    Raises RecipeError when they and a row exceed the context.
    """
    rows: list[np.ndarray] = []
    seen: set[bytes] = set()
    for index in np.random.default_rng([seed, _DRAW]).permutation(len(prepared.train)).tolist():
        if len(rows) == examples:
            break
        view = prepared.train[index]
        prompt = question(view, 1)[0].tobytes()
        if prompt not in seen:
            seen.add(prompt)
            rows.append(view.tokens)
    joined = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    longest = max((tree.token_count for tree in trees), default=0)
    if room is not None and len(joined) + longest > room:
        raise RecipeError(
            f"{len(rows)} examples have {len(joined)} tokens and the longest row {longest}",
            allowed=f"the model's {room} positions for both",
            do="lower --examples",
        )
    return joined


def behind(root: np.ndarray, trees: Sequence[Tree]) -> list[Tree]:
    """Rows as branches of one tree whose root they all see; each keeps its own weights but that of its first token."""
    if not len(root):
        return list(trees)
    made = []
    for batch in [trees[first : first + BATCH] for first in range(0, len(trees), BATCH)]:
        segments = [Segment(root, np.zeros(len(root), np.float32))]
        for tree in batch:
            shift = len(segments)
            for segment in tree.segments:
                first = segment.parent < 0
                weights = np.append(0 * segment.weights[:1], segment.weights[1:]) if first else segment.weights
                segments.append(Segment(segment.tokens, weights, 0 if first else segment.parent + shift))
        made.append(Tree(tuple(segments), row=batch[0].row))
    return made


def forgetting(recipe: FinetuneRecipe, run: Path, keep: str) -> float | None:
    """How much the loss on other text has risen: that of a kept file, or the seedling's own kind; None without any."""
    if not keep and recipe.model != SEEDLING:
        return None
    opened = open_named(str(run))
    after = _kept_loss(opened, keep)
    if recipe.adapter.provides >= {"trains-base"}:
        return after - _kept_loss(open_named(recipe.model), keep)
    with opened.model.without_attachments():
        return after - _kept_loss(opened, keep)


def _kept_loss(opened: Opened, keep: str) -> float:
    if not keep:
        return forgotten(opened)
    return mean_loss(opened.model, LanguageModelling(), kept_trees(opened, keep))[0]


def kept_trees(opened: Opened, keep: str) -> list[Tree]:
    """The text of a file in pieces, every token of which is predicted."""
    objective, text = LanguageModelling(), Path(keep).read_text("utf-8")
    pieces = [text[at : at + KEPT_PIECE] for at in range(0, len(text), KEPT_PIECE)]
    rows = [Row(number, f"{keep} piece {number}", Text(piece)) for number, piece in enumerate(pieces) if piece.strip()]
    return [tree for row in rows for view in opened.renderer.render(row) for tree in objective.trees(view)]


def _mean_tokens(trees: Sequence[Tree]) -> float:
    return sum(tree.token_count for tree in trees) / len(trees) if trees else 0.0


def main() -> None:
    """The child: one line of JSON on standard output, whatever libraries print there meanwhile."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    bound_to_parent(watch=io.FileIO(sys.stdin.fileno(), closefd=False))
    values = json.loads(sys.argv[1])
    job = Job(**{**values, "sets": tuple(values["sets"])})
    try:
        line, code = measured(job), 0
    except LuthierError as error:
        line, code = {"error": str(error)}, error.exit_code
    with answer:
        answer.write(json.dumps(plain(line)) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
