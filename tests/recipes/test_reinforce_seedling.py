"""The seedling learns to add by what its own answers are worth: hardly one held-out sum right before, most after.

The recipe is `SUMS`, the rows are all sums of a number of two digits and 1 to 4 without a carry; a fifth is held out.
Measured with seed 0 and one thread, beside another process (`luthier train sums.yaml`, both files as `write_sums` has
them): of 54 held-out sums 0 are right before, 20 after 100 steps, 49 after 200 and 50 (93 %) after all 300, 224 s after
the first evaluation; held-out reward 0.18 to 0.95. What makes the difference to earlier recipes (42 right): groups
that are alike are drawn again, the temperature is higher, so that the reward for being nearly right does not end the
search, and the learning rate is twice as high (with half of it 45 are right after 300 steps).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from luthier.model.files.sources import SEEDLING, resolve_source
from tests.cli.commands import environ, events, luthier

SUMS = """
recipe: reinforce
model: seedling
data: {train: sums.jsonl}
reward:
  - {method: numeric, name: right, weight: 0.7}
  - {method: numeric, name: within_1, absolute: 1, weight: 0.15}
  - {method: numeric, name: within_3, absolute: 3, weight: 0.15}
rollouts: {prompts: 16, answers: 16, max_new_tokens: 6, redraws: 2}
objective: {method: grpo, longest: 4, temperature: 1.6, beta: 0.02}
adapter: {method: lora, rank: 16, alpha: 32}
optimizer: {method: adamw, learning_rate: 2.0e-3}
schedule: {method: cosine}
budget: {steps: 300}
evaluation: {fraction: 0.2, every: 50, max_rows: 60}
checkpoint: {every: 0}
precision: float32
"""

pytestmark = pytest.mark.skipif(
    not (Path(resolve_source(SEEDLING)) / "model.safetensors").is_file(), reason="the seedling has no weights"
)


def write_sums(folder: Path, **changed: object) -> Path:
    """The rows and the recipe."""
    rows = [
        {"prompt": f"What is {number} + {more}?", "answer": str(number + more)}
        for number in range(10, 100) for more in range(1, 5) if number % 10 + more < 10
    ]  # fmt: skip
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {**yaml.safe_load(SUMS), "data": {"train": str(folder / "sums.jsonl")}, **changed}
    (folder / "sums.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "sums.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_seedling_learns_to_add(tmp_path: Path) -> None:
    """Breaks when reinforcement learning from end to end does not learn what can be learned."""
    luthier("train", write_sums(tmp_path), "--run", tmp_path / "run", "--json").must(0)
    held = [event for event in events(tmp_path / "run") if event["kind"] == "evaluation"]
    assert held[0]["right"] < 0.2
    assert held[0]["reward"] < 0.2
    assert max(event["right"] for event in held) > 0.8
    assert max(event["reward"] for event in held) > 0.8


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """`luthier serve seedling` in a process of its own, which reads adapters below the folder; its address."""
    words = [sys.executable, "-c", "from luthier.cli.main import main; main()", "serve", "seedling", "--port", "0",
             "--adapters", str(folder), "--state", str(folder / "state"), "--precision", "float32",
             "--json"]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environ()) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["url"])
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_another_process_samples_as_well_as_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when what an engine elsewhere samples teaches less than what is sampled here; the random numbers of the
    two differ, so they only learn alike."""
    for name in ("LUTHIER_TOKEN", "LUTHIER_ENGINE_TOKEN"):
        monkeypatch.setenv(name, "a-token-for-tests")
    shorter = {"budget": {"steps": 40}, "evaluation": {"fraction": 0.2, "every": 0, "max_rows": 60}}
    rollouts = {"prompts": 8, "answers": 8, "max_new_tokens": 6, "redraws": 2}
    gains: dict[str, float] = {}
    with served(tmp_path) as url:
        for name, engine in (("here", {}), ("there", {"url": url, "dialect": "luthier", "adapters": str(tmp_path)})):
            recipe = write_sums(tmp_path, rollouts={**rollouts, "engine": engine}, **shorter)
            luthier("train", recipe, "--run", tmp_path / name, "--json").must(0)
            held = [event["reward"] for event in events(tmp_path / name) if event["kind"] == "evaluation"]
            gains[name] = held[-1] - held[0]
    assert min(gains.values()) > 0.05 and abs(gains["here"] - gains["there"]) < 0.1
    steps = [event for event in events(tmp_path / "there") if event["kind"] == "step"]
    assert max(step["mismatch"] for step in steps) < 1e-3


def test_some_of_its_own_sums_are_right_before_it_has_learned_anything(tmp_path: Path) -> None:
    """Breaks when the task gives nothing to begin with: the few right answers of the first rollout are what is learned
    from."""
    recipe = write_sums(
        tmp_path, budget={"steps": 2}, rollouts={"prompts": 8, "answers": 8, "max_new_tokens": 6},
        evaluation={"fraction": 0.2, "every": 0, "max_rows": 8},
    )  # fmt: skip
    luthier("train", recipe, "--run", tmp_path / "run", "--json").must(0)
    first = next(event for event in events(tmp_path / "run") if event["kind"] == "rollout")
    assert 0 < first["parts"]["right"] < 0.2 and first["alike"] < first["groups"]
