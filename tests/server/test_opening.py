"""What a name stands for when it is served: a run is its base and its adapter; a model alone is itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import open_named
from luthier.server.opening import Wanted, open_serving
from luthier.server.settings import Settings
from tests.cli.commands import colour_rows, luthier, recipe_text
from tests.server.fakes import TOKEN, Running, running


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_path: Callable[[str], Path]) -> Path:
    """A run of the tiny llama."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text(tiny_path("llama"), colour_rows(folder / "rows.jsonl")), encoding="utf-8")
    luthier("train", recipe, "--run", folder / "my-run", "--set", "optimizer.learning_rate=0.05", "--json").must(0)
    return folder / "my-run"


def settings(folder: Path) -> Settings:
    return Settings(token=TOKEN, port=0, state=folder / "state")


def said(listening: Running, model: str) -> str:
    body: dict[str, Any] = {"model": model, "prompt": "red and", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    with listening.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def spoken(name: str, **more: Any) -> str:
    opened = open_named(name, **more)
    [answer] = opened.engine.speak([opened.prompt("red and", raw=True)], Sampling(max_new_tokens=12))
    return opened.text(answer.tokens)


def test_a_run_is_its_base_and_its_adapter(trained: Path, tmp_path: Path, tiny_path: Callable[[str], Path]) -> None:
    base = tiny_path("llama").resolve().name
    with running(open_serving(Wanted(name=str(trained), tokens=2048), settings(tmp_path))) as listening:
        with listening.client() as client:
            cards = client.get("/v1/models").json()["data"]
        assert [(each["id"], each["parent"]) for each in cards] == [(base, None), ("my-run", base)]
        tuned, plain = said(listening, "my-run"), said(listening, base)
        assert tuned == said(listening, f"{base}:my-run") == spoken(str(trained))
        assert plain == spoken(str(tiny_path("llama"))) != tuned
        with listening.client() as client:
            assert client.post("/v1/unload_lora_adapter", json={"lora_name": "my-run"}).status_code == 404
            client.post("/lora-adapters", json=[{"id": 0, "scale": 1}])
            assert said(listening, base) == tuned


def test_a_model_with_an_adapter_is_the_same(trained: Path, tmp_path: Path, tiny_path: Callable[[str], Path]) -> None:
    wanted = Wanted(name=str(tiny_path("llama")), adapter=str(trained / "adapter"), tokens=2048)
    with running(open_serving(wanted, settings(tmp_path))) as listening:
        assert said(listening, "adapter") == spoken(str(trained))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mistral"])
def test_models_of_other_families_speak_too(kind: str, tmp_path: Path, tiny_path: Callable[[str], Path]) -> None:
    folder = tiny_path(kind)
    with running(open_serving(Wanted(name=str(folder), tokens=2048), settings(tmp_path))) as listening:
        assert said(listening, listening.serving.names.base) == spoken(str(folder))
