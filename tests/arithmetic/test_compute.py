"""The arithmetic of work against the products that torch counts, and against limits worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from luthier.adapters.full import Full
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.arithmetic.compute import (
    Attention,
    Linear,
    bytes_per_token,
    flops_per_token,
    forward_flops,
    limit,
    mean_context,
)
from luthier.data.forest import Forest, Segment, Tree, row_tree
from luthier.model.editing.edits import Edit
from luthier.model.editing.sites import Sites
from luthier.model.tasks import Task
from luthier.recipes.sizing.limits import flow_through
from luthier.recipes.sizing.products import Flow, Stream, work
from luthier.recipes.sizing.zoo_memory import load_of
from tests import forests, task_models
from tests.task_models import ANSWERS, MASKED, TEXTS, WORDS

ADAPTERS: dict[str, Callable[[Sites], list[Edit]]] = {
    "lora": LoRA(rank=3).attach,
    "lora on some": LoRA(rank=3, targets=("v", "down")).attach,
    "lora on the last block": LoRA(rank=3, targets=r".*\.1\.mlp\.(down|c)_proj").attach,
    "full": Full().attach,
    "ia3": IA3().attach,
    "prefix": PrefixTuning(prefix_tokens=2).attach,
}
LENGTH, PREDICTED = 16, 6


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_products_are_those_that_torch_counts(architecture: str, name: str) -> None:
    """Breaks when a product is counted that is never made, or one is made that nobody counted."""
    model = forests.language_model(architecture, fused=False)
    attachment = model.attach(ADAPTERS[name](model.sites))
    weights = np.zeros(LENGTH, np.float32)
    weights[-PREDICTED:] = 1
    rng = np.random.default_rng(0)
    forest = Forest(tuple(row_tree(forests.tokens(rng, LENGTH), weights, row=row) for row in range(3)))
    with FlopCounterMode(display=False) as counter:
        model.token_outputs(forest).log_probs.sum().backward()
    linears, _ = work(model, attachment, Flow(texts=Stream(), predicted=PREDICTED / LENGTH))
    assert flops_per_token(linears, []) == pytest.approx(counter.get_total_flops() / (3 * LENGTH), rel=2e-3)


TASKS = [("bert", TEXTS), ("bert", WORDS), ("bert", MASKED), ("roberta", MASKED), ("electra", TEXTS),
         ("albert", MASKED), ("distilbert", TEXTS), ("modernbert", MASKED), ("llama", TEXTS), ("t5", ANSWERS),
         ("t5-gated", ANSWERS)]  # fmt: skip
ON_TASKS: dict[str, Callable[[Sites], list[Edit]]] = {
    **{name: ADAPTERS[name] for name in ("lora", "lora on some", "full", "ia3", "prefix")},
    "prompt": PromptTuning(prompt_tokens=3).attach,
}


@pytest.mark.parametrize("name", ON_TASKS)
@pytest.mark.parametrize(("architecture", "task"), TASKS, ids=[f"{kind}-{task.name}" for kind, task in TASKS])
def test_products_of_other_tasks_are_those_that_torch_counts(architecture: str, task: Task, name: str) -> None:
    """Breaks when attention both ways counts as half, answers as texts, or a head as if all tokens were predicted."""
    model = task_models.language_model(architecture, task, fused=False)
    attachment = model.attach(ON_TASKS[name](model.sites))
    # So few that a trained head makes no logits twice.
    forest = Forest(tuple(task_models.trees(task, both_ways=architecture != "llama", count=3)))
    # Only products are counted, and this way of attention is two of them forward and four backward.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.token_outputs(forest).log_probs.sum().backward()
    flow, load = flow_through(model, forest), load_of(model, forest)
    # It makes all pairs, those that a mask hides too.
    whole = replace(
        flow,
        texts=replace(flow.texts, context=load.texts.pairs / load.texts.tokens),
        answers=replace(flow.answers, context=load.answers.pairs / max(1, load.answers.tokens)),
    )
    linears, attentions = work(model, attachment, whole)
    said = flops_per_token(linears, []) + sum(each.forward() * (1 + 2 * each.below) for each in attentions)
    assert said == pytest.approx(counter.get_total_flops() / forest.token_count, rel=0.03)


def test_tokens_of_answers_see_what_comes_before_them() -> None:
    """Breaks when a decoder's context is that of an encoder."""
    model = task_models.language_model("t5", ANSWERS)
    read = Segment(np.arange(3, 9, dtype=np.int32), np.zeros(6, np.float32), both_ways=True)
    said = Segment(np.array([0, 4, 5, 6], np.int32), np.array([0, 1, 1, 1], np.float32), 0)
    flow = flow_through(model, Forest((Tree((read, said)),)))
    assert flow.texts == Stream(share=0.6, context=6)
    assert flow.answers == Stream(share=0.4, context=2.5, reads=6) and flow.predicted == 0.3


def test_a_frozen_base_costs_four_and_a_trained_one_six() -> None:
    """Breaks when a factor is lost."""
    assert Linear(inputs=10, outputs=20).flops() == 4 * 200
    assert Linear(inputs=10, outputs=20, trained=True).flops() == 6 * 200
    assert Linear(inputs=10, outputs=20, below=False).flops() == 2 * 200
    assert Linear(inputs=10, outputs=20, share=0.5).flops() == 2 * 200
    assert Linear(inputs=10, outputs=20, rank=2).flops() - 4 * 200 == 6 * 2 * 30
    assert Attention(width=8, context=5).flops() == 3.5 * 4 * 40
    assert Attention(width=8, context=5, below=False).flops() == 4 * 40


def test_recomputing_costs_a_forward_pass_of_what_is_recomputed() -> None:
    """Breaks when the price of a recomputed block leaves out its adapters or its attention."""
    linears = [Linear(inputs=10, outputs=20, rank=2), Linear(inputs=10, outputs=20, share=0.5)]
    assert forward_flops(linears, [Attention(width=8, context=5)]) == 2 * (200 + 2 * 30) + 200 + 4 * 40
    below = [replace(layer, below=False) for layer in linears]
    assert forward_flops(below, []) == flops_per_token([replace(layer, rank=0) for layer in below], []) + 2 * 2 * 30


def test_the_limit_is_the_slower_of_products_and_memory() -> None:
    """Breaks when a small step, which reads all weights for a few tokens, is promised the speed of a large one."""
    assert limit(100, 1, flops_per_second=1000, bytes_per_second=1000) == 10
    assert limit(100, 1000, flops_per_second=1000, bytes_per_second=1000) == 1
    layer = Linear(inputs=10, outputs=20)
    assert bytes_per_token([layer], number=2, at_once=8, parameters=0, step_tokens=8) == 2 * 2 * 200 / 8
    assert bytes_per_token([], number=2, at_once=8, parameters=10, step_tokens=4) == 32 * 10 / 4
    assert mean_context([1, 3]) == (1 + 1 + 2 + 3) / 4 and mean_context([]) == 0
