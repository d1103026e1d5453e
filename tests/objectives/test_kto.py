"""KTO: where it begins, and its point of reference: one for a whole step, without gradient, however the step is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.data.forest import Forest, Segment, Tree
from luthier.model.language_model import LanguageModel
from luthier.objectives.kto import KTO
from luthier.optimizers.adamw import AdamW
from luthier.train.stepper import Stepper
from tests import forests, task_models


def stepper(method: KTO, *, shaken: float = 0.0, micro_tokens: int = 4096) -> Stepper:
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach(LoRA().attach(model.sites))
    if shaken:
        forests.shake(attachment.named_parameters().values(), seed=3, std=shaken)
    return Stepper(model, attachment, method, AdamW(), micro_tokens=micro_tokens, max_grad_norm=None)


def trees(method: KTO, count: int = 5) -> list[Tree]:
    return [tree for view in task_models.views_for(method, count) for tree in method.trees(view)]


def log_ratio(model: LanguageModel, prompt: Segment, leaf: Segment) -> torch.Tensor:
    """log policy - log reference of an answer, as a row of its own."""
    weights = np.concatenate([prompt.weights, np.ones(len(leaf.tokens), np.float32)])
    forest = Forest((Tree((Segment(np.concatenate([prompt.tokens, leaf.tokens]), weights),)),))
    with torch.no_grad(), model.without_attachments():
        reference = model.token_outputs(forest).log_probs
    return (model.token_outputs(forest).log_probs - reference).sum()


def test_before_the_first_step_every_answer_is_at_the_point_of_reference() -> None:
    """Breaks when gain or point is not 0 for a policy that is its own reference."""
    method = KTO(good=2.0)
    report = stepper(method).evaluate(trees(method))
    # Rows 1 and 3 are good, the other three are not.
    assert report.loss == pytest.approx((2 * 2 * 0.5 + 3 * 0.5) / 5, rel=1e-5)
    assert report.metrics["kl"][0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("micro_tokens", [4096, 1])
def test_the_loss_and_its_gradient_are_the_papers(micro_tokens: int) -> None:
    """Breaks when the point is that of a micro-batch, has a gradient, or is taken from an answer's own prompt."""
    method = KTO(beta=0.3, bad=1.4)
    made = trees(method)
    ours = stepper(method, shaken=0.05, micro_tokens=micro_tokens)
    report = ours.forward_backward(made)
    apart = stepper(method, shaken=0.05)
    model, room = apart.model, max(tree.token_count for tree in made)
    others = []
    for one, two in zip(made, [*made[1:], made[0]], strict=True):
        prompt, leaf = one.segments[0], two.segments[1]
        kept = room - len(prompt.tokens)
        others.append(float(log_ratio(model, prompt, Segment(leaf.tokens[:kept], leaf.weights[:kept], 0)).detach()))
    point = max(0.0, float(np.mean(others)))
    assert point > 0.01, "the model has not moved far enough to tell anything"
    total = torch.zeros(())
    for place, tree in enumerate(made):
        gain = log_ratio(model, *tree.segments) - point
        total = total + (1 - torch.sigmoid(0.3 * gain) if place % 2 else 1.4 * (1 - torch.sigmoid(-0.3 * gain)))
    total.backward()  # type: ignore[no-untyped-call]
    assert report.metrics["kl"][0] / report.metrics["kl"][1] == pytest.approx(point, rel=1e-4)
    assert report.loss_sum == pytest.approx(float(total.detach()), rel=1e-5)
    for name, parameter in ours.parameters.items():
        expected = apart.parameters[name].grad
        assert parameter.grad is not None and expected is not None
        assert forests.relative_error(parameter.grad, expected) < 1e-4, name


def test_a_row_alone_has_nobody_to_be_compared_with() -> None:
    """Breaks when a point of reference is made from the answer that it is for."""
    method = KTO()
    alone = stepper(method, shaken=0.05)
    (tree,) = trees(method, 1)
    assert method.probes([tree]) == []
    assert alone.evaluate([tree]).metrics["kl"][0] == 0.0


def test_probes_are_no_longer_than_the_longest_row() -> None:
    """Breaks when a prompt with another one's answer outgrows the positions of a model."""
    method = KTO()
    made = trees(method)
    room = max(tree.token_count for tree in made)
    probes = method.probes(made)
    assert len(probes) == len(made) and max(tree.token_count for tree in probes) <= room
    assert all(tree.weight > 0 for tree in probes)
