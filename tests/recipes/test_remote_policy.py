"""Rollouts by an engine somewhere else: it gets the weights as they change, is believed nothing, and may go away."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.core.errors import GateError, RecipeError
from luthier.core.knobs import validate
from luthier.infer.wire import RemoteError, UnavailableError
from luthier.model.speaker import PolicySampling
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.reinforcing.remote_policy import Policy, RemotePolicy
from luthier.recipes.schemas.reinforce import EngineKnobs
from tests import forests
from tests.adapters_of import rescaled
from tests.engines import Answer, Foreign, foreign

TEXTS = [np.array([2, *range(3 + 19 * i, 19 + 19 * i)], np.int32) for i in range(2)]
PROMPTS = [text[:5] for text in TEXTS]
SAMPLING = PolicySampling(max_new_tokens=6, seed=5)
TOKEN = "a-token-for-tests"


@pytest.fixture(scope="module")
def base(tiny_path: Callable[[str], Path]) -> Opened:
    """What the engine was started with."""
    return open_named(str(tiny_path("llama")), precision="float32")


@pytest.fixture
def policy(tiny_path: Callable[[str], Path]) -> Policy:
    """A fresh adapter, which changes nothing yet."""
    model = open_named(str(tiny_path("llama")), precision="float32").model
    method = LoRA(rank=4, alpha=8.0)
    return Policy(model, model.attach(method.attach(model.sites)), method, (1,))


@pytest.fixture
def engine(base: Opened) -> Iterator[Foreign]:
    """One that does as it is told."""
    with foreign(Foreign("vllm", {"": base}, token=TOKEN, opens=lambda path: honest(base, path))) as made:
        yield made


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_ENGINE_TOKEN", TOKEN)


def honest(base: Opened, path: str) -> Opened:
    return open_named(base.model.source, adapter=path, precision="float32")


def speaker(policy: Policy, engine: Foreign, folder: Path, **knobs: Any) -> RemotePolicy:
    values = {"url": engine.url, "adapters": str(folder), "patience": 0.0, **knobs}
    return RemotePolicy(policy, validate(EngineKnobs, values), TEXTS, run=folder / "mine")


def train(policy: Policy, seed: int = 2) -> None:
    """Some steps."""
    forests.shake(policy.attachment.named_parameters().values(), seed=seed, std=0.1)


def test_it_has_the_weights_as_they_are_and_nothing_is_left_of_it(
    policy: Policy, engine: Foreign, tmp_path: Path
) -> None:
    """Breaks when answers come from weights of another step, or adapters pile up on the engine."""
    before = policy.copied()
    said = speaker(policy, engine, tmp_path)
    said.require()
    for step in range(3):
        spoken = said.speak(PROMPTS, SAMPLING)
        whole = [np.concatenate([prompt, each.tokens]) for prompt, each in zip(PROMPTS, spoken, strict=True)]
        ours = policy.scores()(whole)
        for one, each in zip(ours, spoken, strict=True):
            assert each.log_probs == pytest.approx(one[-len(each.tokens) :], abs=1e-4)
        [name] = engine.loaded
        assert [each.name for each in tmp_path.iterdir()] == [name] and name.startswith("mine-")
        found = said.told()
        assert found["engine"] == name and found["apart"] < 1e-4 and said.told() == {}
        assert found["share"] == pytest.approx(1 if step else 0, abs=1e-2), "at first there is no change to have"
        if step == 0:
            assert all(torch.equal(each, before[where]) for where, each in policy.copied().items()), "the draft is gone"
        count = len(engine.asked)
        said.speak(PROMPTS[:1], SAMPLING)
        assert len(engine.asked) == count + 1, "weights that have not changed are not given again"
        train(policy, seed=step + 2)
    said.close()
    assert engine.loaded == [] and not list(tmp_path.iterdir())


def lies(base: Opened, folder: Path) -> dict[str, Callable[[str], Opened]]:
    """What engines do with adapters."""
    first: dict[str, Opened] = {}

    def stale(path: str) -> Opened:
        kind = "draft" if "draft" in path else "policy"
        return first.setdefault(kind, honest(base, path))

    def half(path: str) -> Opened:
        return honest(base, str(rescaled(Path(path), 0.5, folder / path.replace("/", "_"))))

    return {"ignores": lambda path: base, "halves": half, "stale": stale}


@pytest.mark.parametrize(
    ("lie", "steps", "told"),
    [("ignores", 1, "ignores the adapter"), ("halves", 1, "lora_alpha"), ("stale", 2, "as they were")],
)
def test_an_engine_that_computes_something_else_is_refused(
    lie: str, steps: int, told: str, policy: Policy, base: Opened, engine: Foreign, tmp_path: Path
) -> None:
    """Breaks when an adapter that is too young to show hides what the engine does with adapters."""
    engine.opens = lies(base, tmp_path)[lie]
    folder = tmp_path / "adapters"
    folder.mkdir()
    said = speaker(policy, engine, folder)
    for step in range(steps - 1):
        train(policy, seed=step)
        said.speak(PROMPTS, SAMPLING)
        train(policy, seed=9)
    with pytest.raises(GateError, match=told) as caught:
        said.speak(PROMPTS, SAMPLING)
    assert caught.value.exit_code == 78
    said.close()
    assert engine.loaded == [] and not list(folder.iterdir())


def test_another_base_is_refused(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    other = open_named(policy.model.source, precision="float32")
    forests.shake(other.model.module.parameters(), seed=3, std=0.02)
    engine.models[""] = other
    with pytest.raises(GateError, match="its base is not ours"):
        speaker(policy, engine, tmp_path).speak(PROMPTS, SAMPLING)


def test_answers_that_are_none_are_not_trained_on(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    spoils: dict[str, Callable[[Any], Any]] = {
        "nan": lambda told: {**told, "token_logprobs": [math.nan] * 6},
        "what vllm answers there": lambda told: {**told, "token_logprobs": None},
        "6 log-probabilities of 5": lambda told: {**told, "tokens": told["tokens"][:-1]},
        "said 3 tokens": lambda told: {key: value[:3] for key, value in told.items()},
    }
    said = speaker(policy, engine, tmp_path, patience=60.0)
    said.speak(PROMPTS, SAMPLING)
    for told, spoil in spoils.items():

        def script(path: str, body: Any, spoil: Callable[[Any], Any] = spoil) -> Answer:
            status, answer = engine.answer(path, body)
            if path == "/v1/completions":
                answer["choices"][0]["logprobs"] = spoil(answer["choices"][0]["logprobs"])
            return status, answer

        engine.script = script
        with pytest.raises(RemoteError, match=told):
            said.speak(PROMPTS[:1], SAMPLING)


def test_who_is_away_for_a_while_is_waited_for(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when one answer that was refused ends a run, or an engine that was started anew is asked for an adapter
    that it has lost."""
    said = speaker(policy, engine, tmp_path, patience=30.0)
    said.patience = replace(said.patience, pause=0.01)
    plain = said.speak(PROMPTS, SAMPLING)
    states = iter([(429, {"error": {"message": "too many"}}), (503, "draining")])

    def script(path: str, body: Any) -> Answer:
        return next(states, None) or engine.answer(path, body)

    engine.script = script
    again = said.speak(PROMPTS, SAMPLING)
    assert [each.tokens.tolist() for each in again] == [each.tokens.tolist() for each in plain]
    assert next(states, None) is None
    engine.loaded.clear()
    anew = said.speak(PROMPTS, SAMPLING)
    assert [each.tokens.tolist() for each in anew] == [each.tokens.tolist() for each in plain]
    assert len(engine.loaded) == 1


def test_who_stays_away_is_not_waited_for_for_ever(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    said = speaker(policy, engine, tmp_path, patience=0.05)
    said.patience = replace(said.patience, pause=0.01)
    said.speak(PROMPTS, SAMPLING)
    engine.script = lambda path, body: (503, "no engine")
    with pytest.raises(UnavailableError, match="again and again for 0.05 seconds"):
        said.speak(PROMPTS, SAMPLING)
    said.close()
    assert not list(tmp_path.iterdir()), "what was written here goes, whether the engine is there or not"


def test_a_wrong_token_is_told_at_once(
    policy: Policy, engine: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_ENGINE_TOKEN", "another-one")
    with pytest.raises(RemoteError, match="takes another token") as caught:
        speaker(policy, engine, tmp_path, patience=60.0).require()
    assert "another-one" not in str(caught.value)


def test_log_probabilities_before_temperature_are_refused(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when what an engine tells of its own logits is taken for the policy at a temperature."""
    with pytest.raises(GateError, match="before temperature"):
        speaker(policy, engine, tmp_path).speak(PROMPTS, PolicySampling(max_new_tokens=6, temperature=1.6, seed=1))


def test_what_a_killed_process_left_there_goes(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    speaker(policy, engine, tmp_path).speak(PROMPTS, SAMPLING)
    left = list(engine.loaded)
    train(policy)
    speaker(policy, engine, tmp_path).speak(PROMPTS, SAMPLING)
    assert len(engine.loaded) == 1 and engine.loaded != left


def test_what_no_engine_can_be_given(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_named(str(tiny_path("llama")), precision="float32").model
    full = Policy(model, model.attach(Full().attach(model.sites)), Full(), (1,))
    with pytest.raises(RecipeError, match="trains the base's own weights"):
        RemotePolicy(full, EngineKnobs(url="http://127.0.0.1:9", adapters="x"), TEXTS, run=tmp_path)
    with pytest.raises(RecipeError, match="adapters is empty"):
        validate(EngineKnobs, {"url": "http://127.0.0.1:9"})
    with pytest.raises(RecipeError, match="url is empty, and dialect is set"):
        validate(EngineKnobs, {"dialect": "sglang"})
    assert validate(EngineKnobs, json.loads(json.dumps(EngineKnobs().model_dump()))) == EngineKnobs()


def test_noise_that_shows_is_the_least(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when the draft is so far away that rounding is large too, or does not show at all."""
    said = speaker(policy, engine, tmp_path)
    base = np.concatenate(policy.scores(bare=True)(said.texts))
    with policy.having(said._draft()):
        moved = np.abs(np.concatenate(policy.scores()(said.texts)) - base).mean()
    assert 0.2 <= moved < 2
