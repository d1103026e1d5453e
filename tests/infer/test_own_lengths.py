"""Generation with a model that turns long texts otherwise than short ones, in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from luthier.adapters import Adapter
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.data.forest import Ints
from luthier.infer.engine import Engine
from luthier.infer.request import News, Request
from luthier.infer.scheduler import Room
from luthier.model.editing.edits import LearnedPrompt
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling
from tests import forests, longrope
from tests.longrope import SHORT, Kind

KINDS: tuple[Kind, ...] = ("llama", "phi3")
RNG = np.random.default_rng(8)
TRUNK = forests.tokens(RNG, 70)
LENGTHS = (4, SHORT - 3, SHORT, SHORT + 1, 40, 70)
PROMPTS = [TRUNK[:length] for length in LENGTHS]
"""All begin alike: pages of short texts would be found by long ones, if they were not other keys."""
ROOMS = {
    "wide": Room(tokens=4000, page=4),
    "pieces": Room(tokens=4000, page=4, pass_tokens=5),
    "tight": Room(tokens=96, page=4, pass_tokens=16),
}
SAID = 12
PROMPT = PromptTuning(prompt_tokens=3)
PREFIX = PrefixTuning(prefix_tokens=3, init_std=0.5)


def expected(model: LanguageModel, prompt: Ints, *, said: int = SAID) -> list[int]:
    """The likeliest tokens by a forward over all there is, each time: what transformers' Phi-3 says."""
    text = prompt
    for _ in range(said):
        text = np.append(text, forests.logits(model, text)[-1].argmax().item()).astype(np.int32)
    return text[len(prompt) :].tolist()


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """What the choices of requests say that come one after another."""
    told: list[News] = []
    for request in requests:
        engine.add(request)
        told += engine.step()
    while engine.busy:
        told += engine.step()
    found: dict[tuple[int, int], list[int]] = {}
    for news in told:
        assert news.failure is None, news.failure
        found.setdefault((news.request, news.choice), []).extend(said.token for said in news.said)
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", list(ROOMS))
@pytest.mark.parametrize("invariant", [False, True])
def test_greedy_texts_are_those_of_whole_forwards(kind: Kind, room: str, invariant: bool) -> None:
    """Breaks when company, pieces, or pages of others turn a text, or one that becomes long goes on from old keys."""
    model = longrope.language_model(kind)
    sampling = Sampling(max_new_tokens=SAID)
    engine = Engine(model, room=ROOMS[room])
    found = run(engine, [Request(prompt=each, sampling=sampling, batch_invariant=invariant) for each in PROMPTS])
    assert found == [expected(model, prompt) for prompt in PROMPTS]
    assert engine.counts.held == 0


def test_greedy_texts_are_those_of_transformers() -> None:
    """Breaks when a text is turned otherwise than the library turns it when it becomes long."""
    theirs = longrope.zoo("phi3", ours=False)
    found = run(Engine(longrope.language_model("phi3")), [Request(prompt=each, sampling=Sampling(max_new_tokens=SAID))
                                                         for each in PROMPTS])  # fmt: skip
    for prompt, said in zip(PROMPTS, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        made = theirs.generate(ids, max_new_tokens=SAID, do_sample=False, eos_token_id=[VERY_LAST], pad_token_id=0)
        assert said == made[0, len(prompt) :].tolist()


VERY_LAST = 10**6
"""No token: nothing ends."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [LoRA(rank=2), PROMPT, PREFIX], ids=lambda each: type(each).__name__)
def test_places_of_a_learned_root_count(kind: Kind, method: Adapter) -> None:
    """Breaks when a prompt's keys are those of a short text behind a long one, or the other way round."""
    model = longrope.language_model(kind)
    torch.manual_seed(0)
    forests.shake(model.attach(method.attach(model.sites)).named_parameters().values())
    answers = Engine(model, room=ROOMS["pieces"]).speak(PROMPTS, Sampling(max_new_tokens=SAID))
    for prompt, spoken in zip(PROMPTS, answers, strict=True):
        for count, (token, told) in enumerate(zip(spoken.tokens, spoken.log_probs, strict=True)):
            log_probs = torch.log_softmax(whole(model, np.concatenate([prompt, spoken.tokens[:count]])), -1)
            assert int(log_probs.argmax()) == token
            assert abs(float(log_probs[token]) - told) <= 1e-4


def whole(model: LanguageModel, text: Ints) -> torch.Tensor:
    """What may come after a text, (V,), by the zoo's own forward over all of it."""
    root = model.active_root
    if not isinstance(root, LearnedPrompt):
        return forests.logits(model, text)[-1]
    embed = model.module.get_input_embeddings()(torch.from_numpy(text.astype(np.int64)))  # type: ignore[misc]
    states = torch.cat([root.embeddings(torch.float32), embed])[None]
    last: torch.Tensor = model.module(inputs_embeds=states, use_cache=False).logits[0, -1].detach()
    return last


@pytest.mark.parametrize("kind", KINDS)
def test_choices_beams_drafts_and_told_prompts(kind: Kind) -> None:
    """Breaks when what shares a text loses its way where the text becomes long."""
    model = longrope.language_model(kind)
    prompt = PROMPTS[1]
    drawn = Sampling(max_new_tokens=SAID, temperature=1.0, seed=4, prompt_log_probs=True)
    requests = [Request(prompt=prompt, sampling=drawn, choices=3)]
    alone = run(Engine(model), requests)
    company = [Request(prompt=each, sampling=Sampling(max_new_tokens=SAID)) for each in PROMPTS]
    assert run(Engine(model), [*requests, *company])[:3] == alone
    searched = Request(prompt=prompt, sampling=Sampling(max_new_tokens=SAID), beams=3)
    engine = Engine(model, room=ROOMS["wide"])
    beams = run(engine, [searched])
    # Each of the beams reads all of it once more, and no twin of a long one does.
    assert engine.counts.read + engine.counts.reused <= len(prompt) + 3 * (SHORT + SAID)
    assert run(Engine(model, room=ROOMS["tight"]), [searched]) == beams
    assert run(Engine(model, room=replace(ROOMS["wide"], rows=2)), [searched]) == beams
    repeats = np.concatenate([TRUNK[:8], TRUNK[:8]])
    plain = Request(prompt=repeats, sampling=Sampling(max_new_tokens=30))
    drafted = Request(prompt=repeats, sampling=Sampling(max_new_tokens=30), drafts=6)
    assert run(Engine(model), [drafted]) == run(Engine(model), [plain])
