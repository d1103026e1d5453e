"""The stepper: one division for a step, masters in float32, and nothing applied that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.core.errors import RecipeError
from luthier.data.forest import Segment, Tree, row_tree
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.pass_report import PassReport, add_up
from luthier.train.rounding import RoundingWatch
from luthier.train.stepper import Stepper
from tests import forests

TREES = [*forests.rows(4, seed=2), forests.branching(seed=1, row=4), *forests.rows(1, seed=9)]


def stepper(
    adapter: Adapter | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    micro_tokens: int = 4096,
    max_grad_norm: float | None = 1.0,
    optimizer: AdamW | None = None,
) -> Stepper:
    """A stepper over a tiny llama, the same for the same arguments."""
    model = forests.language_model("llama", dtype=dtype)
    torch.manual_seed(0)
    attachment = model.attach((adapter or LoRA(rank=4)).attach(model.sites))
    if adapter is None:
        forests.shake(attachment.named_parameters().values())
    return Stepper(
        model,
        attachment,
        SFT(),
        optimizer or AdamW(learning_rate=1e-2, weight_decay=0.1),
        max_grad_norm=max_grad_norm,
        micro_tokens=micro_tokens,
    )


def values(made: Stepper) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    return {name: parameter.detach().clone() for name, parameter in made.parameters.items()}


def sixteen() -> list[Tree]:
    """Rows whose weights add up to 16: a division by it is exact, so bits can be compared."""
    rng = np.random.default_rng(0)
    return [row_tree(forests.tokens(rng, 5), np.ones(5, dtype=np.float32), row=row) for row in range(4)]


@pytest.mark.parametrize("clipped", [False, True])
def test_a_step_is_torchs_adamw_on_the_mean_loss_bit_for_bit(clipped: bool) -> None:
    """Breaks when the sum is divided by anything but its weight, or clipping differs from torch's on the mean."""
    ours = stepper(max_grad_norm=1e-3 if clipped else None)
    theirs = stepper(max_grad_norm=None)
    parameters = list(theirs.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)
    for _ in range(3):
        ours.forward_backward(sixteen())
        report = ours.optim_step(factor=0.5)
        # The same order of rows as in a micro-batch: equal lengths keep theirs.
        (forests.engine_loss(theirs.model, sixteen()) / 16).backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        assert report.applied and report.grad_norm == float(norm)
        if clipped:
            for each in parameters:
                assert each.grad is not None
                each.grad.mul_(1e-3 / float(norm))
        optimizer.step()
        optimizer.zero_grad()
        found, expected = values(ours), values(theirs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@settings(max_examples=10)
@given(micro_tokens=st.integers(1, 120), order=st.permutations(range(len(TREES))))
def test_any_cut_and_order_gives_the_same_step_and_the_same_report(micro_tokens: int, order: list[int]) -> None:
    """Breaks when a micro-batch is averaged, or counted in the division as one of many."""
    whole, cut = stepper(max_grad_norm=None), stepper(micro_tokens=micro_tokens, max_grad_norm=None)
    expected, found = whole.forward_backward(TREES), cut.forward_backward([TREES[index] for index in order])
    assert (found.tokens, found.trained_tokens) == (expected.tokens, expected.trained_tokens)
    assert found.weight == pytest.approx(expected.weight)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    for row, (loss, weight) in expected.row_losses.items():
        assert found.row_losses[row] == (pytest.approx(loss, rel=1e-4), pytest.approx(weight))
    forests.assert_same_gradients(
        {name: p.grad for name, p in cut.parameters.items() if p.grad is not None},
        {name: p.grad for name, p in whole.parameters.items() if p.grad is not None},
    )


def test_two_passes_before_a_step_are_one_step_over_both() -> None:
    """Breaks when each pass is divided by a weight of its own."""
    one, two = stepper(max_grad_norm=None), stepper(max_grad_norm=None)
    one.forward_backward(TREES)
    two.forward_backward(TREES[:2])
    two.forward_backward(TREES[2:])
    assert two.pending_weight == pytest.approx(one.pending_weight)
    assert two.optim_step().grad_norm == pytest.approx(one.optim_step().grad_norm, rel=1e-5)


def test_the_weight_of_a_step_is_the_sum_of_the_tokens_weights() -> None:
    """Breaks when tokens are counted instead of weighed: halving all weights must change nothing but the sums."""
    rng = np.random.default_rng(1)
    ids = forests.tokens(rng, 6)
    full = [row_tree(ids, np.ones(6, dtype=np.float32))]
    half = [row_tree(ids, np.full(6, 0.5, dtype=np.float32))]
    one, two = stepper(max_grad_norm=None), stepper(max_grad_norm=None)
    whole, halved = one.forward_backward(full), two.forward_backward(half)
    assert (whole.weight, halved.weight) == (5.0, 2.5) and whole.loss == pytest.approx(halved.loss)
    assert whole.trained_tokens == halved.trained_tokens == 5
    assert one.optim_step().grad_norm == pytest.approx(two.optim_step().grad_norm, rel=1e-6)


def test_the_losses_of_rows_add_up_to_the_loss() -> None:
    """Breaks when a row's loss is booked on another, or a tree's children are left out."""
    report = stepper().evaluate(TREES)
    assert sum(loss for loss, _ in report.row_losses.values()) == pytest.approx(report.loss_sum, rel=1e-5)
    assert sum(weight for _, weight in report.row_losses.values()) == pytest.approx(report.weight)
    alone = stepper().evaluate([TREES[4]])
    assert report.row_losses[4][0] == pytest.approx(alone.loss_sum, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_never_applied(bad: float) -> None:
    """Breaks when clipping turns infinity into NaN and the step goes through, or moments keep a trace of it."""
    made = stepper()
    made.forward_backward(TREES[:2])
    next(iter(made.masters.values())).grad.view(-1)[0] = bad  # type: ignore[union-attr]
    before = values(made)
    report = made.optim_step()
    assert not report.applied and not math.isfinite(report.grad_norm)
    assert report.bad_tensors == (next(iter(made.masters)),) and not report.broken
    assert all(torch.equal(value, before[name]) for name, value in values(made).items())
    assert not made.optimizer.state and made.pending_weight == 0
    assert all(parameter.grad is None for parameter in made.parameters.values())
    made.forward_backward(TREES[:2])
    clean = stepper()
    clean.forward_backward(TREES[:2])
    assert made.optim_step() == clean.optim_step()


def test_evaluation_is_without_dropout_gradients_or_a_trace() -> None:
    """Breaks when an evaluation draws from the generator or leaves gradients behind."""
    made = stepper(LoRA(rank=4, dropout=0.5))
    forests.shake(made.parameters.values())
    state = torch.get_rng_state()
    one, two = made.evaluate(TREES), made.evaluate(TREES)
    assert one == two and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in made.parameters.values()) and made.pending_weight == 0
    assert made.forward_backward(TREES).loss_sum != one.loss_sum


def test_float32_masters_of_bfloat16_weights_follow_the_float32_run() -> None:
    """Breaks when the optimizer steps on bfloat16 weights: steps below half a unit in the last place are lost."""
    trees = forests.rows(6, seed=5, ones=True)
    low, high, naive = (
        stepper(Full(), dtype=dtype, optimizer=AdamW(learning_rate=5e-5), max_grad_norm=None)
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
    )
    with torch.no_grad():
        for name, parameter in high.parameters.items():
            parameter.copy_(low.masters[name])
    start = high.evaluate(trees).loss
    naive_optimizer = torch.optim.AdamW(list(naive.parameters.values()), lr=5e-5, weight_decay=0.0)
    for _ in range(20):
        for made in (low, high):
            made.forward_backward(trees)
            made.optim_step()
        weight = naive.forward_backward(trees).weight
        for name, parameter in naive.parameters.items():
            gradient = naive.masters[name].grad
            assert gradient is not None
            parameter.grad = (gradient / weight).bfloat16()
        naive_optimizer.step()
        naive_optimizer.zero_grad()
        naive.zero_grad()
    assert {parameter.dtype for parameter in low.parameters.values()} == {torch.bfloat16}
    assert all(torch.equal(p, low.masters[name].bfloat16()) for name, p in low.parameters.items())
    expected = high.evaluate(trees).loss
    assert start - expected > 0.02
    assert _loss_with(high, low.masters, trees) == pytest.approx(expected, abs=1e-3)
    assert abs(_loss_with(high, naive.parameters, trees) - expected) > 5e-3


def _loss_with(made: Stepper, tensors: Mapping[str, torch.Tensor], trees: list[Tree]) -> float:
    kept = values(made)
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            parameter.copy_(tensors[name])
        loss = made.evaluate(trees).loss
        for name, parameter in made.parameters.items():
            parameter.copy_(kept[name])
    return loss


def test_gradients_of_micro_batches_are_added_in_float32() -> None:
    """Breaks when they are added in bfloat16, where the two hundredth is rounded away."""
    trees = forests.rows(60, seed=7, ones=True, shortest=3, longest=5)
    low = stepper(Full(layers=(0,)), dtype=torch.bfloat16, micro_tokens=1)
    low.forward_backward(trees)
    singles = stepper(Full(layers=(0,)), dtype=torch.bfloat16, micro_tokens=1)
    total: dict[str, torch.Tensor] = {}
    for tree in sorted(trees, key=lambda tree: tree.token_count, reverse=True):
        singles.forward_backward([tree])
        for name, master in singles.masters.items():
            assert master.grad is not None
            total[name] = master.grad.clone() if name not in total else total[name] + master.grad
        singles.zero_grad()
    assert all(torch.equal(low.masters[name].grad, expected) for name, expected in total.items())  # type: ignore[arg-type]


def test_a_step_without_a_gradient_is_an_error() -> None:
    """Breaks when a step divides by a weight of zero."""
    made = stepper()
    with pytest.raises(RecipeError, match="without a gradient"):
        made.optim_step()
    silent = Tree((Segment(np.array([4, 5], dtype=np.int32), np.zeros(2, dtype=np.float32)),))
    report = made.forward_backward([silent])
    assert math.isnan(report.loss) and report.weight == 0
    with pytest.raises(RecipeError, match="without a gradient"):
        made.optim_step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_an_update_breaks_are_named(dtype: torch.dtype, bad: float) -> None:
    """Breaks when an update is not looked at after it was made: the run would save NaN and go on with it."""
    made = stepper(Full(), dtype=dtype)
    names = list(made.masters)
    torch_step = made.optimizer.step

    def step() -> None:
        torch_step()
        for name in names[1:20:2]:
            made.masters[name].data.view(-1)[-1] = bad

    made.optimizer.step = step  # type: ignore[method-assign, assignment]
    made.forward_backward(TREES[:2])
    report = made.optim_step()
    assert report.applied and report.broken and math.isfinite(report.grad_norm)
    assert report.bad_tensors == tuple(names[1:20:2])[:8]


def test_a_master_too_large_for_its_rounded_copy_breaks_the_weight() -> None:
    """Breaks when only masters are looked at: the largest float32 numbers are infinite once they are rounded."""
    made = stepper(Full(), dtype=torch.bfloat16)
    name = next(iter(made.masters))

    def step() -> None:
        made.masters[name].data.view(-1)[0] = torch.finfo(torch.float32).max

    made.optimizer.step = step  # type: ignore[method-assign, assignment]
    made.forward_backward(TREES[:2])
    report = made.optim_step()
    assert report.broken and report.bad_tensors == (name,)


def test_a_sum_over_infinities_of_both_signs_is_not_a_number() -> None:
    """Breaks when the sum raises instead: a bad step would end the run with a traceback."""
    halves = [PassReport(loss, 1.0, 1, 1, {}) for loss in (math.inf, -math.inf)]
    assert math.isnan(add_up(halves).loss_sum) and add_up(halves[:1]).loss_sum == math.inf


@pytest.mark.parametrize("rate", [1e-8, 1e-4, 1e-1])
def test_updates_that_round_to_nothing_are_counted(rate: float) -> None:
    """Breaks when the share is of something else than the elements that moved."""
    made = stepper(Full(), dtype=torch.bfloat16, optimizer=AdamW(learning_rate=rate), max_grad_norm=None)
    masters = {name: master.clone() for name, master in made.masters.items()}
    before = values(made)
    made.forward_backward(TREES)
    report = made.optim_step()
    moved = {name: made.masters[name] != old for name, old in masters.items()}
    lost = sum(int((each & (made.parameters[name] == before[name])).sum()) for name, each in moved.items())
    # Tensors this small are looked at as a whole.
    assert report.rounded_away == lost / sum(int(each.sum()) for each in moved.values())
    assert (report.rounded_away > 0.99) == (rate == 1e-8) and (report.rounded_away < 0.05) == (rate == 1e-1)


def test_a_large_tensor_is_sampled() -> None:
    """Breaks when the samples lie in a few columns, or more than a few thousand elements are kept twice."""
    master = torch.zeros(512, 512)
    watch = RoundingWatch({"w": master}, {"w": master.bfloat16()})
    before = watch.look()
    assert 4000 < before[0].numel() < 5000
    master[:, ::2] = 1.0
    master[:, 1::4] = 1e-45
    share = watch.rounded_away(before)
    # Half of the columns move visibly, a quarter too little for bfloat16, a quarter not at all.
    assert share is not None and abs(share - 1 / 3) < 0.05
    assert watch.rounded_away(watch.look()) is None


def test_float32_has_nothing_to_round() -> None:
    """Breaks when adapters, which are float32 in every base, are watched as if they were rounded."""
    made = stepper(dtype=torch.bfloat16)
    made.forward_backward(TREES[:2])
    assert made.optim_step().rounded_away is None and not made.copies
