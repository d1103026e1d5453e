"""The benchmarks are scripts that import their neighbours by plain name."""

from __future__ import annotations

import pytest

from tests.benchmarks.lines import BENCHMARKS


@pytest.fixture(autouse=True)
def flat_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
