"""A model in texts: log-probabilities of continuations against plain forwards, and a judge on a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.data.conversation import Conversation, Message, Preference, Row
from luthier.data.forest import Forest
from luthier.data.rendering.causal import CausalRenderer
from luthier.infer.engine import Engine
from luthier.model.compared import compared_tree
from luthier.model.scorer import Begun, NoRoom, Said
from luthier.model.tasks import SCORES
from luthier.model.text_model import LocalTextModel, LocalTextScorer
from luthier.recipes.opening.session import Session, load
from luthier.rewards import RewardError, Score, Tools
from luthier.rewards.judge import Judge
from luthier.rewards.learned import Learned
from tests import forests, task_models
from tests.rewards.samples import sample

ASKED = [Begun((Message("user", text),), begun) for text, begun in (("cat", ""), ("a longer one", "It is"), ("x", ""))]
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


def test_a_question_without_room_is_told_and_takes_no_other_with_it(session: Session) -> None:
    """Breaks when a long question ends the run, is answered past the context, or moves the answers of others."""
    context = session.model.context_tokens
    assert context is not None
    model, most = model_of(session), context - len(session.renderer.prompt_ids((Message("user", ""),)))
    long = Begun((Message("user", "x" * (most + 1)),))
    asked, how = [ASKED[0], long, ASKED[1]], {"most_tokens": 5, "temperature": 0.0, "seed": 0}
    first, lack, last = model.go_on(asked, **how)  # type: ignore[arg-type]
    assert isinstance(lack, NoRoom) and f"(a context of {context} tokens) has no room" in lack.received
    assert f"than the {context + 2} of it" in lack.told and str(session.model.source) in lack.received
    assert [first, last] == model.go_on([ASKED[0], ASKED[1]], **how)  # type: ignore[arg-type]
    first_odds, lack, last_odds = model.likely(asked, TEXTS)
    assert isinstance(lack, NoRoom) and not isinstance(first_odds, NoRoom) and not isinstance(last_odds, NoRoom)
    alone = model.likely([ASKED[1]], TEXTS)[0]
    assert not isinstance(alone, NoRoom)
    assert [one.log_prob for one in last_odds] == pytest.approx([one.log_prob for one in alone], abs=1e-5)


def test_a_question_has_all_of_the_context_and_no_more(session: Session) -> None:
    """Breaks when the last position is lost, or one too many is taken."""
    context = session.model.context_tokens
    assert context is not None
    most = context - len(session.renderer.prompt_ids((Message("user", ""),)))
    full, over = (Begun((Message("user", "x" * count),)) for count in (most - 1, most))
    model = model_of(session)
    for one, fits in ((full, True), (over, False)):
        assert len(session.renderer.prompt_ids(one.messages)) == context - fits
        [said] = model.go_on([one], most_tokens=9, temperature=0.0, seed=0)
        [odds] = model.likely([one], ["1"])
        assert isinstance(said, Said) is isinstance(odds, list) is fits


@pytest.fixture
def renderer(session: Session) -> CausalRenderer:
    return CausalRenderer(session.tokenizer, session.renderer.template)


PROMPT = (Message("user", "Which?"),)
ANSWERS = ("this one", "that one, and more", "neither")


@pytest.mark.parametrize("most_tokens", [8192, 1])
def test_an_answer_gets_the_score_that_it_had_in_training(renderer: CausalRenderer, most_tokens: int) -> None:
    """Breaks when an answer is read otherwise than beside its rival: other tokens, another last one, another prompt."""
    model = task_models.language_model("llama", SCORES)
    rivals = Preference(Conversation(PROMPT), tuple((Message("assistant", said),) for said in ANSWERS))
    tree = compared_tree(renderer.render(Row(0, "row", rivals))[0], at_end=True)
    together = model.token_outputs(Forest((tree,))).scores
    assert together is not None
    conversations = [(*PROMPT, Message("assistant", said)) for said in ANSWERS]
    found = LocalTextScorer(model, renderer, most_tokens=most_tokens).scores(conversations)
    assert found == pytest.approx(together.tolist(), abs=1e-5) and len(set(found)) == 3


def test_a_learned_reward_takes_it_and_what_cannot_be_read_is_no_number(renderer: CausalRenderer) -> None:
    """Breaks when an answer that is too long for the reward model ends the run, or is scored without its end."""
    model = task_models.language_model("llama", SCORES)
    short = CausalRenderer(renderer.tokenizer, renderer.template, max_tokens=64)
    tools = Tools(reward_model=LocalTextScorer(model, short))
    asked = [sample("yes"), sample("yes " * 200), sample("no")]
    first, long, last = Learned().score(asked, tools)
    assert isinstance(first, Score) and isinstance(last, Score) and isinstance(long, RewardError)
    assert LocalTextScorer(model, short).scores([]) == []
    with pytest.raises(RecipeError, match="causal_lm"):
        LocalTextScorer(forests.language_model("llama"), short)


def test_dropout_is_as_it_was(session: Session) -> None:
    for training in (True, False):
        session.model.train(training)
        model_of(session).likely(ASKED[:1], ["1"])
        assert session.model.module.training == training


def test_a_judge_reads_its_verdict_from_a_real_model(session: Session) -> None:
    """Breaks when the judge and a model in texts do not fit together."""
    reward = Judge(scale="pair", rationale=False, least_mass=1e-12)
    session.model.module.config.max_position_embeddings = 2048  # type: ignore[assignment, union-attr]
    [verdict] = reward.score([sample("a", reference="b")], Tools(judge=model_of(session)))
    assert isinstance(verdict, Score) and 0 < verdict.value < 1
    with pytest.raises(RecipeError, match="behind a prompt"):
        model_of(session).likely(ASKED[:1], [""])
