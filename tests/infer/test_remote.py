"""A remote speaker exists behind a probe only, and says what our own engine says with the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import GateError
from luthier.infer.dialects import dialect_named
from luthier.infer.remote import RemoteSpeaker
from luthier.infer.sync import Distance, Sync, probe
from luthier.infer.wire import RemoteError, Wire
from luthier.model.speaker import Sampling, Speaker
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.own_scores import scores_by
from tests.adapters_of import adapter_folder, moved
from tests.engines import Foreign, foreign

TEXTS = [np.array([2, *range(3 + 19 * i, 27 + 19 * i), 1], np.int32) for i in range(3)]
FINE = Sync(model="mine", texts=1, tokens=9, tolerance=0.05, apart=Distance(0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def models(tiny_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    base, place = tiny_path("llama"), tmp_path_factory.mktemp("adapters")
    first = adapter_folder(base, place / "first")
    folders = {"": None, "first": str(first), "second": str(moved(first, 0.3, place / "second"))}
    return {name: open_named(str(base), adapter=folder, precision="float32") for name, folder in folders.items()}


@pytest.fixture
def engine(models: dict[str, Opened]) -> Iterator[Foreign]:
    with foreign(Foreign("vllm", {"": models[""], "mine": models["first"]}, loaded=["mine"])) as made:
        yield made


def test_it_speaks_as_ours_does(models: dict[str, Opened], engine: Foreign) -> None:
    own = models["first"]
    dialect = dialect_named("vllm", Wire(engine.url))
    sync = probe(dialect, "mine", TEXTS, ours=scores_by(own.model), base=scores_by(own.model, bare=True), said=4)
    speaker: Speaker = RemoteSpeaker(dialect, sync, at_once=2)
    prompts = [text[:5] for text in TEXTS]
    greedy = Sampling(max_new_tokens=6, stop_ids=(1,))
    for theirs, ours in zip(speaker.speak(prompts, greedy), own.engine.speak(prompts, greedy), strict=True):
        assert theirs.tokens.tolist() == ours.tokens.tolist() and theirs.ended == ours.ended
        assert theirs.log_probs == pytest.approx(ours.log_probs, abs=1e-4)
    drawn = Sampling(max_new_tokens=6, temperature=1.0, seed=3)
    same = [speaker.speak([prompts[0]] * 3, drawn) for _ in range(2)]
    assert [one.tokens.tolist() for one in same[0]] == [one.tokens.tolist() for one in same[1]]
    assert len({tuple(one.tokens.tolist()) for one in same[0]}) == 3, "equal prompts draw answers of their own"
    assert speaker.speak([], greedy) == []


def test_there_is_none_behind_a_failed_probe(engine: Foreign) -> None:
    dialect = dialect_named("vllm", Wire(engine.url))
    RemoteSpeaker(dialect, FINE)
    with pytest.raises(GateError, match="does not compute mine"):
        RemoteSpeaker(dialect, Sync(model="mine", texts=1, tokens=9, tolerance=0.05, apart=Distance(1.0, 1.0, 1.0)))


def test_new_weights_need_a_new_probe(models: dict[str, Opened], engine: Foreign) -> None:
    speaker = RemoteSpeaker(dialect_named("vllm", Wire(engine.url)), FINE)
    old, new = models["first"], models["second"]
    engine.models["next"] = old
    scores = {"ours": scores_by(new.model), "base": scores_by(new.model, bare=True), "before": scores_by(old.model)}
    with pytest.raises(GateError, match="as they were"):
        # The engine says that it has loaded them, and goes on with what it has.
        speaker.renewed("next", "/there", TEXTS, **scores)
    assert engine.loaded == ["mine"], "what is refused does not stay there"
    engine.models["next"] = new
    assert speaker.renewed("next", "/there", TEXTS, **scores).sync.renewed == pytest.approx(1, abs=1e-3)
    assert engine.loaded == ["next"], "what it had is let go"


def test_one_answer_that_fails_ends_the_call(models: dict[str, Opened], engine: Foreign) -> None:
    engine.pause = 0.5
    speaker = RemoteSpeaker(dialect_named("vllm", Wire(engine.url, seconds=0.1)), FINE, at_once=2)
    start = time.monotonic()
    with pytest.raises(RemoteError, match="did not answer"):
        speaker.speak([TEXTS[0]] * 40, Sampling(max_new_tokens=1))
    assert time.monotonic() - start < 2
