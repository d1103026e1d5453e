"""Sources: the order of rows, the size of a step, and going on from a saved place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.forest import pack
from luthier.objectives.sft import SFT
from luthier.train.source import FULL, Cursor, DataSource
from tests import forests

VIEWS = forests.views(23, seed=1)
Step = tuple[int, ...]


def source(*, seed: int = 0, rows: int | None = None, tokens: int | None = None, count: int = 23) -> DataSource:
    """A source over the first `count` rows."""
    views = VIEWS[:count]
    return DataSource(views, SFT(), lengths=forests.lengths(views), seed=seed, rows=rows, tokens=tokens)


def steps(made: DataSource, count: int) -> list[Step]:
    """The rows of the next `count` steps."""
    return [tuple(tree.row for tree in made.next_step()) for _ in range(count)]


@given(seed=st.integers(0, 1000), tokens=st.integers(5, 60))
def test_the_order_is_a_pure_function_of_seed_and_epoch(seed: int, tokens: int) -> None:
    """Breaks when a source carries a generator along, or reads the global one."""
    one, two = source(seed=seed, tokens=tokens), source(seed=seed, tokens=tokens)
    first = steps(one, one.steps_in(1))
    np.random.default_rng().random()
    two.seek(Cursor(1, 0))
    second = steps(two, two.steps_in(2) - two.steps_in(1))
    assert steps(one, len(second)) == second
    assert sorted(row for step in first for row in step) == list(range(23))
    assert sorted(row for step in second for row in step) == list(range(23))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    """Breaks when every epoch, or every seed, sees the same order."""
    made = source(rows=23)
    orders = [*steps(made, 3), *steps(source(seed=1, rows=23), 1)]
    assert len(set(orders)) == 4


@given(
    epochs=st.sampled_from([0.25, 0.5, 1.0, 1.75, 2.0, 3.0]),
    rows=st.one_of(st.none(), st.integers(1, 30)),
    tokens=st.integers(1, 80),
)
def test_steps_in_is_what_next_step_makes(epochs: float, rows: int | None, tokens: int) -> None:
    """Breaks when a step crosses the end of an epoch, or the count forgets the last short one."""
    made = source(rows=rows, tokens=None if rows else tokens)
    count = 0
    while made.cursor.epoch + made.cursor.used / 23 < epochs - 1e-9:
        made.next_step()
        count += 1
    assert made.steps_in(epochs) == count


@given(tokens=st.integers(1, 60))
def test_a_step_of_tokens_is_as_full_as_it_can_be_and_never_over(tokens: int) -> None:
    """Breaks when a step overflows its budget, or closes although the next row would have fitted."""
    made = source(tokens=tokens)
    order = [row for step in steps(source(rows=1), 23) for row in step]
    used = 0
    while used < 23:
        step = steps(made, 1)[0]
        size = sum(len(VIEWS[row].tokens) for row in step)
        assert size <= tokens or len(step) == 1
        used += len(step)
        assert tuple(order[used - len(step) : used]) == step
        if used < 23:
            assert size + len(VIEWS[order[used]].tokens) > tokens


def test_a_step_of_rows_has_that_many_and_the_rest_at_the_end() -> None:
    """Breaks when the rest of an epoch is dropped."""
    assert [len(step) for step in steps(source(rows=10), 4)] == [10, 10, 3, 10]


@given(before=st.integers(0, 20), tokens=st.integers(5, 60))
def test_seek_goes_on_as_if_nothing_had_happened(before: int, tokens: int) -> None:
    """Breaks when the cursor does not say everything, or seek keeps the order of another epoch."""
    unbroken = source(tokens=tokens)
    steps(unbroken, before)
    resumed = source(tokens=tokens)
    steps(resumed, 3)
    resumed.seek(unbroken.cursor)
    assert steps(resumed, 15) == steps(unbroken, 15) and resumed.cursor == unbroken.cursor


def test_no_rows_and_no_single_measure_are_errors() -> None:
    """Breaks when an empty file trains on nothing, or one of two budgets is ignored."""
    with pytest.raises(DataError, match="no row"):
        source(rows=1, count=0)
    with pytest.raises(DataError, match="exactly one"):
        source(rows=1, tokens=1)
    with pytest.raises(DataError, match="exactly one"):
        source()


@given(micro_tokens=st.integers(1, 60), tokens=st.integers(5, 80), steps=st.integers(1, 30))
def test_the_largest_micro_batches_are_those_that_the_steps_make(micro_tokens: int, tokens: int, steps: int) -> None:
    """Breaks when rows are packed in another way than the stepper packs them, or steps that never come are counted."""
    made, walked = source(tokens=tokens), source(tokens=tokens)
    forests_made = []
    for _ in range(steps):
        ordered = sorted(walked.next_step(), key=lambda tree: tree.token_count, reverse=True)
        forests_made += pack(ordered, max_tokens=micro_tokens)
    found = made.largest_micro_batches(micro_tokens, steps)
    most = max(forest.token_count for forest in forests_made)
    longest = max(tree.token_count for forest in forests_made for tree in forest.trees)
    assert FULL * most <= max(batch.tokens for batch in found) <= most
    assert max(batch.longest for batch in found) == longest
    cuts = {tuple(tree.row for tree in forest.trees) for forest in forests_made}
    for batch in found:
        trees = made.trees_of(batch)
        assert tuple(tree.row for tree in trees) in cuts
        assert sum(tree.token_count for tree in trees) == batch.tokens
        assert max(tree.token_count for tree in trees) == batch.longest
    assert made.cursor == Cursor(0, 0)
