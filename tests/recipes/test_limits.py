"""What a run is told of the machine's limit, and how it is shown beside what was reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.recipes.bench import lay_out
from luthier.recipes.schemas.files import load_recipe
from tests.cli.commands import luthier


def test_the_plan_and_the_summary_tell_the_limit(recipe: Path, finished: Path) -> None:
    """Breaks when nobody can see how far a run was from what the machine allows."""
    speed = lay_out(load_recipe(recipe).recipe).plan["speed"]
    assert speed["dtype"] == "float32" and speed["flops_per_token"] > 0
    by_products = speed["flops_per_second"] / speed["flops_per_token"]
    by_memory = speed["bytes_per_second"] / speed["bytes_per_token"]
    assert speed["tokens_per_second"] == pytest.approx(min(by_products, by_memory))
    said = luthier("train", recipe, "--dry-run").must(0)
    assert "at most" in said.out and "FLOP a token" in " ".join(said.out.split())
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    planned = json.loads((finished / "plan.json").read_text("utf-8"))["speed"]
    assert summary["share_of_limit"] == pytest.approx(summary["tokens_per_second"] / planned["tokens_per_second"])
    report = (finished / "report.html").read_text("utf-8").replace("&#39;", "'")
    assert "of the machine's limit" in report
