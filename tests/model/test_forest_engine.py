"""Proofs in float32 that the engine computes what the zoo's own forward computes: losses and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.forest import Forest, Segment, Tree, pack, row_tree
from luthier.model.running import blocks
from luthier.model.running.executor import run_segments
from luthier.model.running.unrolled import run_unrolled
from tests import forests
from tests.forests import ARCHITECTURES
from tests.tiny import WINDOW

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_architecture
def test_packed_rows_equal_single_rows_and_the_zoos_own_loss_with_labels(architecture: str) -> None:
    """Breaks when a segment sees its neighbour, a position does not restart, a window or cap is lost, or a label is
    predicted from the wrong place."""
    model = forests.language_model(architecture)
    plain = forests.zoo(architecture, ours=False)
    trees = forests.rows(5, ones=True, longest=3 * WINDOW)
    parameters = forests.trainable(model)
    packed = forests.engine_loss(model, trees)
    packed_gradients = forests.gradients(packed, parameters)
    single = torch.stack([forests.engine_loss(model, [tree]) for tree in trees]).sum()
    losses = []
    for tree in trees:
        ids = torch.from_numpy(tree.segments[0].tokens.astype(np.int64))[None]
        losses.append(plain(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1))
    expected = torch.stack(losses).sum()
    assert model.executor.kind == "segments" and model.executor.own_head
    assert packed.item() == pytest.approx(expected.item(), rel=1e-5)
    assert single.item() == pytest.approx(expected.item(), rel=1e-5)
    reference = forests.gradients(expected, dict(plain.named_parameters()))
    forests.assert_same_gradients(packed_gradients, reference)
    forests.assert_same_gradients(forests.gradients(single, parameters), reference)


@each_architecture
def test_a_shared_prefix_equals_unshared_rows(architecture: str) -> None:
    """Breaks when a child sees its sibling, forgets an ancestor, starts at the wrong position, or when the gradient of
    several children does not add up in the prefix."""
    model = forests.language_model(architecture)
    # A row as long as the prompt that follows it: equal rows are attended together, a prompt with children never.
    same = forests.rows(1, seed=5, shortest=7, longest=7)
    trees = [forests.branching(seed=1), *forests.rows(2, seed=5), *same, forests.branching(seed=2, row=3)]
    parameters = forests.trainable(model)
    shared = forests.engine_loss(model, trees)
    shared_gradients = forests.gradients(shared, parameters)
    rows = [row for tree in trees for row in forests.unshared(tree)]
    alone = torch.stack([forests.engine_loss(model, [row]) for row in rows]).sum()
    assert shared.item() == pytest.approx(alone.item(), rel=1e-5)
    forests.assert_same_gradients(shared_gradients, forests.gradients(alone, parameters))
    plain = forests.zoo(architecture, ours=False)
    expected = forests.brute_loss(plain, Forest(tuple(trees)))
    assert shared.item() == pytest.approx(expected.item(), rel=1e-5)
    forests.assert_same_gradients(shared_gradients, forests.gradients(expected, dict(plain.named_parameters())))


@each_architecture
def test_segments_equal_unrolled_paths_token_by_token(architecture: str) -> None:
    """Breaks when the unrolled executor counts a shared token twice or hands tokens out in another order."""
    model = forests.language_model(architecture)
    parameters = forests.trainable(model)
    forest = Forest((forests.branching(seed=3), *forests.rows(2, seed=8), forests.branching(seed=4, row=2)))
    by_segment = run_segments(model.module, forest, head=model.head)
    unrolled = run_unrolled(model.module, forest, head=model.head)
    for name in ("labels", "weights", "rows", "trees"):
        assert torch.equal(getattr(by_segment, name), getattr(unrolled, name)), name
    torch.testing.assert_close(by_segment.log_probs, unrolled.log_probs, rtol=1e-5, atol=1e-5)
    forests.assert_same_gradients(
        forests.gradients((by_segment.log_probs * by_segment.weights).sum(), parameters),
        forests.gradients((unrolled.log_probs * unrolled.weights).sum(), parameters),
    )


def test_the_parents_last_position_predicts_the_first_token_of_every_child() -> None:
    """Breaks when the layout drops the first token of a child, as a shift by one within segments would."""
    model = forests.language_model("llama")
    prompt = np.array([5, 6, 7], dtype=np.int32)
    children = [np.array([first], dtype=np.int32) for first in (10, 11, 12)]
    one = np.ones(1, dtype=np.float32)
    tree = Tree((Segment(prompt, np.zeros(3, dtype=np.float32)), *(Segment(child, one, 0) for child in children)))
    outputs = model.token_outputs(Forest((tree,)))
    logits = model.module(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = torch.log_softmax(logits, -1)[torch.tensor([10, 11, 12])]
    assert outputs.labels.tolist() == [10, 11, 12]
    torch.testing.assert_close(outputs.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert tree.weight == Forest((tree,)).weight == 3.0


def test_the_first_token_of_a_root_is_predicted_by_nothing() -> None:
    """Breaks when a row's first token is predicted by the last token of the row before it."""
    trees = [row_tree(np.array([9, 8], dtype=np.int32), np.ones(2, dtype=np.float32), row=row) for row in range(3)]
    layout = Forest(tuple(trees)).layout
    assert layout.labels.tolist() == [8, 8, 8]
    assert layout.predictors.tolist() == [0, 2, 4]
    assert Forest(tuple(trees)).weight == 3.0


MODEL = forests.language_model("mistral")
TREES = [*forests.rows(5, seed=3), forests.branching(seed=6, row=5), *forests.rows(3, seed=4)]


def _cut_gradients(trees: list[Tree], micro_tokens: int) -> dict[str, torch.Tensor]:
    parameters = forests.trainable(MODEL)
    for forest in pack(trees, max_tokens=micro_tokens):
        forests.engine_loss(MODEL, forest.trees).backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


WHOLE = _cut_gradients(TREES, 10_000)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(order=st.permutations(range(len(TREES))), micro_tokens=st.integers(1, 90))
def test_any_cut_of_a_step_gives_the_same_gradient(order: list[int], micro_tokens: int) -> None:
    """Breaks when a loss is a mean of its micro-batch, or when what shares a micro-batch changes a result."""
    forests.assert_same_gradients(_cut_gradients([TREES[index] for index in order], micro_tokens), WHOLE)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), budget=st.integers(1, 60))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_packing_keeps_every_tree_in_order_and_respects_the_budget(sizes: list[int], budget: int) -> None:
    """Breaks when a tree is dropped or doubled, or two trees share a forest that has no room for both."""
    trees = [
        row_tree(np.full(size, 7, dtype=np.int32), np.ones(size, dtype=np.float32), row=row)
        for row, size in enumerate(sizes)
    ]
    made = pack(trees, max_tokens=budget)
    assert [tree.row for forest in made for tree in forest.trees] == list(range(len(sizes)))
    assert all(forest.token_count <= budget or len(forest.trees) == 1 for forest in made)


def test_equal_rows_share_an_attention_call_and_nothing_is_padded() -> None:
    """Breaks when rows of equal length are attended one by one, or a plan is ignored."""
    model = forests.language_model("llama", fused=False)
    rng = np.random.default_rng(0)
    trees = [row_tree(forests.tokens(rng, n), np.ones(n, dtype=np.float32), row=i) for i, n in enumerate([6, 6, 6, 4])]
    sizes: list[tuple[int, ...]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: object, **settings: object) -> torch.Tensor:
        sizes.append(tuple(query.shape[::2]))
        return original(query, *args, **settings)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model.token_outputs(Forest(tuple(trees)))
    assert sizes == [(3, 6), (1, 4)] * 2
    runs: list[tuple[tuple[int, int], ...]] = []

    def spy_of_ours(query: torch.Tensor, *args: object, seen: object) -> torch.Tensor:
        runs.append(tuple(args[2]))  # type: ignore[arg-type]
        return query

    ours = forests.language_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "causal_attention", spy_of_ours)
        ours.token_outputs(Forest(tuple(trees)))
    assert runs == [((3, 6), (1, 4))] * 2
