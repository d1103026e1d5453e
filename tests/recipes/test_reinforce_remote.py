"""A run whose rollouts come from an engine somewhere else: from the command to its proof, and when the engine dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.recipes.opening.opened import open_named
from luthier.recipes.reinforcing import remote_policy
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from tests.cli.commands import events, luthier
from tests.engines import Answer, Foreign, foreign
from tests.server.fakes import TOKEN, Running, running

RECIPE: dict[str, Any] = {
    "recipe": "reinforce",
    "reward": {"method": "length", "most_tokens": 6, "buffer_tokens": 4},
    "rollouts": {"prompts": 2, "answers": 3, "max_new_tokens": 6, "lag": 1},
    "objective": {"method": "ppo", "passes": 1},
    "budget": {"steps": 3},
    "evaluation": {"fraction": 0},
    "checkpoint": {"every": 2},
    "precision": "float32",
}


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_ENGINE_TOKEN", TOKEN)
    monkeypatch.setattr(remote_policy, "PROBED", 1)


@pytest.fixture
def engine(llama: Path) -> Iterator[Foreign]:
    base = open_named(str(llama), precision="float32")
    opens = lambda path: open_named(str(llama), adapter=path, precision="float32")  # noqa: E731
    with foreign(Foreign("vllm", {"": base}, token=TOKEN, opens=opens)) as made:
        yield made


@pytest.fixture
def server(llama: Path, tmp_path: Path) -> Iterator[Running]:
    """Our own, which reads adapters below a folder."""
    (tmp_path / "adapters").mkdir()
    settings = Settings(token=TOKEN, port=0, adapters=tmp_path / "adapters", state=tmp_path / "state")
    own = open_named(str(llama), precision="float32")
    with running(serve_opened(own, settings, base="base", tokens=4096)) as listening:
        yield listening


def recipe_with(llama: Path, folder: Path, url: str, *, dialect: str = "vllm", **more: Any) -> Path:
    rows = [{"prompt": f"What colour has thing {number}?", "answer": "red"} for number in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "adapters").mkdir(exist_ok=True)
    engine = {"url": url, "dialect": dialect, "adapters": str(folder / "adapters"), "patience": 0.0, "at_once": 1}
    values = {**RECIPE, "model": str(llama), "data": {"train": str(folder / "prompts.jsonl")}, **more}
    values["rollouts"] = {**values["rollouts"], "engine": engine}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def told(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of some kinds, without times."""
    return [
        {key: value for key, value in event.items() if "seconds" not in key and key != "time"}
        for event in events(folder) if event["kind"] in kinds
    ]  # fmt: skip


@pytest.mark.slow
def test_our_own_server_makes_the_rollouts_of_a_run(llama: Path, server: Running, tmp_path: Path) -> None:
    """Breaks when a run is sampled by other weights than it trains, or leaves its adapters where they were."""
    objective = {"method": "ppo", "temperature": 1.3, "passes": 1}
    recipe = recipe_with(llama, tmp_path, server.url, dialect="luthier", objective=objective)
    dry = luthier("train", recipe, "--run", tmp_path / "run", "--dry-run").must(0)
    assert f"luthier at {server.url}" in dry.out
    luthier("train", recipe, "--run", tmp_path / "run", "--json").must(0)
    steps, rollouts, found = (told(tmp_path / "run", kind) for kind in ("step", "rollout", "engine"))
    assert max(step["mismatch_most"] for step in steps if step["step"] == 1) < 1e-3
    assert all(step["correction"] == pytest.approx(1, abs=0.05) for step in steps)
    assert [one["version"] for one in rollouts] == [0, 0, 1], "each but the first is a rollout behind"
    assert len({one["engine"] for one in found}) == len(found) == 2 and all(one["apart"] < 1e-3 for one in found)
    assert server.serving.names.all == ["base"] and not list((tmp_path / "adapters").iterdir())


@pytest.mark.slow
def test_where_the_engine_dies_nothing_is_lost(llama: Path, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when a rollout that failed half-way is in the checkpoint, or one that waits in it is sampled again."""
    recipe = recipe_with(llama, tmp_path, engine.url)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    luthier("train", recipe, "--run", whole, "--json").must(0)
    assert not engine.loaded
    answers = [body for path, _, body in engine.asked if path == "/v1/completions" and len(body["prompt"]) > 1]
    engine.asked.clear()
    left = iter(range(len(answers) * 2 // 3))

    def dies(path: str, body: Any) -> Answer:
        alive = path != "/v1/completions" or next(left, None) is not None
        return engine.answer(path, body) if alive else (503, {"error": {"message": "no engine"}})

    engine.script = dies
    said = luthier("train", recipe, "--run", broken).must(75, "answered 503: no engine", "everything is saved")
    assert f"luthier resume {broken}" in said.err and TOKEN not in said.err
    assert told(broken, "step") and told(broken, "step") == told(whole, "step")[: len(told(broken, "step"))]
    engine.script = None
    luthier("resume", broken, "--json").must(0)
    assert told(broken, "step", "rollout", "evaluation") == told(whole, "step", "rollout", "evaluation")
    name = "adapter/adapter_model.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_wrong_is_told_before_a_run_is_made(llama: Path, engine: Foreign, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_with(llama, tmp_path, engine.url, adapter={"method": "full"})
    luthier("train", recipe, "--run", run).must(2, "trains the base's own weights", "lora")
    recipe = recipe_with(llama, tmp_path, "http://127.0.0.1:9")
    luthier("train", recipe, "--run", run).must(69, "cannot be asked", "start the engine")
    engine.token = "another"
    recipe = recipe_with(llama, tmp_path, engine.url)
    luthier("train", recipe, "--run", run).must(69, "LUTHIER_ENGINE_TOKEN")
    assert not run.exists()
