"""Rollouts by an engine somewhere else: it gets the weights as they change, is believed nothing, and may go away."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.core.errors import CorruptError, DataError, GateError, RecipeError, StoppedError
from luthier.core.events import Event
from luthier.core.knobs import validate
from luthier.data.conversation import Message
from luthier.data.forest import Ints
from luthier.data.rollouts import Prompt
from luthier.infer.wire import RemoteError, UnavailableError
from luthier.model.speaker import PolicySampling, Spoken
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.progress import event_line
from luthier.recipes.reinforcing.remote_policy import Policy, RemotePolicy
from luthier.recipes.schemas.reinforce import EngineKnobs
from luthier.rewards import Score, Turn
from luthier.train.episodes import Episodes
from luthier.train.flight import Flight
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
        validate(EngineKnobs, {"url": "http://127.0.0.1:9"}).require_folder()
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


def test_pinned_weights_are_said_with_whatever_the_policy_has_become(
    policy: Policy, engine: Foreign, tmp_path: Path
) -> None:
    """Breaks when a rollout that is under way, or is sampled again by another process, is that of other weights."""
    train(policy)
    said = speaker(policy, engine, tmp_path)
    pinned = said.pinned(SAMPLING)
    plain = pinned.speak(PROMPTS, SAMPLING)
    train(policy, seed=5)
    now = policy.copied()
    assert said_of(pinned.speak(PROMPTS, SAMPLING)) == said_of(plain)
    engine.loaded.clear()
    with pytest.raises(RemoteError, match="has lost the adapter"):
        pinned.speak(PROMPTS, SAMPLING)
    assert pinned.lost
    other = speaker(policy, engine, tmp_path)
    for again in (said.pinned(SAMPLING, pinned.weights), other.pinned(SAMPLING, pinned.weights)):
        assert said_of(again.speak(PROMPTS, SAMPLING)) == said_of(plain) and not again.lost
    assert all(torch.equal(each, now[name]) for name, each in policy.copied().items())
    assert said_of(other.speak(PROMPTS, SAMPLING)) != said_of(plain)
    broken = {name: each[:-1] for name, each in pinned.weights.items()}
    with pytest.raises(CorruptError, match="bytes of"):
        said.pinned(SAMPLING, broken)


def said_of(spoken: list[Spoken]) -> list[list[int]]:
    return [each.tokens.tolist() for each in spoken]


def test_what_is_under_way_can_be_broken_off(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when a run that ends waits for an engine that does not answer, or leaves its adapter there."""
    said = speaker(policy, engine, tmp_path, patience=60.0)
    pinned = said.pinned(SAMPLING)
    asked, go = threading.Event(), threading.Event()

    def slow(path: str, body: Any) -> Answer:
        if path == "/v1/completions":
            asked.set()
            go.wait(60)
        return engine.answer(path, body)

    engine.script = slow
    flight = Flight(lambda: pinned.speak(PROMPTS, SAMPLING), said.waits)
    assert asked.wait(60)
    said.end()
    flight.join(60)
    with pytest.raises(StoppedError, match="not waited for any more"):
        flight.result()
    go.set()
    said.close()
    assert engine.loaded == [] and not list(tmp_path.iterdir())


class Riddles:
    """Two turns: a reply to the first answer, and a score for the second."""

    def reset(self, prompt: tuple[Message, ...], facts: Mapping[str, Any], *, seed: int) -> Riddle:
        return Riddle()


class Riddle:
    tools = ()
    messages = (Message("user", "a b"),)

    def __init__(self) -> None:
        self.heard = 0

    def step(self, answer: Message) -> Turn:
        self.heard += 1
        return Turn((Message("user", "c d"),)) if self.heard == 1 else Turn(done=True, score=Score(1.0))


def ids(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
    """A template: each letter is a token, 1 ends a turn."""
    words = [[3 + ord(letter) % 60 for letter in each.content if letter not in " x"] for each in messages]
    return np.array([2, *(token for each in words for token in (*each, 1))], np.int32)


def test_exchanges_of_several_turns_are_those_of_this_process(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when an engine is asked to go on with other ids than it has said, a reply is counted as said, or turns are
    drawn with other seeds than here."""
    train(policy)
    # Seldom does a tiny model end by itself: these tokens all end an answer.
    stops = tuple(range(1, 128, 3))
    sampling = PolicySampling(max_new_tokens=24, seed=5, stop_ids=stops)
    episodes = Episodes(Riddles(), ends(stops), lambda tokens: " ".join(map(str, tokens.tolist())))
    prompts = [Prompt(np.zeros(1, np.int32))] * 3
    played = episodes.play(prompts, speaker(policy, engine, tmp_path), sampling, seeds=[0, 0, 0])
    assert [each.verdict for each in played] == [Score(1.0)] * 3 and all(not each.answer.own.all() for each in played)
    texts = [np.concatenate([each.prompt.tokens, each.answer.tokens]) for each in played]
    for each, found in zip(played, policy.scores()(texts), strict=True):
        own = each.answer.own
        told = np.array(found[-len(own) :], np.float32)
        np.testing.assert_allclose(each.answer.sampled[own], told[own], atol=1e-4)
        assert not each.answer.sampled[~own].any()
    asked = [body["prompt"] for path, _, body in engine.asked if path == "/v1/completions" and not body.get("echo")]
    for each in played:
        second = int(np.flatnonzero(~each.answer.own)[-1]) + 1
        assert [*each.prompt.tokens.tolist(), *each.answer.tokens[:second].tolist()] in asked


def ends(stops: tuple[int, ...]) -> Callable[..., Ints]:
    """The template, with every token that ends an answer behind it, as no template would have them."""

    def prompt_ids(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        if len(messages) < 3:
            return ids(messages[:1])
        return np.concatenate([ids(messages[:1]), np.array(stops, np.int32), ids(messages[2:])])

    return prompt_ids


def test_an_answer_that_outgrows_the_engine_is_cut_off(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when an engine with a shorter context than ours ends a run by refusing what it has no room for."""

    def short(path: str, body: Any) -> Answer:
        status, answer = engine.answer(path, body)
        if path == "/v1/models":
            answer["data"][0]["max_model_len"] = 8
        if path == "/v1/completions" and not body.get("echo") and len(body["prompt"]) + body["max_tokens"] > 8:
            return 400, {"error": {"message": "This model's maximum context length is 8 tokens."}}
        return status, answer

    said = speaker(policy, engine, tmp_path)
    said.speak(PROMPTS[:1], SAMPLING)
    engine.script = short
    with pytest.raises(RemoteError, match="maximum context length is 8 tokens"):
        said.speak(PROMPTS, SAMPLING)
    short_one = speaker(policy, engine, tmp_path)
    short_one.require()
    assert short_one.context == 8
    # What is probed at the hand-over has room in any engine that can be used.
    engine.script = None
    short_one.pinned(SAMPLING)
    engine.script = short
    assert [len(each.tokens) for each in short_one.speak(PROMPTS, SAMPLING)] == [3, 3]
    with pytest.raises(DataError, match="has 8 tokens"):
        short_one.speak([TEXTS[0][:8]], SAMPLING)


def test_a_long_wait_is_told_once_and_that_it_is_over(policy: Policy, engine: Foreign, tmp_path: Path) -> None:
    """Breaks when nobody knows why a run stands still."""
    said = speaker(policy, engine, tmp_path, patience=60.0)
    said.patience = replace(said.patience, pause=0.01)
    told: list[Event] = []
    said.waits.bind(told.append, lambda: None)
    said.waits.after = 0.1
    left = iter(range(8))
    engine.script = lambda path, body: (503, "drain") if next(left, None) is not None else engine.answer(path, body)
    said.speak(PROMPTS, SAMPLING)
    first, over = [each.values for each in told[:2]]
    assert first["who"] == f"the engine at {engine.url}" and "answered 503: drain" in first["reason"]
    assert not first["over"] and over["over"] and over["waited_seconds"] >= first["waited_seconds"] >= 0.1
    lines = [event_line(each) for each in told[:2]]
    assert lines[0].startswith(f"waiting for the engine at {engine.url}, for ") and "503" in lines[0]  # type: ignore[union-attr]
    assert lines[1].startswith(f"the engine at {engine.url} has answered after ")  # type: ignore[union-attr]
