"""Every method on every model is for `make slow`; here is which of these cases each test run takes.

Each method meets the models of `always`, and of the others one in turn, so that each of both sides is there in every
run: what a model has of its own (a fused weight, a bias, a window, tied embeddings) breaks methods by the family, and
what a method has of its own breaks on the plainest model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def crossed(methods: Iterable[Any], models: Sequence[Any], *, always: Sequence[Any]) -> list[ParameterSet]:
    """All pairs; those that not every run takes are marked slow."""
    others = [model for model in models if model not in always]
    cases = []
    for turn, method in enumerate(methods):
        quick = [*always, *(others[turn % len(others)] for _ in others[:1])]
        cases += [case(method, model, quick=model in quick) for model in models]
    return cases


def case(*values: Any, quick: bool) -> ParameterSet:
    """A case of every run, or one that is marked slow."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)
