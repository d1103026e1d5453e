"""The catalog and the words of errors, on small families made here."""

from __future__ import annotations

import copy
import pickle
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from luthier.core import catalog
from luthier.core.errors import LuthierError, RecipeError
from luthier.core.knobs import Knobs, validate
from luthier.core.nearest import did_you_mean, nearest


class Small(Knobs):
    rank: int = Field(4, ge=1, description="rank")

    @model_validator(mode="after")
    def _even(self) -> Small:
        if self.rank % 2:
            raise RecipeError(f"rank {self.rank} is odd", allowed="even ranks")
        return self


class Large(Knobs):
    small: Small = Field(default_factory=Small, description="inner")
    name: str = Field(description="name")


def test_every_problem_is_told_with_its_path() -> None:
    with pytest.raises(RecipeError) as caught:
        validate(Large, {"small": {"rnk": 3}})
    assert str(caught.value) == "unknown key small.rnk; did you mean rank?; name is missing"
    # Where each problem says what to do, nothing general follows it.
    assert caught.value.do == ""
    with pytest.raises(RecipeError) as known:
        validate(Large, {"small": {"rnk": 3}, "nam": "x", "name": "x"})
    assert known.value.told() == "unknown key small.rnk; did you mean rank?; unknown key nam; did you mean name?"
    with pytest.raises(RecipeError, match="lora.name is missing"):
        validate(Large, {}, where="lora")
    with pytest.raises(RecipeError, match="small: rank 3 is odd; even ranks"):
        validate(Large, {"small": {"rank": 3}, "name": "x"})


def test_strict_values_are_not_converted() -> None:
    with pytest.raises(RecipeError, match="rank: '4' is not allowed"):
        validate(Small, {"rank": "4"})


def test_unknown_methods_and_families_name_the_nearest() -> None:
    assert "lora" in catalog.names("adapters")
    with pytest.raises(RecipeError, match="did you mean lora"):
        catalog.card("adapters", "lorra")
    with pytest.raises(RecipeError, match="did you mean adapters"):
        catalog.names("adapter")
    assert ("adapters", "lora") in catalog.find("lora")
    assert catalog.card("adapters", "lora").title.startswith("LoRA")


def test_nearest_names() -> None:
    assert nearest("Rnak", ["rank", "alpha"]) == ["rank"]
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "none is known"


def kinds(kind: type[LuthierError]) -> list[type[LuthierError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in kinds(child))]


@pytest.mark.parametrize("kind", [k for k in kinds(LuthierError) if k.__module__ == "luthier.core.errors"])
def test_errors_travel_whole(kind: type[LuthierError]) -> None:
    error = kind("came", allowed="this", do="that", where="a:1")
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is kind
        assert other.as_dict() == error.as_dict()
    assert str(error) == "a:1: came; this; that"
    assert kind.exit_code in {1, 2, 65, 69, 71, 74, 75, 76, 77, 78}


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in kinds(LuthierError) if kind.__module__ == "luthier.core.errors"]
    assert len(codes) == len(set(codes))


class Choices(Knobs):
    blocks: Literal["auto", "none"] | Annotated[int, Field(ge=0)] = Field("auto", description="a word or a number")
    files: str | Annotated[tuple[str, ...], Field(strict=False)] = Field("", description="one or several")
    ranks: dict[str, Annotated[int, Field(ge=1)]] | None = Field(None, description="by name")


class Chooses(Knobs):
    inner: Choices = Field(default_factory=Choices, description="inner")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"blocks": -1}, "inner.blocks: -1 is not allowed: input should be 'auto' or 'none', or greater than or equal "
         "to 0"),
        ({"blocks": "nne"}, "inner.blocks: 'nne' is not allowed: input should be 'auto' or 'none', or a valid integer"),
        ({"files": 3}, "inner.files: 3 is not allowed: input should be a valid string, or a valid tuple"),
        ({"files": ["a", 3]}, "inner.files.1: 3 is not allowed: input should be a valid string"),
        ({"ranks": {"q": 0}}, "inner.ranks.q: 0 is not allowed: input should be greater than or equal to 1"),
    ],
)
def test_a_key_that_takes_several_kinds_is_told_by_its_own_name_and_once(values: dict[str, Any], told: str) -> None:
    """Breaks when the library's names for the kinds stand for keys of a recipe."""
    with pytest.raises(RecipeError) as caught:
        validate(Chooses, {"inner": values})
    assert str(caught.value).endswith(told) and str(caught.value).count("inner.blocks") <= 1
