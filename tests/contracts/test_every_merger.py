"""What every merger promises, found by walking the family: nothing here names a method."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.kernels.floats import BFLOAT16, FLOAT32, narrowed
from luthier.merge.source import total
from luthier.mergers import BASE, Merger, Part, Sums, WeightedSum
from tests.mergers_of import family, merger, part

NAMES = catalog.names("mergers")
every = pytest.mark.parametrize("name", NAMES)
ROWS, COLUMNS = 23, 17


def given(method: Merger, count: int | None = None) -> Part:
    """As many models as it takes, three at most, with a base beside them."""
    fewest, most = method.models
    wanted = count or min(3, most or 3)
    base, models = family(max(fewest, wanted), ROWS, COLUMNS)
    return part(*models, base=base, weights=(1.0, 0.5, 2.0)[: len(models)])


def in_pieces(method: Merger, whole: Part, height: int) -> np.ndarray:
    """As the machine merges: sums over pieces, then pieces."""

    def piece(first: int) -> Part:
        rows = slice(first, first + height)
        models = tuple(model[rows] for model in whole.models)
        base = None if whole.base is None else whole.base[rows]
        return replace(whole, models=models, base=base, first=first * COLUMNS)

    pieces = [piece(first) for first in range(0, ROWS, height)]
    seen: list[Sums] = []
    for _ in range(method.passes):
        seen.append(total([method.look(each, seen) for each in pieces]))
    return np.concatenate([method.merge(each, seen) for each in pieces])


@every
@pytest.mark.parametrize("height", [1, 5, 22])
def test_rows_in_pieces_are_the_whole(name: str, height: int) -> None:
    """Breaks when a look is no sum, or a mask or a threshold depends on where a tensor is cut."""
    method = merger(name)
    np.testing.assert_allclose(in_pieces(method, given(method), height), method.whole(given(method)), 1.3e-6, 1e-5)


@every
def test_it_is_a_pure_function(name: str) -> None:
    """Breaks when a model's rows are changed or handed out, or the generator of the process is used."""
    method, whole = merger(name), given(merger(name))
    before = [rows.copy() for rows in (*whole.models, whole.origin)]
    state = np.random.get_state()[1].tolist()
    first = method.whole(whole)
    kept = first.copy()
    first += 1
    assert np.array_equal(method.whole(whole), kept)
    assert all(np.array_equal(*pair) for pair in zip(before, (*whole.models, whole.origin), strict=True))
    assert np.random.get_state()[1].tolist() == state
    assert kept.dtype == FLOAT32 and kept.shape == (ROWS, COLUMNS)


@every
def test_models_that_are_all_the_base_give_it_back_bit_for_bit(name: str) -> None:
    """Breaks when merging loses bits of what nobody has changed."""
    method, whole = merger(name), given(merger(name))
    base = whole.origin
    same = replace(whole, models=(base.copy(),) * len(whole.models), weights=(1.0,) * len(whole.models))
    merged = method.whole(same)
    np.testing.assert_allclose(merged, base, rtol=2e-7, atol=0)
    assert np.array_equal(*(narrowed(each, BFLOAT16).view(np.uint16) for each in (merged, base)))


@every
def test_a_model_with_itself_is_the_model(name: str) -> None:
    """Breaks when a mean of equals is not what they are. Methods of changes drop some, and are held to the base."""
    method = merger(name)
    if BASE in method.requires:
        pytest.skip("what is changed is trimmed, dropped or added up")
    whole = given(method)
    same = replace(whole, base=None, models=(whole.models[0],) * len(whole.models))
    np.testing.assert_allclose(method.whole(same), whole.models[0], rtol=1e-6, atol=1e-7)


@every
def test_the_order_does_not_matter_where_it_is_said_not_to(name: str) -> None:
    """Breaks when a merger of a set is one of a list; and where order is said to matter, it does."""
    method, whole = merger(name), given(merger(name))
    wanted = method.whole(whole)
    found = []
    for order in permutations(range(len(whole.models))):
        models, weights = (tuple(each[i] for i in order) for each in (whole.models, whole.weights))
        turned = replace(whole, models=models, weights=weights)  # type: ignore[arg-type]
        found.append(np.allclose(method.whole(turned), wanted, rtol=1e-5, atol=1e-6))
    if not method.ordered:
        assert all(found)


@every
def test_weights_of_zero_leave_the_base(name: str) -> None:
    """Breaks when a model that is to count nothing counts."""
    method = merger(name)
    if BASE not in method.requires or not _weighted(method):
        pytest.skip("it has no base to stay at, or no weights")
    whole = replace(given(method), weights=(0.0,) * len(given(method).models))
    np.testing.assert_allclose(method.whole(whole), whole.origin, rtol=0, atol=1e-6)


@every
def test_a_weighted_sum_is_one(name: str) -> None:
    """Breaks when a method that is said to be a weighted sum is none: of doubled models it is the double."""
    method, whole = merger(name), given(merger(name))
    twice = replace(whole, models=tuple(2 * rows for rows in whole.models), base=2 * whole.origin)
    if isinstance(method, WeightedSum):
        np.testing.assert_allclose(method.whole(twice), 2 * method.whole(whole), rtol=1e-5, atol=1e-6)


@every
def test_the_number_of_models_and_the_base_are_asked_for(name: str) -> None:
    """Breaks when one model too few is merged anyhow."""
    method = merger(name)
    fewest, most = method.models
    with pytest.raises(RecipeError, match=f"{name} was given {fewest - 1} model"):
        method.require(fewest - 1, base=True)
    if most is not None:
        with pytest.raises(RecipeError, match=f"{name} was given {most + 1} models"):
            method.require(most + 1, base=True)
    method.require(fewest, base=True)
    if BASE in method.requires:
        with pytest.raises(RecipeError, match="there is no base"):
            method.require(fewest, base=False)


@every
def test_what_is_told_is_plain(name: str) -> None:
    """Breaks when a tensor stands where JSON is written."""
    method, whole = merger(name), given(merger(name))
    seen: list[Sums] = []
    for _ in range(method.passes):
        seen.append(method.look(whole, seen))
    assert all(type(value) in (float, bool, int, str) for value in method.told(whole.weights, seen).values())


def _weighted(method: Merger) -> bool:
    whole = given(method, 2)
    one = method.whole(replace(whole, weights=(1.0, 0.0)))
    other = method.whole(replace(whole, weights=(0.0, 1.0)))
    return not np.array_equal(one, other)
