"""The adapter pool: who is in memory, for whom, and what a name stands for as adapters come, go and change."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.adapters.bottleneck import Bottleneck
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.core.errors import CorruptError, DriftError, RecipeError
from luthier.data.forest import Forest, Ints
from luthier.infer.adapter_pool import AdapterPool
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.infer.scheduler import Room
from luthier.model.files.adapter_config import CONFIG, EXTRAS, TENSORS
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import put_on
from luthier.recipes.opening.pooled import bring, pool_of
from luthier.train.result import save_result
from tests import forests

METHODS: dict[str, Adapter] = {
    "lora": LoRA(rank=3, alpha=12.0),
    "other.lora": LoRA(rank=5, alpha=20.0, targets=("q", "v", "down")),
    "ia3": IA3(),
    "bottleneck": Bottleneck(size=4),
    "prompt": PromptTuning(prompt_tokens=4),
    "prefix": PrefixTuning(prefix_tokens=3),
}


def saved(
    folder: Path, adapter: Adapter, *, architecture: str = "llama", seed: int = 0, std: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """An adapter that does something, as files of its own."""
    model = forests.language_model(architecture, dtype=dtype)
    torch.manual_seed(seed)
    attachment = model.attach(adapter.attach(model.sites))
    forests.shake(attachment.named_parameters().values(), seed=seed, std=std)
    return save_result(folder, model, attachment, adapter, {"base_digest": model.digest})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {name: saved(place / name, adapter, seed=len(name)) for name, adapter in METHODS.items()}


def pool(files: dict[str, Path], *names: str, most: int = 64) -> AdapterPool:
    chosen = {name: files[name] for name in (names or files)}
    return pool_of(forests.language_model("llama"), chosen, most=most)


def said(model: LanguageModel, name: str) -> Tensor:
    """The log-probabilities of some rows under a name."""
    routed = Forest(tuple(replace(tree, adapter=name) for tree in forests.rows(3, ones=True)))
    return model.token_outputs(routed).log_probs.detach()


# --------------------------------------------------------------------------------------------------- coming and going


def test_nothing_is_read_until_somebody_asks(files: dict[str, Path], tmp_path: Path) -> None:
    """Breaks when thousands of registrations open thousands of files."""
    place = tmp_path / "unreadable"
    place.mkdir()
    for file in (CONFIG, TENSORS):
        (place / file).write_text("nothing that anybody could read")
    many = pool(files, "lora")
    for number in range(3000):
        many.register(f"copy-{number}", place)
    assert len(many.names) == 3001 and many.in_memory == () and not many.model.attachments
    with pytest.raises(CorruptError):
        many.acquire("copy-7")
    assert many.in_memory == () and not many.model.attachments
    assert many.acquire("lora") in many.model.attachments


def test_of_two_thousand_adapters_those_are_in_memory_that_may_be(files: dict[str, Path]) -> None:
    """Breaks when one that has left stays referenced: by its place, by prepared terms, by the keys of its texts."""
    many = pool(files, "lora", most=4)
    for number in range(2000):
        many.register(f"copy-{number}", files["lora" if number % 2 else "prefix"])
    engine = Engine(many.model, room=Room(tokens=256, page=4), pool=many)
    seen: list[list[weakref.ref[Tensor]]] = []
    for number in range(0, 2000, 80):
        asked = Request(prompt=prompts()[number % 7], sampling=Sampling(max_new_tokens=2), adapter=f"copy-{number}")
        engine.add(asked)
        (attachment,) = [each for name, each in many.model.attachments.items() if name.startswith(f"copy-{number}#")]
        seen.append([weakref.ref(each) for edit in attachment.edits for each in edit.parameters()])
        del attachment
        while engine.busy:
            engine.step()
        assert len(many.in_memory) <= 4 and len(many.model.attachments) <= 4
    gc.collect()
    assert all(seen) and 0 < sum(any(each() is not None for each in one) for one in seen) <= 4 < len(seen)


def test_the_one_that_was_asked_for_longest_ago_goes_first(files: dict[str, Path]) -> None:
    """Breaks when one that somebody holds is taken away, or memory holds more than it may."""
    few = pool(files, most=2)
    lora, ia3 = few.acquire("lora"), few.acquire("ia3")
    few.release(lora)
    few.release(ia3)
    assert few.in_memory == ("lora", "ia3")
    few.release(few.acquire("lora"))
    assert few.in_memory == ("ia3", "lora")
    held = few.acquire("ia3")
    prefix = few.acquire("prefix")
    assert few.in_memory == ("ia3", "prefix")
    # All are held: one more has to come all the same, and leaves when it is released.
    prompt = few.acquire("prompt")
    assert few.in_memory == ("ia3", "prefix", "prompt")
    few.release(prefix)
    assert few.in_memory == ("ia3", "prompt") and set(few.model.attachments) == {held, prompt}
    few.release(prompt)
    few.release(held)
    assert few.in_memory == ("prompt", "ia3")
    with pytest.raises(RecipeError, match="nobody holds it"):
        few.release(held)
    with pytest.raises(RecipeError, match="nobody holds it"):
        few.release("nothing")


def test_coming_and_going_leaves_the_base_as_it_was(files: dict[str, Path]) -> None:
    """Breaks when an adapter leaves a wrapper, a parameter or a random number behind."""
    one = pool(files, most=1)
    before, state = forests.snapshot(one.model.module), torch.random.get_rng_state()
    base = said(one.model, "")
    for _ in range(20):
        for name in files:
            route = one.acquire(name)
            # Nobody else's rows see it.
            assert torch.equal(said(one.model, ""), base) and not torch.equal(said(one.model, route), base)
            assert not any(parameter.requires_grad for parameter in one.model.module.parameters())
            one.release(route)
    one.unregister(name)
    assert not one.model.attachments and not one.model.mixes and forests.snapshot(one.model.module) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_was_loaded_computes_what_was_saved(files: dict[str, Path]) -> None:
    """Breaks when an adapter comes back with other numbers than it left with."""
    few = pool(files, most=1)
    first: dict[str, Tensor] = {}
    for name in (*files, *files):
        route = few.acquire(name)
        found = said(few.model, route)
        assert torch.equal(found, first.setdefault(name, found))
        few.release(route)


# -------------------------------------------------------------------------------------------------- names and changes


def test_who_holds_an_adapter_keeps_it_when_its_name_goes(files: dict[str, Path]) -> None:
    """Breaks when a request changes its adapter midway, or memory is never given back."""
    both = pool(files, "lora")
    old, key = both.acquire("lora"), both.key("lora")
    before = said(both.model, old)
    both.unregister("lora")
    assert both.names == () and both.key(old) == key
    with pytest.raises(RecipeError, match="no adapter is called 'lora'"):
        both.acquire("lora")
    with pytest.raises(RecipeError, match="no adapter is registered as 'lora'"):
        both.unregister("lora")
    both.register("lora", files["other.lora"])
    new = both.acquire("lora")
    assert new != old and both.key(new) == both.key("lora") != key
    assert torch.equal(said(both.model, old), before) and not torch.equal(said(both.model, new), before)
    both.release(old)
    assert set(both.model.attachments) == {new}
    both.unregister("lora")
    both.release(new)
    assert not both.model.attachments


def test_a_key_is_the_same_exactly_while_the_files_are(files: dict[str, Path], tmp_path: Path) -> None:
    """Breaks when a prefix that was read with other files is taken for this adapter's, or is lost without a reason."""
    place = tmp_path / "mine"
    shutil.copytree(files["lora"], place)
    one = pool_of(forests.language_model("llama"), {"mine": place, "ia3": files["ia3"]}, most=1)
    key, mixed = one.key("mine"), one.key("mine@0.5+ia3")
    route = one.acquire("mine")
    assert one.key(route) == key == one.key("mine")
    one.release(route)
    one.release(one.acquire("ia3"))
    assert one.in_memory == ("ia3",)
    again = one.acquire("mine")
    assert one.key(again) == key and again != route
    one.release(again)
    shutil.copy(saved(tmp_path / "other", METHODS["lora"], seed=99) / TENSORS, place / TENSORS)
    os.utime(place / TENSORS, ns=(1, 1))
    # In memory is what was read.
    assert one.key("mine") == key
    one.release(one.acquire("ia3"))
    assert one.key("mine") != key and one.key("mine@0.5+ia3") != mixed
    assert one.key("ia3@2") != one.key("ia3") != one.key("mine")


def test_a_mix_is_spelled_and_made_on_the_fly(files: dict[str, Path]) -> None:
    """Breaks when a weight is lost, a part is not held, or a mix stays behind when nobody needs it."""
    few = pool(files, most=2)
    lora, ia3 = few.acquire("lora"), few.acquire("ia3")
    few.model.mix("oracle", [(lora, 0.5), (ia3, 1.0)])
    route = few.acquire("lora@0.5+ia3")
    assert few.acquire("lora@0.5+ia3") == route and few.acquire("lora@1") == lora
    assert torch.equal(said(few.model, route), said(few.model, "oracle"))
    few.model.unmix("oracle")
    for held in (lora, lora, ia3, route):
        few.release(held)
    prefix = few.acquire("prefix")
    # Its parts are still held.
    assert few.in_memory == ("lora", "ia3", "prefix") and route in few.model.mixes
    few.release(route)
    assert not few.model.mixes and few.in_memory == ("prefix", "ia3")
    for spelled, words in (
        ("lora@much", "weight 'much'"),
        ("lora+nobody", "no adapter is called 'nobody'"),
        ("lora+", "no adapter is called ''"),
        ("prefix@0.5", "learned root"),
        ("prefix+prompt", "2 parts with a learned root"),
        ("lora@nan", "weight nan"),
        ("lora+lora", "2 times"),
    ):
        with pytest.raises(RecipeError, match=words):
            few.acquire(spelled)
    few.release(prefix)
    assert not few.model.mixes and all(not there.holders for there in few._there.values())


def test_what_stands_on_the_model_can_be_named_and_mixed(files: dict[str, Path]) -> None:
    """Breaks when the run's own adapter cannot be asked for beside those of the pool, or leaves with them."""
    model = forests.language_model("llama")
    model.attach(METHODS["ia3"].attach(model.sites), name="own")
    model.mix("mine", [("own", 0.5)])
    one = pool_of(model, {"lora": files["lora"]}, most=1)
    assert one.names == ("lora", "own") and one.acquire("own") == "own" and one.acquire("mine") == "mine"
    route = one.acquire("own@0.5+lora")
    assert route in model.mixes
    for held in (route, "own", "mine", ""):
        one.release(held)
    assert "own" in model.attachments and "mine" in model.mixes and one.acquire("") == ""
    with pytest.raises(RecipeError, match="called 'own' already"):
        one.register("own", files["lora"])


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_is_no_adapter_of_this_base_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Breaks when files of another base or half of some files come onto the model."""
    one = pool(files, "lora")
    before = forests.snapshot(one.model.module)
    with pytest.raises(RecipeError, match=f"holds no {CONFIG}"):
        one.register("empty", tmp_path)
    for name in ("", "a+b", "a@2", "a b", "-a", "a\n"):
        with pytest.raises(RecipeError, match="cannot name an adapter"):
            one.register(name, files["lora"])
    with pytest.raises(RecipeError, match="called 'lora' already"):
        one.register("lora", files["ia3"])
    with pytest.raises(RecipeError, match="at least 1"):
        AdapterPool(one.model, lambda folder, name: None, most=0)
    stranger, torn = tmp_path / "stranger", tmp_path / "torn"
    for place in (stranger, torn):
        shutil.copytree(files["lora"], place)
    extras = json.loads((stranger / EXTRAS).read_text())
    (stranger / EXTRAS).write_text(json.dumps({**extras, "base_digest": "0" * 64}))
    shutil.copy(files["ia3"] / TENSORS, torn / TENSORS)
    one.register("stranger", stranger)
    one.register("torn", torn)
    with pytest.raises(DriftError):
        one.acquire("stranger")
    with pytest.raises(CorruptError):
        one.acquire("torn")
    with pytest.raises(CorruptError):
        one.acquire("lora+torn")
    assert one.in_memory == ("lora",) and not one._there[next(iter(one._there))].holders
    one.unregister("lora")
    assert forests.snapshot(one.model.module) == before
    with pytest.raises(CorruptError):
        bring(one.model, torn, "torn")
    assert not one.model.attachments


# ------------------------------------------------------------------------------------------------------- in an engine

ASKED = ("", "lora", "other.lora", "ia3", "bottleneck", "prompt", "prefix", "lora@0.5+other.lora", "ia3@1.5",
         "prefix+lora", "bottleneck@-0.5+ia3@0.5", "prompt+other.lora@2", "", "lora", "prefix", "ia3")  # fmt: skip
LIMIT = Sampling(max_new_tokens=10, likeliest=2)


def prompts() -> list[Ints]:
    start = forests.tokens(np.random.default_rng(7), 9)
    # Beginnings are shared across adapters, so that keys of one would be found by another if they could be.
    return [np.concatenate([start, forests.tokens(np.random.default_rng(seed), 1 + seed % 4)]) for seed in range(16)]


def texts(engine: Engine, asked: list[tuple[Ints, str]]) -> list[tuple[list[int], list[float]]]:
    numbers = [engine.add(Request(prompt=prompt, sampling=LIMIT, adapter=name)) for prompt, name in asked]
    found: dict[int, tuple[list[int], list[float]]] = {number: ([], []) for number in numbers}
    while engine.busy:
        for news in engine.step():
            for each in news.said:
                found[news.request][0].append(each.token)
                found[news.request][1].append(each.log_prob)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("most", [1, 64])
@pytest.mark.parametrize("fused", [True, False])
def test_sixteen_requests_of_all_kinds_say_what_each_says_alone(
    files: dict[str, Path], fused: bool, most: int
) -> None:
    """Breaks when rows of one engine see each other's adapters, keys or heads, or an adapter leaves too early."""
    asked = list(zip(prompts(), ASKED, strict=True))
    model = forests.language_model("llama", fused=fused)
    engine = Engine(model, room=Room(tokens=1024, page=4, pass_tokens=24), pool=pool_of(model, files, most=most))
    together = texts(engine, asked)
    assert len(engine.pool.in_memory) <= most and not model.mixes  # type: ignore[union-attr]
    for (prompt, name), (tokens, log_probs) in zip(asked, together, strict=True):
        alone_model = forests.language_model("llama", fused=fused)
        alone = Engine(alone_model, room=Room(tokens=256, page=4), pool=pool_of(alone_model, files))
        ((expected, likely),) = texts(alone, [(prompt, name)])
        assert tokens == expected, name
        assert log_probs == pytest.approx(likely, abs=1e-4), name
    assert len({tuple(tokens) for tokens, _ in together}) > 12
    # Asked once more, beginnings are found, each under its own adapter.
    before = engine.counts.reused
    assert [tokens for tokens, _ in texts(engine, asked)] == [tokens for tokens, _ in together]
    assert engine.counts.reused > before


def test_an_engine_without_a_pool_says_the_same_as_one_that_holds_the_adapter(files: dict[str, Path]) -> None:
    """Breaks when rows that name an adapter compute something else than a model that has it switched on."""
    for name in files:
        model = forests.language_model("llama")
        bring(model, files[name], "mine")
        on = forests.language_model("llama")
        put_on(on, files[name])
        ((tokens, log_probs),) = texts(Engine(model, pool=pool_of(model)), [(prompts()[0], "mine")])
        ((expected, likely),) = texts(Engine(on), [(prompts()[0], "")])
        assert tokens == expected and log_probs == pytest.approx(likely, abs=1e-4), name


def test_a_reloaded_adapter_begins_nothing_with_keys_of_the_old_one(files: dict[str, Path]) -> None:
    """Breaks when the prefix cache mixes old and new of one name."""
    model = forests.language_model("llama")
    one = pool_of(model, {"mine": files["lora"]})
    engine = Engine(model, room=Room(tokens=512, page=4), pool=one)
    prompt = prompts()[3]
    (first,) = texts(engine, [(prompt, "mine")])
    one.unregister("mine")
    one.register("mine", files["other.lora"])
    before = engine.counts.reused
    (second,) = texts(engine, [(prompt, "mine")])
    assert engine.counts.reused == before and second != first
    other = forests.language_model("llama")
    (expected,) = texts(Engine(other, pool=pool_of(other, {"mine": files["other.lora"]})), [(prompt, "mine")])
    assert second[0] == expected[0]


def test_a_request_that_cannot_run_holds_nothing(files: dict[str, Path]) -> None:
    """Breaks when a refused or cancelled request keeps its adapter in memory for ever."""
    model = forests.language_model("llama")
    one = pool_of(model, files, most=1)
    engine = Engine(model, room=Room(tokens=64, page=4), pool=one)
    with pytest.raises(ValueError, match="cache holds"):
        engine.add(Request(prompt=prompts()[0], sampling=Sampling(max_new_tokens=60), adapter="lora"))
    number = engine.add(Request(prompt=prompts()[0], sampling=LIMIT, adapter="lora@2"))
    engine.step()
    engine.cancel(number)
    with pytest.raises(RecipeError, match="no adapter is called 'lorra'"):
        engine.add(Request(prompt=prompts()[0], sampling=LIMIT, adapter="lorra"))
    assert all(not there.holders for there in one._there.values()) and not model.mixes
