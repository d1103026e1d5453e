"""Beam search against transformers' own: the same lines with the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.infer.engine import Engine
from luthier.infer.request import News, Request
from luthier.infer.scheduler import Room
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from tests import forests

PROMPT = forests.tokens(np.random.default_rng(3), 7)


def answers(engine: Engine, request: Request) -> list[News]:
    """All choices of a request, in order."""
    engine.add(request)
    news = []
    while engine.busy:
        news += engine.step()
    return sorted(news, key=lambda each: each.choice)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("beams", "stops"), [(2, ()), (4, ()), (4, (5, 9, 17, 33)), (6, tuple(range(3, 60)))])
def test_lines_and_scores_are_transformers(architecture: str, beams: int, stops: tuple[int, ...]) -> None:
    """Breaks when a beam goes on from another's keys, an ended line is lost, or scores are of another length."""
    model = forests.language_model(architecture)
    sampling = Sampling(max_new_tokens=8, stop_ids=stops)
    found = answers(Engine(model), Request(prompt=PROMPT, sampling=sampling, choices=2, beams=beams))
    ids = torch.from_numpy(PROMPT.astype(np.int64))[None]
    settings = {"num_beams": beams, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    settings |= {"eos_token_id": list(stops) or None, "pad_token_id": 0, "length_penalty": 1.0}
    theirs = forests.zoo(architecture, ours=False).generate(
        ids, **settings, return_dict_in_generate=True, output_scores=True
    )
    for news, sequence, score in zip(found, theirs.sequences, theirs.sequences_scores, strict=True):
        own = [said.token for said in news.said]
        assert own == sequence[len(PROMPT) : len(PROMPT) + len(own)].tolist()
        assert set(sequence[len(PROMPT) + len(own) :].tolist()) <= {0, *stops}
        assert sum(said.log_prob for said in news.said) / len(own) == pytest.approx(float(score), abs=1e-4)
        assert news.ended == ("stop" if own[-1] in stops else "length")


def test_beams_find_the_same_lines_when_pages_run_out_and_give_all_of_them_back() -> None:
    """Breaks when a beam that gave way comes back to other keys, or pages of a line that was dropped stay held."""
    model = forests.language_model("llama")
    request = Request(prompt=PROMPT, sampling=Sampling(max_new_tokens=9), choices=3, beams=3)
    expected = answers(Engine(model), request)
    engine = Engine(model, room=Room(tokens=24, page=4, rows=2))
    for found, other in zip(answers(engine, request), expected, strict=True):
        assert [said.token for said in found.said] == [said.token for said in other.said]
    assert engine.counts.held == engine.counts.running == engine.counts.waiting == 0


def test_what_beams_cannot_do_is_refused() -> None:
    """Breaks when a setting is taken and not heeded."""
    engine = Engine(forests.language_model("llama"), decode=lambda tokens: "")
    others = [
        {"temperature": 1.0}, {"stop": ("a",)}, {"min_new_tokens": 3}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1},
        {"repetition_penalty": 1.5}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"likeliest": 2},
        {"logit_bias": ((5, 1.0),)},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(RecipeError, match=f"2 beams were asked for with {next(iter(other))}"):
            engine.add(Request(prompt=PROMPT, sampling=Sampling(**other), beams=2))
    with pytest.raises(RecipeError, match="with drafts"):
        engine.add(Request(prompt=PROMPT, beams=2, drafts=2))
    with pytest.raises(RecipeError, match="beams is 2"):
        Request(prompt=PROMPT, choices=3, beams=2)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_beams_tell_of_their_prompt_once(kind: str) -> None:
    """Breaks when a beam that splits is taken for one that still has to tell, which nothing is left to tell of."""
    paged = forests.language_model("llama")
    engine = Engine(paged if kind == "llama" else LanguageModel(forests.mamba(), source="tiny/mamba", digest=""))
    sampling = Sampling(max_new_tokens=6, prompt_log_probs=True)
    told = answers(engine, Request(prompt=PROMPT, sampling=sampling, beams=4, choices=2))
    (prompt,) = [news.prompt for news in told if news.prompt is not None]
    assert [said.token for said in prompt] == PROMPT[1:].tolist()
    plain = answers(engine, Request(prompt=PROMPT, sampling=Sampling(max_new_tokens=6), beams=4, choices=2))
    assert [news.said for news in told if news.said] == [news.said for news in plain]
