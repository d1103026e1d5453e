"""DPO: where it begins, what it converges to, and that shared prompts and micro-batches change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.core.chosen import choose
from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.language_model import LanguageModel
from luthier.model.running.outputs import TokenOutputs
from luthier.objectives import Objective
from luthier.objectives.dpo import DPO
from luthier.optimizers.adamw import AdamW
from luthier.train.stepper import Stepper
from tests import forests, task_models


def ranked(count: int, scores: tuple[float, ...] = (), row: int = 0) -> Rendered:
    rng = np.random.default_rng(row + 10 * count)
    return task_models.answered(forests.views(row + 1, seed=3)[row], rng, answers=count, scores=scores)


def stepper(method: DPO, *, shaken: bool = False, micro_tokens: int = 4096) -> Stepper:
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach(LoRA().attach(model.sites))
    if shaken:
        forests.shake(attachment.named_parameters().values(), seed=1)
    return Stepper(model, attachment, method, AdamW(), micro_tokens=micro_tokens, max_grad_norm=None)


@pytest.mark.parametrize(("shape", "expected"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_before_the_first_step_the_loss_is_that_of_a_coin(shape: str, expected: float) -> None:
    """Breaks when the reference is another model than the one that begins, or has dropout."""
    method = DPO(shape=shape)  # type: ignore[arg-type]
    trees = [tree for row in range(4) for tree in method.trees(ranked(2 + row % 3, row=row))]
    report = stepper(method).evaluate(trees)
    assert report.loss == pytest.approx(expected, rel=1e-5)
    assert report.weight == pytest.approx(4.0)
    accuracy, weight = report.metrics["accuracy"]
    assert accuracy / weight == pytest.approx(0.5)


def test_the_tokens_of_the_prompt_are_not_in_the_loss() -> None:
    """Breaks when prompt tokens carry weight, or an answer's first token does not."""
    (tree,) = DPO().trees(ranked(2))
    assert not tree.segments[0].weights.any()
    assert all(leaf.weighted.all() and leaf.parent == 0 for leaf in tree.segments[1:])
    with pytest.raises(DataError, match="no answers to compare"):
        DPO().trees(forests.views(1)[0])


@pytest.mark.parametrize("kind", ["dpo", "sft", "ranking"])
def test_a_shared_prompt_gives_the_gradients_of_rows_of_their_own(kind: str) -> None:
    """Breaks when an answer sees the other one, or a prompt's gradient is that of one answer only."""
    method = DPO(beta=0.5, sft=0.3 if kind == "sft" else 0.0)
    views = [ranked(4 if kind == "ranking" else 2, row=row) for row in range(3)]
    trees = [tree for view in views for tree in method.trees(view)]
    shared = stepper(method, shaken=True)
    found = shared.forward_backward(trees)
    apart = stepper(method, shaken=True)
    loss = brute(apart.model, trees, method)
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss_sum == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in shared.parameters.items():
        expected = apart.parameters[name].grad
        assert parameter.grad is not None and expected is not None
        assert forests.relative_error(parameter.grad, expected) < 1e-5, name


def brute(model: LanguageModel, trees: list[Tree], method: DPO) -> torch.Tensor:
    """The loss by the paper: each answer a row of its own through the model, each pair by itself."""
    total = torch.zeros(())
    for tree in trees:
        policy = [of_answer(model, tree, place) for place in range(1, len(tree.segments))]
        with torch.no_grad(), model.without_attachments():
            reference = [of_answer(model, tree, place) for place in range(1, len(tree.segments))]
        ratios = [one.sum() - two.sum() for one, two in zip(policy, reference, strict=True)]
        pairs = [(i, j) for i in range(len(ratios)) for j in range(i + 1, len(ratios))]
        for i, j in pairs:
            total = total - torch.nn.functional.logsigmoid(method.beta * (ratios[i] - ratios[j])) / len(pairs)
        total = total - method.sft * policy[0].mean()
    return total


def of_answer(model: LanguageModel, tree: Tree, place: int) -> torch.Tensor:
    prompt, leaf = tree.segments[0], tree.segments[place]
    weights = np.concatenate([prompt.weights, leaf.weights])
    whole = Tree((Segment(np.concatenate([prompt.tokens, leaf.tokens]), weights),))
    return model.token_outputs(Forest((whole,))).log_probs


def test_micro_batches_change_no_gradient() -> None:
    """Breaks when a pair is weighed by what shares its micro-batch."""
    method = DPO()
    trees = [tree for row in range(4) for tree in method.trees(ranked(2 + row % 2, row=row))]
    one, many = stepper(method, shaken=True), stepper(method, shaken=True, micro_tokens=1)
    first, second = one.forward_backward(trees), many.forward_backward(trees)
    assert first.loss == pytest.approx(second.loss, rel=1e-6) and len(many.micro_batches(trees)) == 4
    for name, parameter in one.parameters.items():
        other = many.parameters[name].grad
        assert parameter.grad is not None and other is not None
        assert forests.relative_error(other, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_on_a_bandit_it_converges_to_the_reference_times_exp_of_reward(beta: float) -> None:
    """Breaks when beta, the reference or the order enters otherwise than in the closed form of the paper."""
    reward = torch.tensor([1.0, 0.2, -0.7])
    reference = torch.log_softmax(torch.tensor([0.3, -0.5, 0.9]), 0)
    method = DPO(beta=beta, scores="probability")
    pairs = [(0, 1), (0, 2), (1, 2)]
    # Infinitely many comparisons: each pair of arms with the probability of its order.
    trees = tuple(
        Tree((Segment(np.array([0], np.int32), np.zeros(1, np.float32)),
              *(arm(index, float(reward[index]), float(reference[index])) for index in pair)))
        for pair in pairs
    )  # fmt: skip
    forest = Forest(trees)
    layout = forest.layout
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1.0, max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        said = torch.log_softmax(logits, 0)[torch.from_numpy(layout.labels).long()]
        notes = {name: torch.from_numpy(values) for name, values in layout.notes.items()}
        parts = (layout.labels, layout.weights, layout.rows, layout.trees)
        given = TokenOutputs(said, *map(torch.from_numpy, parts), notes=notes)  # type: ignore[arg-type]
        loss = method.loss(given, forest).sum
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    expected = torch.softmax(reference + reward / beta, 0)
    assert float((torch.softmax(logits.detach(), 0) - expected).abs().sum()) / 2 < 1e-3


def arm(index: int, reward: float, reference: float) -> Segment:
    notes = {"reference": np.array([reference], np.float32), "return": np.array([reward], np.float32)}
    return Segment(np.array([index], np.int32), np.full(1, 0.5, np.float32), 0, notes=notes)  # type: ignore[arg-type]


def test_scores_are_a_margin_or_a_probability_or_nothing() -> None:
    """Breaks when answers with the same score are a pair, or a score is used unasked."""
    trees = DPO().trees(ranked(3, scores=(2.0, 1.0, 1.0)))
    plain = stepper(DPO()).evaluate(trees)
    margin = stepper(DPO(scores="margin")).evaluate(trees)
    soft = stepper(DPO(scores="probability")).evaluate(trees)
    assert plain.loss == pytest.approx(math.log(2), rel=1e-5)
    # Both pairs have the gap 1, the third has none and is no pair.
    assert margin.loss == pytest.approx(math.log(1 + math.e), rel=1e-5)
    assert soft.loss == pytest.approx(math.log(2), rel=1e-5)
    with pytest.raises(RecipeError, match="whose target is a margin"):
        choose("objectives", Objective, {"method": "dpo", "scores": "margin", "shape": "ipo"})


def test_trees_with_scores_and_without_may_share_a_pass() -> None:
    """Breaks when a row without scores is taken for a coin."""
    told, untold = DPO().trees(ranked(2, scores=(3.0, 0.0)))[0], DPO().trees(ranked(2, row=1))[0]
    method = DPO(scores="probability", beta=1.0)
    both = stepper(method, shaken=True).evaluate([told, untold])
    alone = [stepper(method, shaken=True).evaluate([tree]).loss for tree in (told, untold)]
    assert both.loss == pytest.approx(np.mean(alone), rel=1e-5)
    certain = stepper(DPO(beta=1.0), shaken=True).evaluate([untold])
    assert certain.loss == pytest.approx(alone[1], rel=1e-6)


def test_a_tree_is_not_cut_into_parts() -> None:
    """Breaks when one answer's loss is taken before the other one is known."""
    method = DPO()
    (tree,) = method.trees(ranked(2))
    small = stepper(method, shaken=True, micro_tokens=4)
    assert tree.token_count > 8
    whole, cut = stepper(method, shaken=True).forward_backward([tree]), small.forward_backward([tree])
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
