"""The catalog and the words of errors, on small families made here."""

from __future__ import annotations

import copy
import pickle

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
