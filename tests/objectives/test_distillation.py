"""Distillation: what is compared with whom, and that a student comes to its teacher, however it is compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rollouts import Answer, Group, Prompt
from luthier.infer.engine import Engine
from luthier.infer.groups import GroupSpeaker
from luthier.maths.divergences import Comparison
from luthier.model.language_model import LanguageModel
from luthier.objectives import Objective
from luthier.objectives.distillation import Distillation
from luthier.train.reference import Front, Reference, looked_at
from tests import forests, rollouts, task_models


def test_the_loss_is_the_reverse_kl_of_what_was_sampled() -> None:
    """Breaks when teacher and student change places, or what pulls is not the teacher's word but the student's."""
    method = Distillation()
    group = Group(np.arange(2, dtype=np.int32), (
        Answer(np.array([5, 6, 7], np.int32), np.array([True, True, True]), np.array([-1.0, -2, -3], np.float32), 0.0),
    ))  # fmt: skip
    tree = method.grow(group)
    leaf = tree.segments[1].noting("reference", np.array([-0.5, -4, -3], np.float32))
    outputs, forest = rollouts.outputs_of(replace(tree, segments=(tree.segments[0], leaf)), [-1.0, -2.5, -3])
    report = method.loss(outputs, forest)
    assert report.sum.item() == pytest.approx(-1.0 + 0.5 - 2.5 + 4 - 3 + 3) and report.weight == 3
    report.sum.backward()
    # The gradient of a log-probability is minus what the teacher finds more likely than the student.
    assert outputs.log_probs.grad is not None
    assert outputs.log_probs.grad.tolist() == pytest.approx([-0.5, 1.5, 0.0])
    assert report.metrics["mismatch"][0] == pytest.approx(0.5) and report.metrics["kl"] == (pytest.approx(1.0), 3.0)


def test_later_steps_of_a_rollout_are_clipped() -> None:
    """Breaks when a policy that has moved is pulled on from where it is no longer."""
    method = Distillation(passes=2)
    assert method.recalled == {"old", "reference"} and not Distillation(passes=2, divergence="jsd").recalled
    group = Group(np.arange(2, dtype=np.int32), (
        Answer(np.array([5, 6], np.int32), np.array([True, True]), np.array([-1.0, -1], np.float32), 0.0),
    ))  # fmt: skip
    tree = method.grow(group)
    leaf = tree.segments[1].noting("reference", np.array([-0.1, -0.1], np.float32))
    leaf = leaf.noting("old", np.array([-1.0, -1.0], np.float32))
    outputs, forest = rollouts.outputs_of(replace(tree, segments=(tree.segments[0], leaf)), [-0.5, -1.0])
    method.loss(outputs, forest).sum.backward()
    assert outputs.log_probs.grad is not None
    assert outputs.log_probs.grad.tolist() == pytest.approx([0.0, -0.9])


def test_who_learns_from_what() -> None:
    """Breaks when given answers are learned from as if the model had said them, or of rows too much is asked."""
    sampled, given = Distillation(), Distillation(answers="given", divergence="jsd", share=0.3)
    assert sampled.needs == {"rollouts"} and sampled.meanings == ("asked",) and sampled.reference
    assert not given.needs and "conversation" in (given.meanings or ()) and not given.reference
    assert given.comparison == Comparison("jsd", 0.3) and sampled.comparison is None
    with pytest.raises(RecipeError, match="has not sampled them"):
        choose("objectives", Objective, {"method": "distillation", "answers": "given"})
    [view] = task_models.views_for(given, 1)
    [tree] = given.trees(view)
    assert np.array_equal(tree.segments[0].tokens, view.tokens) and tree.weight == view.weights[1:].sum()
    outputs = forests.language_model("llama").token_outputs(Forest((tree,)))
    with pytest.raises(RecipeError, match="no divergences"):
        given.loss(outputs, Forest((tree,)))


def teacher_for(student: LanguageModel) -> LanguageModel:
    """What the student could be: another model of the same weights, with an adapter that was shaken in them."""
    teacher = forests.language_model("llama")
    attachment = teacher.attach(LoRA().attach(teacher.sites))
    forests.shake(attachment.named_parameters().values(), seed=9, std=0.3)
    teacher.merge(reversible=False)
    assert teacher.vocabulary_size == student.vocabulary_size
    return teacher


_SLOW = [{"passes": 2}, {"divergence": "reverse"}, {"divergence": "forward"}]


@pytest.mark.parametrize(
    "knobs", [{}, {"divergence": "jsd"}, *(pytest.param(each, marks=pytest.mark.slow) for each in _SLOW)], ids=str
)
def test_a_student_comes_to_its_teacher(knobs: dict[str, Any]) -> None:
    """Breaks when a sign is wrong, or the teacher is asked about other tokens than those that were said."""
    stepper = rollouts.stepper_for(Distillation(**knobs), rate=1e-2, shaken=False)
    stepper.batcher.reference = Reference(teacher_for(stepper.model))
    rng = np.random.default_rng(0)
    prompts = [Prompt(forests.tokens(rng, 3), row=row) for row in range(2)]
    source = rollouts.source_for(
        stepper, lambda sample: 0.0, prompts=prompts, speaker=GroupSpeaker(Engine(stepper.model)),
        plan={"prompts": 2, "answers": 16, "max_new_tokens": 3, "stop_ids": ()},
    )  # fmt: skip
    told = [_distance(stepper.model, stepper.batcher.reference, prompts)]
    for _ in range(24):
        stepper.forward_backward(source.next_step())
        stepper.optim_step()
    told.append(_distance(stepper.model, stepper.batcher.reference, prompts))
    assert told[0] > 0.1 and told[1] < (0.6 if "passes" in knobs else 0.3) * told[0]


@torch.no_grad()
def _distance(model: LanguageModel, reference: Reference, prompts: list[Prompt]) -> float:
    """The reverse KL at the first token of an answer, exactly."""
    model.train(False)
    leaf = Segment(np.zeros(1, np.int32), np.ones(1, np.float32), 0)
    trees = [Tree((Segment(one.tokens, np.zeros(len(one.tokens), np.float32)), leaf)) for one in prompts]
    outputs = looked_at(model, Forest(tuple(trees)), Comparison("reverse"), temperature=1.0, reference=reference)
    assert outputs.divergences is not None
    return float(outputs.divergences.mean())


@pytest.mark.parametrize("comparison", [None, Comparison("forward")])
def test_a_prompt_in_front_is_read_by_the_teacher_alone(comparison: Comparison | None) -> None:
    """Breaks when the student sees the prompt, its tokens are trained, or the teacher's word is of other tokens."""
    stepper = rollouts.stepper_for(Distillation(divergence="sampled" if comparison is None else "forward"))
    front = Front(np.array([7, 8], np.int32), np.array([7, 30, 31, 8], np.int32))
    stepper.batcher.reference = Reference(front=front)
    rest = np.array([20, 21, 22], np.int32)
    row = Segment(np.concatenate([front.removed, rest]).astype(np.int32), np.array([0, 0, 0, 1, 1], np.float32))
    longer = Segment(np.concatenate([front.put, rest]).astype(np.int32), np.array([0, 0, 0, 0, 0, 1, 1], np.float32))
    read = front.before(Tree((row,), row=4))
    assert np.array_equal(read.segments[0].tokens, longer.tokens) and read.row == 4
    report = stepper.evaluate([Tree((row,))])
    with torch.no_grad(), stepper.model.without_attachments():
        theirs = stepper.model.token_outputs(Forest((Tree((longer,)),))).log_probs
    with torch.no_grad():
        ours = stepper.model.token_outputs(Forest((Tree((row,)),))).log_probs
    if comparison is None:
        assert report.loss_sum == pytest.approx(float((ours - theirs).sum()), abs=1e-5)
    else:
        same = Reference(front=Front(front.removed, front.removed))
        plain = looked_at(stepper.model, Forest((Tree((row,)),)), comparison, temperature=1.0, reference=same)
        assert plain.divergences is not None
        assert report.loss_sum != pytest.approx(float(plain.divergences.detach().sum()), rel=1e-3)
