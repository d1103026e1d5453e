"""The probe tells what an engine computes: ours, the base, another strength, other weights, another base, or noise."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import GateError, RecipeError
from luthier.infer.dialects import Dialect, dialect_named
from luthier.infer.sync import Distance, Sync, probe
from luthier.infer.wire import Wire
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.own_scores import scores_by
from tests.adapters_of import adapter_folder, moved, rescaled
from tests.engines import Foreign, foreign

KINDS = ("vllm", "sglang", "llama.cpp")
TEXTS = [np.array([2, *range(3 + 19 * i, 27 + 19 * i), 1], np.int32) for i in range(3)]
"""Tokens that stand for rows."""
SAID = 5


@pytest.fixture(scope="module")
def models(tiny_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """What an engine may compute for our adapter."""
    base, place = tiny_path("llama"), tmp_path_factory.mktemp("adapters")
    good = adapter_folder(base, place / "good")
    folders = {"good": good, "half": rescaled(good, 0.5, place / "half"), "twice": rescaled(good, 2, place / "twice"),
               "stale": moved(good, 0.3, place / "stale")}  # fmt: skip
    found = {name: open_named(str(base), adapter=str(folder), precision="float32") for name, folder in folders.items()}
    found["base"] = open_named(str(base), precision="float32")
    found["other"] = open_named(str(base), precision="float32")
    found["rounded"] = open_named(str(base), adapter=str(good), precision="float32")
    for name, size in (("other", 0.2), ("rounded", 2e-4)):
        noise = torch.Generator().manual_seed(3)
        for each in found[name].model.module.parameters():
            each.data += size * each.data.std() * torch.randn(each.shape, generator=noise)
    return found


def found(models: dict[str, Opened], kind: str, has: str, *, base: str = "base", bare: bool = False) -> Sync:
    engine = Foreign(kind, {"": models[base], "mine": models[has]}, loaded=["mine"])
    with foreign(engine):
        good = models["good"]
        ours, plain = scores_by(good.model), None if bare else scores_by(good.model, bare=True)
        return probe(dialect_named(kind, Wire(engine.url)), "mine", TEXTS, ours=ours, base=plain, said=SAID)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_computes_ours_is_let_pass(models: dict[str, Opened], kind: str) -> None:
    sync = found(models, kind, "good")
    assert sync.fine and sync.wrong == "", sync
    assert sync.apart.worst < 1e-4 and sync.base is not None and sync.base.worst < 1e-4
    assert sync.share == pytest.approx(1, abs=1e-3) and sync.from_base is not None and sync.from_base.mean > 0.05
    assert sync.tokens == 3 * SAID + (0 if kind == "llama.cpp" else 3 * 25)
    sync.require()


def slowly(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "has", "told"),
    [
        ("vllm", "base", "ignores the adapter"), ("llama.cpp", "base", "ignores the adapter"),
        slowly("sglang", "base", "ignores the adapter"), ("vllm", "half", "as with another lora_alpha"),
        slowly("sglang", "half", "differ|from ours"), slowly("llama.cpp", "half", "differ|from ours"),
        slowly("vllm", "twice", "differ|from ours"), ("vllm", "stale", "another step"),
        slowly("vllm", "other", "differ|from ours"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(models: dict[str, Opened], kind: str, has: str, told: str) -> None:
    sync = found(models, kind, has)
    assert re.search(told, sync.wrong) and not sync.fine, sync
    with pytest.raises(GateError, match="does not compute mine") as caught:
        sync.require()
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("kind", ["vllm", slowly("llama.cpp")])
def test_another_base_is_told_first(models: dict[str, Opened], kind: str) -> None:
    assert "its base is not ours" in found(models, kind, "good", base="other").wrong


def test_rounding_passes(models: dict[str, Opened]) -> None:
    sync = found(models, "vllm", "rounded", base="rounded")
    # The base beside it is rounded too; its adapter is on it, so it stands for the base with the adapter off.
    assert sync.apart.mean > 1e-5
    assert replace(sync, base=sync.apart).fine, sync


def test_a_model_without_an_adapter_is_compared_as_it_is(models: dict[str, Opened]) -> None:
    assert found(models, "vllm", "good", bare=True).fine
    sync = found(models, "vllm", "other", bare=True)
    assert "another model" in sync.wrong and sync.share is None


def test_an_adapter_too_small_to_see_is_not_taken_on_trust() -> None:
    """Breaks when an engine that ignores an adapter passes because the adapter does nothing that shows."""
    sync = Sync(model="m", texts=1, tokens=100, tolerance=0.05, apart=Distance(0.01, 0.012, 0.03),
                from_base=Distance(0.01, 0.012, 0.03), base=Distance(0.01, 0.012, 0.03),
                effect=Distance(0.001, 0.001, 0.002), share=0.8, error=1.2)  # fmt: skip
    assert "nobody can tell" in sync.wrong


def test_weights_of_before_are_told(models: dict[str, Opened]) -> None:
    """Breaks when an engine that goes on with the adapter of the last step passes for the one of this step."""
    engine = Foreign("vllm", {"": models["base"], "mine": models["stale"]}, loaded=["mine"])
    new, old = models["good"], models["stale"]
    with foreign(engine):
        dialect: Dialect = dialect_named("vllm", Wire(engine.url))
        scores = {"ours": scores_by(new.model), "base": scores_by(new.model, bare=True), "before": scores_by(old.model)}
        sync = probe(dialect, "mine", TEXTS[:2], **scores, said=SAID)
        assert "as they were" in sync.wrong and sync.renewed == pytest.approx(0, abs=1e-3)
        engine.models["mine"] = new
        sync = probe(dialect, "mine", TEXTS[:2], **scores, said=SAID)
        assert sync.fine and sync.renewed == pytest.approx(1, abs=1e-3)


ROUNDED = Distance(0.006, 0.009, 0.04)
"""What bfloat16 makes of equal models."""


def small(share: float, effect: float, *, apart: float = 0.009, proved: bool = False) -> Sync:
    """What is found of a small adapter by an engine that rounds."""
    return Sync(model="m", texts=4, tokens=400, tolerance=0.05, apart=Distance(apart * 0.7, apart, 4 * apart),
                from_base=Distance(effect, effect, effect), base=ROUNDED, effect=Distance(effect, effect, effect),
                share=share, error=0.03, proved=proved)  # fmt: skip


def test_rounding_of_ours_is_no_fault_of_theirs() -> None:
    """Breaks when an adapter that has hardly been trained is refused because our own rounding is a part of its change,
    or when that is let pass of one that shows."""
    assert small(0.76, 0.02).fine, "measured: a seedling after one step, served in bfloat16 by the same code"
    assert "otherwise" in small(0.76, 0.2).wrong and "otherwise" in small(0.5, 0.02, apart=0.1).wrong
    assert "otherwise" in small(0.3, 0.02).wrong and small(0.3, 0.02, proved=True).fine
    assert "otherwise" in small(0.3, 0.2, apart=0.14, proved=True).wrong


def test_a_probe_needs_something_to_compare(models: dict[str, Opened]) -> None:
    with pytest.raises(RecipeError, match="texts of two tokens"):
        probe(dialect_named("vllm", Wire("http://127.0.0.1:9")), "x", [TEXTS[0][:1]], ours=lambda _t: [], base=None)


def test_figures_are_plain_values(models: dict[str, Opened]) -> None:
    values = found(models, "vllm", "base").as_dict()
    assert values["fine"] is False and values["apart"]["mean"] > 0 and abs(values["share"]) < 0.01
