"""What a run knows to ask its two models about: rows with their loss, or prompts with what was answered to them.

A fine-tune has held-out rows, or training rows where nothing was held out, and gradients of those it was trained on. A
run that was taught by rewards has prompts, and in its samples what base and policy have answered to some of them: how
likely each finds the other's answers says how far they have come apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.data.forest import Ints, Segment, Tree, pack
from luthier.data.prepare import Prepared
from luthier.model.comparing.pair import Gradients, Text
from luthier.model.language_model import LanguageModel
from luthier.objectives import Objective
from luthier.objectives.sft import SFT
from luthier.recipes.evaluating.evaluate import held_out_of
from luthier.recipes.evaluating.rewards import prompts_of
from luthier.recipes.measuring import mean_loss
from luthier.recipes.opening.opened import Opened
from luthier.recipes.samples import question
from luthier.recipes.schemas.finetune import DEFAULT_STEP_TOKENS, FinetuneRecipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.teacher import reference_of
from luthier.store.runs import RunDirectory
from luthier.train.reference import ITSELF, Reference, noted

MOST_TREES = 400
"""Rows of a text that are asked about at most."""
MICRO_ROWS = 4


@dataclass(frozen=True)
class Known:
    """Texts with their loss, samples to read, and where gradients come from, if from anywhere."""

    texts: tuple[Text, ...] = ()
    samples: tuple[Ints, ...] = ()
    gradients: Gradients | None = None


def known_of_rows(recipe: FinetuneRecipe, opened: Opened, base: LanguageModel | None) -> Known:
    """What a fine-tune knows; `base` is given where it was trained whole. The objective knows its tokenizer."""
    prepared, trees = held_out_of(recipe, classes=opened.model.task.classes or None)
    told = reference_of(recipe, prepared, base=base)
    name = "held-out rows"
    if not trees:
        name, count = "training rows (none was held out)", min(MOST_TREES, len(prepared.train))
        trees = [tree for index in range(count) for tree in recipe.objective.trees(prepared.train[index])]
    text = text_of(name, "task", recipe.objective, trees, told)
    samples = tuple(first_path(tree) for tree in trees[:MOST_TREES])
    return Known((text,), samples, _gradients(opened.model, recipe, prepared, told))


def known_of_prompts(run: RunDirectory, recipe: ReinforceRecipe, opened: Opened) -> Known:
    """What a run knows that was taught by rewards: its prompts, and the answers among its samples."""
    prepared = prompts_of(recipe)
    views = prepared.held_out if len(prepared.held_out) else prepared.train
    prompts = [question(views[index], 0)[0] for index in range(min(MOST_TREES, len(views)))]
    said: dict[str, dict[int, Tree]] = {"base": {}, "tuned": {}}
    for sample in run.samples.read():
        # Of the tuned model's answers the last ones stay.
        for who in said.keys() & sample.keys():
            if sample["index"] < len(prompts):
                tree = _answered(opened, prompts[sample["index"]], str(sample[who]))
                said[who] |= {sample["index"]: tree} if tree is not None else {}
    names = {"base": "the base's answers", "tuned": "the tuned model's answers"}
    texts = [text_of(names[who], "said", SFT(), [*trees.values()]) for who, trees in said.items() if trees]
    return Known(tuple(texts), tuple(prompts))


def _answered(opened: Opened, prompt: Ints, answer: str) -> Tree | None:
    """A prompt with an answer whose tokens are predicted; None for an empty one."""
    tokens, _ = opened.tokenizer.encode(answer)
    weights = np.r_[np.zeros(len(prompt)), np.ones(len(tokens))].astype(np.float32)
    return Tree((Segment(np.concatenate([prompt, tokens]), weights),)) if len(tokens) else None


def text_of(
    name: str, kind: str, objective: Objective, trees: Sequence[Tree], reference: Reference = ITSELF
) -> Text:
    """A text of trees, at most so many of them."""
    chosen = list(trees[:MOST_TREES])
    return Text(name, kind, lambda model: mean_loss(model, objective, chosen, reference=reference)[0])


def first_path(tree: Tree) -> Ints:
    """The tokens of the first text of a tree."""
    return np.concatenate([tree.segments[index].tokens for index in tree.paths()[0]])


def _gradients(
    model: LanguageModel, recipe: FinetuneRecipe, prepared: Prepared, reference: Reference
) -> Gradients | None:
    """Gradients of micro-batches of training rows; None where there are too few rows."""
    count = len(prepared.train)
    if count < 2:
        return None
    rows = MICRO_ROWS if count >= 8 * MICRO_ROWS else 1
    mean = float(np.mean(prepared.train.lengths))
    step = recipe.batch.rows or (recipe.batch.tokens or DEFAULT_STEP_TOKENS) / mean
    objective = recipe.objective

    def each(most: int) -> Iterator[Float[Tensor, " n"]]:
        order = np.random.default_rng(recipe.seed).permutation(count)
        for first in range(0, min(most * rows, count - rows + 1), rows):
            views = [prepared.train[int(index)] for index in order[first : first + rows]]
            trees = [tree for view in views for tree in objective.trees(view)]
            yield _gradient(model, objective, trees, reference) / rows

    return Gradients(each, rows=rows, step_rows=float(step), row_tokens=mean)


def _gradient(
    model: LanguageModel, objective: Objective, trees: Sequence[Tree], reference: Reference
) -> Float[Tensor, " n"]:
    """The gradient of the summed loss over some trees in whatever was trained, laid end to end."""
    own = [each for attachment in model.attachments.values() for each in attachment.named_parameters().values()]
    parameters = own or list(model.module.parameters())
    model.train(False)
    asked = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        for bare in pack(sorted(trees, key=lambda tree: -tree.token_count), max_tokens=4096):
            forest = noted(model, bare, objective.refers, temperature=objective.policy_temperature, reference=reference)
            outputs = model.token_outputs(forest, temperature=objective.policy_temperature)
            objective.loss(outputs, forest).sum.backward()
        return torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten().float()
                          for each in parameters])  # fmt: skip
    finally:
        for parameter, was in zip(parameters, asked, strict=True):
            parameter.grad = None
            parameter.requires_grad_(was)
