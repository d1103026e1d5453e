"""Drafts against brute force, and what they bring in a text that repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from luthier.core.errors import RecipeError
from luthier.infer.draft_model import DraftModel
from luthier.infer.drafts import Lookup
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.infer.sampler import Chooser, choose_drafted
from luthier.infer.scheduler import Room
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from luthier.recipes.drafting import with_draft_model
from luthier.recipes.opening.opened import open_named
from tests import forests


def by_search(tokens: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """What followed the last place where the end of the text stood before."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if size <= len(tokens) and tokens[start : start + size] == tokens[len(tokens) - size :]:
                grown = list(tokens)
                while len(grown) < len(tokens) + count:
                    grown.append(grown[start + size + len(grown) - len(tokens)])
                return grown[len(tokens) :]
    return []


@given(
    prompt=some.lists(some.integers(0, 2), max_size=20),
    said=some.lists(some.integers(0, 2), max_size=10),
    longest=some.integers(1, 4),
    shortest=some.integers(1, 4),
    count=some.integers(0, 6),
)
def test_a_draft_is_what_followed_the_latest_longest_match(
    prompt: list[int], said: list[int], longest: int, shortest: int, count: int
) -> None:
    """Breaks when an older or a shorter match wins, the end matches itself, or said tokens are not entered."""
    lookup = Lookup(np.array(prompt, np.int32), longest=longest, shortest=shortest)
    for token in said:
        lookup.said(token)
    assert lookup.propose(count) == by_search([*prompt, *said], longest, shortest, count)


def test_a_text_that_repeats_itself_needs_few_passes() -> None:
    """Breaks when drafts are never right where they should be: a model that counts in a circle of seven."""
    table = torch.full((7, 7), -5.0)
    table[torch.arange(7), (torch.arange(7) + 1) % 7] = 5.0
    chooser, lookup = Chooser(Sampling(), np.array([6], np.int32)), Lookup([6])
    passes, last = 0, 6
    while len(chooser.said) < 70:
        draft = lookup.propose(5)
        passes += 1
        for said in choose_drafted(chooser, table[[last, *draft]], draft):
            lookup.said(said.token)
            last = said.token
    assert chooser.said[:70] == [place % 7 for place in range(70)]
    # The first round is new (9 tokens, until two of them stood before); then six tokens a pass.
    assert passes <= 9 + 12


# ------------------------------------------------------------------------------------------------------- a draft model


def drafted(model: LanguageModel, small: LanguageModel, requests: list[Request]) -> tuple[list[list[int]], Engine]:
    """The tokens of requests with drafts by a smaller model."""
    drafting = DraftModel(small, vocabulary=model.vocabulary_size)
    engine = Engine(model, room=Room(tokens=600, page=4, rows=4), drafting=drafting)
    return [each.tokens.tolist() for (each,) in engine.answer(requests)], engine


@pytest.mark.parametrize(("small", "temperature"), [("same", 0.8), ("llama", 0.0), ("gpt2", 0.8), ("mistral", 0.8)])
def test_with_a_draft_model_the_text_is_the_same(small: str, temperature: float) -> None:
    """Breaks when a draft is believed, the smaller model loses its place, or draws with other numbers than the text."""
    model = forests.language_model("llama")
    other = model if small == "same" else forests.language_model(small, seed=5)
    sampling = Sampling(max_new_tokens=14, temperature=temperature, top_k=40, repetition_penalty=1.1, seed=3)
    prompts = [forests.tokens(np.random.default_rng(seed), count) for seed, count in enumerate((5, 40))]
    plain = [Request(prompt=prompt, sampling=sampling) for prompt in prompts]
    expected = [each.tokens.tolist() for (each,) in Engine(model).answer(plain)]
    found, engine = drafted(model, other, [replace(each, drafts=5) for each in plain])
    assert found == expected
    counts = engine.counts
    assert counts.drafted > 15 and counts.agreed <= counts.drafted
    if small == "same":
        # Of five tokens a draft of the same model is right in all but those past the end.
        assert counts.agreed == counts.drafted and engine.counts.held == 0


@pytest.mark.slow
def test_tokens_drawn_with_a_draft_model_have_the_models_own_distribution() -> None:
    """Breaks when drafts are accepted too often or too seldom: chi-square of the first two tokens over many seeds."""
    model, small = forests.language_model("llama"), forests.language_model("llama", seed=9)
    prompt, heat = forests.tokens(np.random.default_rng(2), 6), 1.6
    sampled = [Sampling(max_new_tokens=3, temperature=heat, top_k=4, seed=seed) for seed in range(240)]
    requests = [Request(prompt=prompt, sampling=each, drafts=1) for each in sampled]
    found, engine = drafted(model, small, requests)
    assert engine.counts.agreed < engine.counts.drafted
    pairs: dict[tuple[int, int], float] = {}
    for first, chance in likely(model, prompt, heat):
        for second, then in likely(model, np.append(prompt, np.int32(first)), heat):
            pairs[first, second] = chance * then
    seen = Counter((tokens[0], tokens[1]) for tokens in found)
    assert set(seen) <= set(pairs)
    # The rarest are taken together, so that each cell has at least five.
    cells: list[tuple[float, int]] = []
    rest = [0.0, 0]
    for pair, chance in pairs.items():
        if chance * len(requests) >= 5:
            cells.append((chance * len(requests), seen[pair]))
        else:
            rest = [rest[0] + chance * len(requests), rest[1] + seen[pair]]
    cells.append((rest[0], int(rest[1])))
    statistic = sum((count - wanted) ** 2 / wanted for wanted, count in cells if wanted > 0)
    # The 99.9th percentile of the chi-square distribution, by Wilson and Hilferty's cube.
    free = len(cells) - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3


def likely(model: LanguageModel, text: np.ndarray, heat: float) -> list[tuple[int, float]]:
    """The four likeliest tokens after a text, by a forward without a cache, and their chances among each other."""
    best = forests.logits(model, text)[-1].topk(4)
    return list(zip(best.indices.tolist(), torch.softmax(best.values / heat, -1).tolist(), strict=True))


def test_a_model_that_cannot_draft_is_refused() -> None:
    """Breaks when drafts are asked of a model without pages."""
    with pytest.raises(RecipeError, match="tiny/mamba cannot draft"):
        DraftModel(LanguageModel(forests.mamba(), source="tiny/mamba", digest="m"), vocabulary=128)


def test_a_model_of_another_vocabulary_is_refused(tiny_path: Callable[[str], Path]) -> None:
    """Breaks when the tokens of one model are read as those of another."""
    opened = open_named(str(tiny_path("llama")))
    with pytest.raises(RecipeError, match="the draft model seedling has another vocabulary than"):
        with_draft_model(opened, "seedling")
    same = with_draft_model(opened, str(tiny_path("qwen2")))
    plain = Request(prompt=opened.prompt("Hi"), sampling=Sampling(max_new_tokens=6))
    expected = "".join(opened.stream(plain))
    engine = same.engine
    assert "".join(same.stream(replace(plain, drafts=3), engine)) == expected and engine.counts.drafted > 0
