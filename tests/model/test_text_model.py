"""A model in texts: log-probabilities of continuations against plain forwards, and a judge on a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.data.conversation import Message
from luthier.infer.engine import Engine
from luthier.model.scorer import Asked
from luthier.model.text_model import LocalTextModel
from luthier.recipes.session import Session, load
from luthier.rewards import Score, Tools
from luthier.rewards.judge import Judge
from tests import forests
from tests.rewards.samples import sample

ASKED = [Asked((Message("user", text),), begun) for text, begun in (("cat", ""), ("a longer one", "It is"), ("x", ""))]
TEXTS = ["1", " 1", "10", "two words"]


@pytest.fixture
def session(tiny_path: Callable[[str], Path]) -> Session:
    return load(str(tiny_path("llama")), precision="float32")


def model_of(session: Session, **more: int) -> LocalTextModel:
    speaker = Engine(session.model, decode=session.tokenizer.decode)
    return LocalTextModel(session.model, speaker, session.renderer, **more)


@pytest.mark.parametrize("most_tokens", [8192, 1])
def test_a_continuation_is_as_likely_as_its_tokens_one_after_the_other(session: Session, most_tokens: int) -> None:
    """Breaks when a leaf sees another one, the first token of a leaf is lost, or results change places."""
    found = model_of(session, most_tokens=most_tokens).likely(ASKED, TEXTS)
    tokenizer = session.tokenizer
    for one, row in zip(ASKED, found, strict=True):
        prompt = session.renderer.prompt_ids(one.messages)
        if one.begun:
            prompt = np.concatenate([prompt, tokenizer.encode_after(prompt, one.begun)[0]])  # type: ignore[index]
        for text, likely in zip(TEXTS, row, strict=True):
            tokens = tokenizer.encode_after(prompt, text)[0]  # type: ignore[index]
            logits = forests.logits(session.model, np.concatenate([prompt, tokens]))
            log_probs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            expected = log_probs.gather(1, torch.from_numpy(tokens).long()[:, None]).sum()
            assert likely.log_prob == pytest.approx(float(expected), abs=1e-4) and likely.tokens == len(tokens)
            assert tokenizer.decode(tokens) in (text, text.strip())


def test_it_goes_on_behind_what_was_begun(session: Session) -> None:
    """Breaks when the beginning is left out of the prompt, or control tokens become text."""
    said = model_of(session).go_on(ASKED, most_tokens=5, temperature=0.0, seed=0)
    assert len(said) == 3 and all(each.ended in ("stop", "length") and "<|" not in each.text for each in said)
    again = model_of(session).go_on([ASKED[1]], most_tokens=5, temperature=0.0, seed=0)
    assert again[0] == said[1]
    assert model_of(session).go_on([], most_tokens=5, temperature=0.0, seed=0) == []


def test_dropout_is_as_it_was(session: Session) -> None:
    for training in (True, False):
        session.model.train(training)
        model_of(session).likely(ASKED[:1], ["1"])
        assert session.model.module.training == training


def test_a_judge_reads_its_verdict_from_a_real_model(session: Session) -> None:
    """Breaks when the judge and a model in texts do not fit together."""
    reward = Judge(scale="pair", rationale=False, least_mass=1e-12)
    [verdict] = reward.score([sample("a", reference="b")], Tools(judge=model_of(session)))
    assert isinstance(verdict, Score) and 0 < verdict.value < 1
    with pytest.raises(RecipeError, match="behind a prompt"):
        model_of(session).likely(ASKED[:1], [""])
