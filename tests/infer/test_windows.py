"""Models whose layers do not all see equally far back: what they say, what they hold for it, and what the plan says."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, Qwen2Config, Qwen3Config

from luthier.arithmetic import inference
from luthier.arithmetic.shapes import shape_of
from luthier.data.forest import Ints
from luthier.infer import reader
from luthier.infer.cache import Layers, layers_of
from luthier.infer.continuation import Continuation
from luthier.infer.engine import Engine
from luthier.infer.pages import first_name, next_name
from luthier.infer.reader import PagedReader, default_room
from luthier.infer.request import News, Request
from luthier.infer.scheduler import Room, Scheduler
from luthier.infer.stores import Stores
from luthier.kernels.native_tokens import NativeTokenBlocks
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from tests import forests
from tests.tiny import VOCABULARY, WINDOW

NEAR, FAR = "sliding_attention", "full_attention"
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": WINDOW, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "gemma2": lambda: Gemma2Config(
        **SHARED, num_hidden_layers=4, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=6.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHARED, num_hidden_layers=6, query_pre_attn_scalar=8, layer_types=[*[NEAR] * 5, FAR]
    ),
    # Every second layer, as gpt-oss has it, and the upper layers, as qwen2 names them.
    "every second": lambda: Qwen3Config(**SHARED, num_hidden_layers=4, use_sliding_window=True, max_window_layers=0,
                                        layer_types=[NEAR, FAR] * 2),
    "upper": lambda: Qwen2Config(**{key: each for key, each in SHARED.items() if key != "head_dim"},
                                 num_hidden_layers=4, use_sliding_window=True, max_window_layers=1),
}  # fmt: skip
slow = pytest.mark.slow
each_pattern = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("gemma3", "upper") else [slow]) for name in CONFIGS]
)


@cache
def mixed(name: str) -> LanguageModel:
    """A tiny model of this pattern with random weights."""
    attention.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0.0, 0.15)
    forests.shake([parameter for parameter in module.parameters() if parameter.ndim == 1], seed=2)
    module.set_attn_implementation(attention.NAME)
    return LanguageModel(module.eval(), source=f"tiny/{name}", digest=name)


def engine_of(name: str, *, together: bool = False, **room: int) -> Engine:
    """An engine with small pages; `together` keeps all pages of all layers, as if none had a window."""
    engine = Engine(mixed(name), room=Room(**{"tokens": 400, "page": 4, **room}))
    if together:
        widths = layers_of(mixed(name)).widths
        engine._gate.layers = Layers(widths, (None,) * len(widths))
    return engine


def run(engine: Engine) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Tokens and log-probabilities of every choice, until nobody is there."""
    told: dict[tuple[int, int], list[tuple[int, float]]] = {}
    while engine.busy:
        for news in engine.step():
            note(told, news)
    assert engine.counts.held == engine.counts.bytes_held == engine.counts.running == engine.counts.waiting == 0
    return told


def note(told: dict[tuple[int, int], list[tuple[int, float]]], news: News) -> None:
    told.setdefault((news.request, news.choice), []).extend((each.token, each.log_prob) for each in news.said)


def check(name: str, prompt: Ints, said: list[tuple[int, float]]) -> None:
    """Every token is the best of a forward without a cache, and its log-probability is that forward's."""
    whole = np.concatenate([prompt, np.array([token for token, _ in said], np.int32)])
    log_probs = torch.log_softmax(forests.logits(mixed(name), whole), -1)[len(prompt) - 1 : -1]
    assert [token for token, _ in said] == log_probs.argmax(-1).tolist()
    np.testing.assert_allclose([each for _, each in said], log_probs.max(-1).values.numpy(), atol=2e-4)


def texts(count: int, *, common: int, longest: int, seed: int = 0) -> list[Ints]:
    """Prompts that begin alike."""
    rng = np.random.default_rng(seed)
    first = forests.tokens(rng, common)
    return [np.concatenate([first, forests.tokens(rng, int(rng.integers(1, longest)))]) for _ in range(count)]


@each_pattern
def test_what_is_said_is_what_full_forwards_say(name: str) -> None:
    """Breaks when a page goes that a layer still sees, a layer is given the table of another, or a beginning is taken
    for read where a window has lost it. Prompts of several windows in pieces, and beginnings that are shared."""
    prompts = texts(4, common=41, longest=24)
    engine = engine_of(name, pass_tokens=16)
    for prompt in prompts[:3]:
        engine.add(Request(prompt=prompt, sampling=Sampling(max_new_tokens=12)))
    told = run(engine)
    # A beginning that was read long ago, and a text that goes on where one has ended.
    before = engine.counts.reused
    engine.add(Request(prompt=prompts[3], sampling=Sampling(max_new_tokens=12)))
    again = np.concatenate([prompts[0], np.array([token for token, _ in told[0, 0]], np.int32)])
    engine.add(Request(prompt=again, sampling=Sampling(max_new_tokens=12)))
    told.update(run(engine))
    assert engine.counts.reused > before
    for number, prompt in enumerate([*prompts, again]):
        assert len(told[number, 0]) == 12
        check(name, prompt, told[number, 0])


@each_pattern
def test_a_text_holds_what_its_layers_see_and_the_plan_says_so(name: str) -> None:
    """Breaks when layers with a window keep more than they see, or the plan's formula counts other bytes."""
    model, page = mixed(name), 4
    shape = shape_of(model.config.to_dict())
    layers = layers_of(model)
    assert layers.windows == shape.windows and len(layers.groups) == 2
    engine = engine_of(name, pass_tokens=16)
    (prompt,) = texts(1, common=100, longest=9)
    engine.add(Request(prompt=prompt, sampling=Sampling(max_new_tokens=12)))
    (text,) = [each.choices[0] for each in engine._asked.values()]
    looked = 0
    while engine.busy:
        engine.step()
        if not engine.counts.running:
            continue
        # What is said last is read with the next pass; where all is seen, a prompt has its room from the start.
        done = text.done
        whole, read = -(-max(done, len(prompt)) // page), -(-done // page)
        pages = [whole if window is None else read - max(0, done + 1 - window) // page for window in layers.groups]
        sizes = layers.page_bytes(page, torch.float32)
        assert engine.counts.held == sum(pages)
        assert engine.counts.bytes_held == sum(each * size for each, size in zip(pages, sizes, strict=True))
        if done < len(prompt):
            continue
        looked += 1
        # Rounded up to whole pages, which may begin anywhere; and the next token brings its own key.
        over = engine.counts.bytes_held - inference.cache_bytes(shape, done, 4)
        least = sum(window is not None for window in shape.windows) * shape.key_value * 8
        most = sum((page - 1) * (1 if window is None else 2) for window in shape.windows) * shape.key_value * 8
        assert -least <= over <= most
    assert looked > 10


def test_the_cache_of_a_long_text_is_as_small_as_the_plan_has_it() -> None:
    """Breaks when the stores of a model like gemma-3-1b grow with the text in layers that have a window: 32 thousand
    tokens, in bfloat16, read in pieces and spoken on. docs/generation.md has these figures."""
    windows = tuple(None if layer % 6 == 5 else 512 for layer in range(26))
    layers, tokens = Layers(((1, 256, 256),) * 26, windows), 32_768
    scheduler = Scheduler(Room(tokens=tokens, rows=1), windows=layers.groups)
    stores, sizes = scheduler.stores.pages, layers.page_bytes(16, torch.bfloat16)
    request = Request(prompt=np.zeros(tokens - 40, np.int32), sampling=Sampling(max_new_tokens=41))
    text = Continuation(0, 0, request, limit=41)
    scheduler.waiting.append(text)
    while len(text.said) < 41:
        (part,) = scheduler.plan()
        scheduler.read(part)
        text.said.extend([1] * part.speaks)
        read, whole = -(-part.stop // 16), -(-max(part.stop, tokens - 40) // 16)
        assert [pages.held for pages in stores] == [whole, read - max(0, part.stop + 1 - 512) // 16]
    config = {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912,
        "sliding_window": 512,
    }  # fmt: skip
    shape = shape_of(config)
    assert shape.windows == windows and text.done == tokens
    held = sum(pages.held * size for pages, size in zip(stores, sizes, strict=True))
    assert held == inference.cache_bytes(shape, tokens, 2) == 145_752_064
    # All that is ever taken, with what nobody holds any more; and what it would be if no layer had a window.
    assert sum(pages.count * size for pages, size in zip(stores, sizes, strict=True)) == 158_007_296
    assert inference.cache_bytes_per_token(shape, 2) * tokens == 872_415_232


@pytest.mark.parametrize("name", ["gemma3", pytest.param("gemma2", marks=slow), pytest.param("upper", marks=slow)])
def test_beams_and_choices_are_those_of_one_table_for_all_layers(name: str) -> None:
    """Breaks when a twin writes into the page of another in one of the stores, or loses what its window sees."""
    (prompt,) = texts(1, common=30, longest=4)
    asked = [
        Request(prompt=prompt, sampling=Sampling(max_new_tokens=14), beams=3, choices=3),
        Request(prompt=prompt, sampling=Sampling(max_new_tokens=14, temperature=1.0, seed=4), choices=4),
    ]
    found = []
    for together in (False, True):
        engine = engine_of(name, together=together, pass_tokens=16)
        for request in asked:
            engine.add(request)
        found.append(run(engine))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 7
    for where, said in found[0].items():
        assert [token for token, _ in said] == [token for token, _ in found[1][where]]
        np.testing.assert_allclose([each for _, each in said], [each for _, each in found[1][where]], atol=2e-4)


@pytest.mark.parametrize("name", ["upper", pytest.param("gemma3", marks=slow)])
def test_a_campaign_in_little_room_leaves_no_page_behind(name: str) -> None:
    """Breaks when one that gives way, is cancelled, splits or begins where another was leaves a page of a store, or
    reads what is not its own; with less room than all need at once."""
    draw = random.Random(5)
    prompts = [*texts(8, common=13, longest=20), *texts(4, common=26, longest=4, seed=1)]
    engine = engine_of(name, tokens=72, pass_tokens=12, rows=5)
    told: dict[tuple[int, int], list[tuple[int, float]]] = {}
    cancelled, gave_way, kinds = set(), 0, {}
    while engine.busy or len(kinds) < len(prompts):
        if len(kinds) < len(prompts) and draw.random() < 0.3:
            kind = draw.choice(["plain", "plain", "choices", "beams", "drafts"])
            request = Request(
                prompt=prompts[len(kinds)], sampling=Sampling(max_new_tokens=draw.randint(4, 14)),
                choices=3 if kind == "choices" else 1, beams=2 if kind == "beams" else 1, drafts=3 * (kind == "drafts"),
            )  # fmt: skip
            kinds[engine.add(request)] = kind
        before = engine.counts.waiting
        news = engine.step()
        gave_way += engine.counts.waiting > before
        for each in news:
            note(told, each)
        if draw.random() < 0.03 and kinds:
            number = draw.choice(list(kinds))
            if engine.cancel(number):
                cancelled.add(number)
    assert engine.counts.held == engine.counts.running == engine.counts.waiting == 0
    assert gave_way and len(cancelled) < 6
    for (number, _), said in told.items():
        if kinds[number] != "beams" and number not in cancelled:
            check(name, prompts[number], said)
    engine.forget()
    engine.step()
    stores = engine._reader.scheduler.stores.pages  # type: ignore[union-attr]
    assert engine.counts.kept == 0 and all(pages.available == pages.count for pages in stores)


def test_a_beginning_that_a_window_has_lost_is_read_again() -> None:
    """Breaks when a text begins with pages of one store whose keys are gone in another."""
    stores = Stores((None, 8), (20, 4), 4)
    names = [first_name("")]
    for _ in range(6):
        names.append(next_name(names[-1], np.arange(4, dtype=np.int32)))
    names = names[1:]
    tables = stores.find([])
    for at, name in enumerate(names):
        assert stores.grow(tables, 4 * (at + 1))
        stores.name(tables, at, name)
        stores.pass_by(tables, 4 * (at + 1))
    stores.give_back(tables)
    assert stores.known(names) == 6 and [len(table.pages) for table in stores.find(names)] == [6, 2]
    # A window of 8 lies in two pages here; the others of four go first to whoever comes.
    other = stores.find([])
    assert stores.grow(other, 8) and stores.known(names) == 6 and stores.known(names[:4]) == 0
    assert not stores.grow(other, 12) and [table.stop for table in other] == [3, 2]


@pytest.mark.parametrize("name", ["upper", pytest.param("every second", marks=slow)])
@torch.no_grad()
def test_whole_blocks_take_the_table_of_each_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the C++ reads keys of a layer by the pages of another, or goes a longer way for mixed layers."""
    model = mixed(name)
    if model.executor.backend.name != "native" or model.executor.blocks is None:
        pytest.skip("only the C++ has whole blocks")
    through, gone = NativeTokenBlocks.through, []

    def noted(self: NativeTokenBlocks, x: Any, which: range, *more: Any) -> Any:
        found = through(self, x, which, *more)
        gone.append((which.start, which.stop, found is not None))
        return found

    monkeypatch.setattr(NativeTokenBlocks, "through", noted)
    said = []
    for _ in range(2):
        engine, rng = engine_of(name), np.random.default_rng(3)
        for _ in range(3):
            engine.add(Request(prompt=forests.tokens(rng, 36), sampling=Sampling(max_new_tokens=9)))
        # The stores number their pages differently. Prompts go by their operations: they are too many rows.
        _, near = engine._reader.scheduler.stores.pages  # type: ignore[union-attr]
        for page in [near.take() for _ in range(near.count)]:
            near.give_back([page or 0])
        said.append(run(engine))
        monkeypatch.setattr(NativeTokenBlocks, "through", lambda *given: None)
    assert said[0] == said[1] and gone.count((0, model.sites.layers, True)) >= 8


@pytest.mark.parametrize("share", [1e-3, 1.0])
def test_the_room_that_is_found_fits_into_its_share_of_memory(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Breaks when room is counted as if no layer had a window, or as if all had."""
    model = mixed("gemma3")
    layers, free = layers_of(model), 40_000_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    monkeypatch.setattr(reader, "SHARE", share)
    room = default_room(model, layers)
    found = PagedReader(model, room, layers, mixed=False).counts.bytes
    assert found <= share * free
    if share == 1.0:
        # As many contexts as run at once, for the one layer that sees all of them.
        assert room.tokens == 64 * 256
    else:
        assert found > 0.9 * share * free
