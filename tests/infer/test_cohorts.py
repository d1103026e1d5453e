"""Models with a cache of their own: several adapters in one batch, beams, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.adapters import Adapter
from luthier.adapters.bottleneck import Bottleneck
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Ints, Segment, Tree, row_tree
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import put_on
from luthier.recipes.opening.pooled import pool_of
from luthier.train.result import save_result
from tests import forests, task_models
from tests.task_models import ANSWERS

SITES: dict[str, Adapter] = {"lora": LoRA(rank=3, alpha=12.0), "slim": LoRA(rank=2, alpha=8.0)}
BLOCKS: dict[str, Adapter] = {**SITES, "ia3": IA3(), "bottleneck": Bottleneck(size=4)}
ROOTS: dict[str, Adapter] = {
    "prompt": PromptTuning(prompt_tokens=4),
    "prefix": PrefixTuning(prefix_tokens=3, init_std=0.5),
    "longer": PrefixTuning(prefix_tokens=5, init_std=0.5),
}
MIXES = ("lora@0.5+slim", "slim@-1", "ia3@1.5", "bottleneck@0.5+lora", "prompt+lora@2", "prefix+ia3")
KINDS: dict[str, tuple[Callable[[], LanguageModel], dict[str, Adapter]]] = {
    "mamba": (lambda: LanguageModel(forests.mamba(), source="tiny/mamba", digest="m"), SITES),
    "t5": (lambda: task_models.language_model("t5", ANSWERS), {**BLOCKS, **ROOTS}),
    "t5-gated": (lambda: task_models.language_model("t5-gated", ANSWERS), {**BLOCKS, **ROOTS}),
    "bart": (lambda: task_models.language_model("bart", ANSWERS), BLOCKS),
}
LENGTHS = (7, 3, 11, 3, 7, 5)
PROMPTS = [forests.tokens(np.random.default_rng(seed), count) for seed, count in enumerate(LENGTHS)]
LIMIT = Sampling(max_new_tokens=5)


def saved(folder: Path, kind: str) -> dict[str, Path]:
    """Adapters of a tiny model that do something, as files of their own."""
    make, adapters = KINDS[kind]
    found = {}
    for seed, (name, adapter) in enumerate(adapters.items()):
        model = make()
        # Some methods draw their start; with an unlucky one scores are so large that they round by more than 1e-4.
        torch.manual_seed(seed)
        attachment = model.attach(adapter.attach(model.sites))
        forests.shake(attachment.named_parameters().values(), seed=seed, std=0.3)
        facts = {"base_digest": model.digest, "task": model.task.name}
        found[name] = save_result(folder / name, model, attachment, adapter, facts)
    return found


def said(engine: Engine, asked: list[tuple[int, str]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities for prompts under adapters, all asked for at once."""
    numbers = [engine.add(Request(prompt=PROMPTS[at], sampling=LIMIT, adapter=name)) for at, name in asked]
    found: dict[int, tuple[list[int], list[float]]] = {number: ([], []) for number in numbers}
    while engine.busy:
        for news in engine.step():
            for each in news.said:
                found[news.request][0].append(each.token)
                found[news.request][1].append(each.log_prob)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_of_many_adapters_says_what_each_says_alone(kind: str, tmp_path: Path) -> None:
    """Breaks when rows see each other's adapters, roots or paddings, or an adapter misses a part of the model."""
    make, adapters = KINDS[kind]
    files = saved(tmp_path, kind)
    mixes = [mix for mix in MIXES if {part.partition("@")[0] for part in mix.split("+")} <= set(adapters)]
    asked = [(at % len(PROMPTS), name) for at, name in enumerate(["", *files, *mixes, "", *files])]
    model = make()
    engine = Engine(model, pool=pool_of(model, files))
    together = said(engine, asked)
    alone_model = make()
    alone = Engine(alone_model, pool=pool_of(alone_model, files, most=1))
    for (at, name), (tokens, log_probs) in zip(asked, together, strict=True):
        ((expected, likely),) = said(alone, [(at, name)])
        assert tokens == expected, name
        assert log_probs == pytest.approx(likely, abs=1e-4), name
        if name in files:
            on = make()
            put_on(on, files[name])
            assert log_probs == pytest.approx(by_training(on, PROMPTS[at], tokens), abs=1e-4), name
    assert len({tuple(log_probs) for _, log_probs in together}) > len(files)
    assert not alone_model.mixes and len(alone_model.attachments) == 1


def test_adapters_come_and_go_while_texts_grow(tmp_path: Path) -> None:
    """Breaks when one that is held leaves midway, or a newcomer computes with what had its name before."""
    make, _ = KINDS["t5"]
    files = saved(tmp_path, "t5")
    model = make()
    pool = pool_of(model, {"mine": files["lora"], "prefix": files["prefix"]}, most=1)
    engine = Engine(model, pool=pool)
    old = engine.add(Request(prompt=PROMPTS[0], sampling=LIMIT, adapter="mine"))
    beside = engine.add(Request(prompt=PROMPTS[1], sampling=LIMIT, adapter="prefix@1"))
    told = engine.step()
    pool.unregister("mine")
    pool.register("mine", files["bottleneck"])
    new = engine.add(Request(prompt=PROMPTS[0], sampling=LIMIT, adapter="mine"))
    while engine.busy:
        told += engine.step()
    for number, at, name in ((old, 0, "lora"), (beside, 1, "prefix"), (new, 0, "bottleneck")):
        found = [said.log_prob for news in told if news.request == number for said in news.said]
        ((_, expected),) = said(Engine(make_with(files[name])), [(at, "")])
        assert found == pytest.approx(expected, abs=1e-4), name
    assert len(model.attachments) == 1


def test_what_was_switched_on_computes_without_names(tmp_path: Path) -> None:
    """Breaks when a learned root of an encoder-decoder is read for its own requests only."""
    files = saved(tmp_path, "t5")
    asked = [(0, ""), (1, ""), (2, "")]
    for name in ROOTS:
        model = KINDS["t5"][0]()
        pool = pool_of(model, files)
        named = said(Engine(model, pool=pool), [(at, name) for at, _ in asked])
        switched = said(Engine(make_with(files[name])), asked)
        assert [tokens for tokens, _ in named] == [tokens for tokens, _ in switched], name


def test_a_learned_root_where_attention_cannot_be_driven_is_refused(tmp_path: Path) -> None:
    """Breaks when a prompt that nobody reads is taken for an adapter."""
    for kind, adapter in (("mamba", PromptTuning(prompt_tokens=2)), ("bart", ROOTS["prompt"])):
        model = KINDS[kind][0]()
        model.attach(adapter.attach(model.sites), name="mine")
        with pytest.raises(RecipeError, match="has a learned root, and the attention"):
            Engine(model).speak(PROMPTS[:1], LIMIT)
        with pytest.raises(RecipeError, match="mine has a learned root"):
            Engine(model, pool=pool_of(model)).add(Request(prompt=PROMPTS[0], sampling=LIMIT, adapter="mine"))


def test_prompts_are_scored_where_they_are_predicted() -> None:
    """Breaks when an encoder's prompt is told without any score, or texts of one batch get each other's."""
    asked = replace(LIMIT, prompt_log_probs=True)
    with pytest.raises(RecipeError, match="its encoder reads prompts"):
        Engine(KINDS["t5"][0]()).speak(PROMPTS[:1], asked)
    model = KINDS["mamba"][0]()
    engine = Engine(model)
    numbers = {engine.add(Request(prompt=PROMPTS[at], sampling=asked)): at for at in (0, 4, 1)}
    told = {}
    while engine.busy:
        told |= {news.request: news.prompt for news in engine.step() if news.prompt is not None}
    for number, at in numbers.items():
        ids = torch.from_numpy(PROMPTS[at].astype(np.int64))[None]
        logits = model.module(input_ids=ids).logits[0, :-1].detach()
        wanted = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert [said.log_prob for said in told[number]] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart", "mamba"])
def test_beams_are_those_of_the_zoo(kind: str) -> None:
    """Breaks when a beam that splits goes on without what was said before."""
    model = KINDS[kind][0]()
    sampling = Sampling(max_new_tokens=5)
    found = Engine(model).answer([Request(prompt=PROMPTS[0], sampling=sampling, choices=2, beams=3)])[0]
    ids = torch.from_numpy(PROMPTS[0].astype(np.int64))[None]
    theirs = model.module.generate(
        ids, num_beams=3, num_return_sequences=2, max_new_tokens=5, do_sample=False, length_penalty=1.0,
        eos_token_id=None, forced_bos_token_id=None, forced_eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for answer, sequence in zip(found, theirs, strict=True):
        assert answer.tokens.tolist() == sequence[-5:].tolist()


def make_with(folder: Path) -> LanguageModel:
    """The tiny T5 with an adapter switched on."""
    model = KINDS["t5"][0]()
    put_on(model, folder)
    return model


def by_training(model: LanguageModel, prompt: Ints, tokens: list[int]) -> list[float]:
    """The log-probabilities of an answer by the forward pass that training has, without any cache."""
    weights = np.zeros(len(tokens) + 1, np.float32)
    weights[1:] = 1
    said = np.array(tokens, np.int32)
    if model.task == ANSWERS:
        read = Segment(prompt, np.zeros(len(prompt), np.float32), both_ways=True)
        start = np.array([model.module.config.decoder_start_token_id], np.int32)
        tree = Tree((read, Segment(np.concatenate([start, said]), weights, 0)))
    else:
        ones = np.concatenate([np.zeros(len(prompt), np.float32), weights[1:]])
        tree = row_tree(np.concatenate([prompt, said]), ones)
    found: list[float] = model.token_outputs(Forest((tree,))).log_probs.tolist()
    return found
