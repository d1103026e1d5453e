"""Generation with a cache against forwards without one: tokens, log-probabilities, distributions, and every end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Forest, Ints, row_tree
from luthier.infer.engine import Engine
from luthier.infer.gate import Gate
from luthier.infer.guides import Guide
from luthier.infer.request import News, Request
from luthier.infer.scheduler import Room
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Spoken
from tests import forests
from tests.forests import ARCHITECTURES

ADAPTERS: dict[str, Adapter | None] = {
    "none": None,
    "lora": LoRA(rank=4),
    "ia3": IA3(),
    "prefix": PrefixTuning(prefix_tokens=4, init_std=0.5),
}
RNG = np.random.default_rng(11)
PROMPTS = [forests.tokens(RNG, count) for count in (9, 3, 14, 3, 5)]


def adapted(architecture: str, name: str) -> LanguageModel:
    """A tiny model with an adapter that does something."""
    model = forests.language_model(architecture)
    adapter = ADAPTERS[name]
    if adapter is not None:
        torch.manual_seed(3)
        forests.shake(model.attach(adapter.attach(model.sites)).named_parameters().values())
    return model


def check_against_full_forwards(model: LanguageModel, prompt: Ints, spoken: Spoken) -> None:
    """Every token is the best of a forward over all before it, and its log-probability is that forward's."""
    whole = np.concatenate([prompt, spoken.tokens])
    log_probs = torch.log_softmax(forests.logits(model, whole), -1)[len(prompt) - 1 : -1]
    assert spoken.tokens.tolist() == log_probs.argmax(-1).tolist()
    np.testing.assert_allclose(spoken.log_probs, log_probs.max(-1).values.numpy(), atol=1e-4)


@pytest.mark.parametrize(("architecture", "name"), list(product(ARCHITECTURES, ADAPTERS)))
def test_cached_greedy_equals_full_forwards_in_a_batch_of_mixed_lengths(architecture: str, name: str) -> None:
    """Breaks when padding is seen, positions are those of the batch, or a window or root is misplaced by padding."""
    model = adapted(architecture, name)
    answers = Engine(model).speak(PROMPTS, Sampling(max_new_tokens=9))
    for prompt, spoken in zip(PROMPTS, answers, strict=True):
        assert len(spoken.tokens) == len(spoken.log_probs) == 9 and spoken.ended == "length"
        check_against_full_forwards(model, prompt, spoken)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_texts_are_those_of_transformers(architecture: str) -> None:
    """Breaks when an answer is not what the library's own `generate` gives, stop tokens and penalties included."""
    model = forests.language_model(architecture)
    theirs = forests.zoo(architecture, ours=False)
    sampling = Sampling(max_new_tokens=24, stop_ids=(5, 9), repetition_penalty=1.3, min_new_tokens=3)
    for prompt, spoken in zip(PROMPTS, Engine(model).speak(PROMPTS, sampling), strict=True):
        made = theirs.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], max_new_tokens=24, min_new_tokens=3, do_sample=False,
            repetition_penalty=1.3, eos_token_id=[5, 9], pad_token_id=0,
        )  # fmt: skip
        assert spoken.tokens.tolist() == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_log_probabilities_are_those_the_trainer_computes(name: str) -> None:
    """Breaks when generation and training disagree about the model they share."""
    model = adapted("mistral", name)
    (spoken,) = Engine(model).speak(PROMPTS[:1], Sampling(max_new_tokens=6, temperature=1.0, seed=4))
    weights = np.zeros(len(PROMPTS[0]) + 6, dtype=np.float32)
    weights[-6:] = 1
    row = row_tree(np.concatenate([PROMPTS[0], spoken.tokens]), weights)
    outputs = model.token_outputs(Forest((row,)))
    np.testing.assert_allclose(spoken.log_probs, outputs.log_probs.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_a_prompt_says_the_same_alone_and_in_a_batch(architecture: str, batch_rows: int) -> None:
    """Breaks when neighbours change a text: greedy, and sampled by the row's own generator."""
    model = forests.language_model(architecture)
    alone = [Engine(model).speak([prompt], Sampling(max_new_tokens=8))[0] for prompt in PROMPTS]
    together = Engine(model, room=Room(tokens=400, rows=batch_rows, page=4)).speak(PROMPTS, Sampling(max_new_tokens=8))
    assert [each.tokens.tolist() for each in together] == [each.tokens.tolist() for each in alone]
    sampled = Sampling(max_new_tokens=8, temperature=1.0, seed=2)
    expected = [each.tokens.tolist() for each in Engine(model).speak(PROMPTS, sampled)]
    engine = Engine(model, room=Room(tokens=400, rows=batch_rows, page=4))
    found = [each.tokens.tolist() for each in engine.speak(PROMPTS, sampled)]
    assert found == expected
    assert Engine(model).speak(PROMPTS[:1], sampled)[0].tokens.tolist() == expected[0]


def test_a_seed_is_a_text_and_the_global_generator_is_left_alone() -> None:
    """Breaks when sampling reads or moves torch's own generator, or the seed is not read."""
    generator = Engine(forests.language_model("llama"))
    state = torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))
        answers = generator.speak(PROMPTS, Sampling(max_new_tokens=12, temperature=1.0, seed=seed))
        texts.append([each.tokens.tolist() for each in answers])
    assert texts[0] == texts[1] != texts[2]
    torch.set_rng_state(state)
    generator.speak(PROMPTS, Sampling(max_new_tokens=2, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)
    same = generator.speak([PROMPTS[0]] * 2, Sampling(max_new_tokens=12, temperature=1.0))
    assert same[0].tokens.tolist() != same[1].tokens.tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.6), (1.0, 12, 0.5)]
)
def test_sampling_follows_the_distribution_it_says(temperature: float, top_k: int, top_p: float) -> None:
    """Breaks when a cut keeps one token too many or too few, or temperature comes after the cut."""
    model = forests.language_model("llama")
    draws = 3000
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=1)
    answers = Engine(model).speak([PROMPTS[1]] * draws, sampling)
    log_probs = torch.log_softmax(forests.logits(model, PROMPTS[1])[-1], -1)
    weights = (log_probs / temperature).exp().double()
    order = weights.argsort(descending=True)
    if top_k:
        weights[order[top_k:]] = 0
    weights /= weights.sum()
    kept, total = 0, 0.0
    while total < top_p - 1e-9 and kept < len(order):
        total += float(weights[order[kept]])
        kept += 1
    weights[order[kept:]] = 0
    expected = (weights / weights.sum()).numpy()
    said = np.array([int(each.tokens[0]) for each in answers])
    assert set(said) <= set(np.flatnonzero(expected))
    found = np.bincount(said, minlength=len(expected)) / draws
    noise = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) <= 5 * noise + 1e-3).all()
    # The log-probability is the model's own, before temperature and cuts.
    np.testing.assert_allclose([each.log_probs[0] for each in answers[:20]], log_probs[said[:20]].numpy(), atol=1e-4)


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy() -> None:
    """Breaks when a cut may leave nothing, or more than the best."""
    generator = Engine(forests.language_model("llama"))
    greedy = [each.tokens.tolist() for each in generator.speak(PROMPTS, Sampling(max_new_tokens=5))]
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        answers = generator.speak(PROMPTS, Sampling(max_new_tokens=5, temperature=1.0, **cut))  # type: ignore[arg-type]
        assert [each.tokens.tolist() for each in answers] == greedy


def test_every_row_ends_at_its_own_stop() -> None:
    """Breaks when a stop token is left out, or one row's stop ends or cuts another."""
    model = forests.language_model("llama")
    free = Engine(model).speak(PROMPTS, Sampling(max_new_tokens=10))
    stop = int(free[0].tokens[3])
    stopped = Engine(model).speak(PROMPTS, Sampling(max_new_tokens=10, stop_ids=(stop,)))
    for before, after in zip(free, stopped, strict=True):
        said = before.tokens.tolist()
        end = said.index(stop) + 1 if stop in said else 10
        assert after.tokens.tolist() == said[:end] and len(after.log_probs) == end
        assert after.ended == ("stop" if stop in said else "length")
    assert stopped[0].ended == "stop" and len({len(each.tokens) for each in stopped}) > 1


def test_a_stop_string_may_span_tokens() -> None:
    """Breaks when only whole tokens are compared with it."""
    model = forests.language_model("llama")

    def decode(tokens: Ints) -> str:
        return "".join(f"<{token}>" for token in tokens)

    sampled = {"max_new_tokens": 8, "temperature": 1.5, "seed": 3}
    free = Engine(model).speak(PROMPTS[:1], Sampling(**sampled))[0].tokens.tolist()  # type: ignore[arg-type]
    text = f"{free[2]}><{free[3]}"
    stopping = Sampling(**sampled, stop=("never", text))  # type: ignore[arg-type]
    (spoken,) = Engine(model, decode=decode).speak(PROMPTS[:1], stopping)
    assert spoken.tokens.tolist() == free[:4] and spoken.ended == "stop"
    with pytest.raises(DataError, match="no tokenizer"):
        Engine(model).speak(PROMPTS, Sampling(stop=("a",)))


@pytest.mark.parametrize(("architecture", "name"), [("llama", "none"), ("gpt2", "none"), ("gpt2", "prefix")])
def test_each_row_may_fill_the_context_whatever_shares_its_batch(architecture: str, name: str) -> None:
    """Breaks when a long neighbour cuts a short row, or a row that has ended runs past the last position."""
    model = adapted(architecture, name)
    root = 4 if name == "prefix" else 0
    prompts = [forests.tokens(RNG, count) for count in (240 - root, 250 - root, 255 - root)]
    answers = Engine(model).speak(prompts, Sampling(max_new_tokens=12))
    assert [len(each.tokens) for each in answers] == [12, 6, 1] and {each.ended for each in answers} == {"length"}
    for prompt, spoken in zip(prompts, answers, strict=True):
        check_against_full_forwards(model, prompt, Spoken(spoken.tokens[:-1], spoken.log_probs[:-1], "length"))
    for length in (256 - root, 300):
        with pytest.raises(DataError, match=f"fewer than {256 - root}"):
            Engine(model).speak([forests.tokens(RNG, length)], Sampling(max_new_tokens=1))


def test_an_empty_prompt_is_an_error() -> None:
    """Breaks when a row of padding alone is continued."""
    with pytest.raises(DataError, match="prompt 1 has no token"):
        Engine(forests.language_model("llama")).speak([PROMPTS[0], PROMPTS[0][:0]], Sampling())


@pytest.mark.parametrize(
    "knobs", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_settings_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    """Breaks when a setting takes what it cannot mean."""
    with pytest.raises(RecipeError, match=next(iter(knobs))):
        Sampling(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [True, False])
def test_generation_leaves_the_training_mode_as_it_was(mode: bool) -> None:
    """Breaks when a sample in the middle of a run switches its dropout off, or draws with dropout on."""
    model = forests.language_model("llama")
    model.attach(LoRA(rank=4, dropout=0.5).attach(model.sites))
    forests.shake(model.attachments["default"].named_parameters().values())
    expected = Engine(model).speak(PROMPTS, Sampling(max_new_tokens=3))
    model.train(mode)
    assert Engine(model).speak(PROMPTS, Sampling(max_new_tokens=3))[0].log_probs == expected[0].log_probs
    assert model.module.training is mode
    assert all(edit.training is mode for edit in model.attachments["default"].edits)


def test_generation_with_attachments_off_is_the_base() -> None:
    """Breaks when a cache or a root of the adapter outlives its switch."""
    for name in ADAPTERS:
        model, base = adapted("llama", name), forests.language_model("llama")
        with model.without_attachments():
            found = Engine(model).speak(PROMPTS, Sampling(max_new_tokens=4))
        expected = Engine(base).speak(PROMPTS, Sampling(max_new_tokens=4))
        assert [each.log_probs for each in found] == [each.log_probs for each in expected]


def test_a_recurrent_model_speaks_from_its_own_state() -> None:
    """Breaks when the state is dropped between tokens, or padding enters it."""
    model = LanguageModel(forests.mamba(), source="tiny/mamba", digest="")
    answers = Engine(model).speak(PROMPTS, Sampling(max_new_tokens=6))
    for prompt, spoken in zip(PROMPTS, answers, strict=True):
        whole = torch.from_numpy(np.concatenate([prompt, spoken.tokens]).astype(np.int64))[None]
        log_probs = torch.log_softmax(model.module(input_ids=whole, use_cache=False).logits[0], -1)
        own = log_probs[len(prompt) - 1 : -1].detach()
        assert spoken.tokens.tolist() == own.argmax(-1).tolist()
        np.testing.assert_allclose(spoken.log_probs, own.max(-1).values.numpy(), atol=1e-4)


# ------------------------------------------------------------------------------------------- requests that come and go


def run(engine: Engine, *, most: int = 10_000) -> list[News]:
    """All that an engine tells until nobody is left."""
    told: list[News] = []
    while engine.busy and most:
        told += engine.step()
        most -= 1
    return told


def texts(told: Sequence[News]) -> dict[tuple[int, int], list[int]]:
    """The tokens of each choice of each request."""
    found: dict[tuple[int, int], list[int]] = {}
    for news in told:
        found.setdefault((news.request, news.choice), []).extend(said.token for said in news.said)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pass_tokens", [1, 5, 64])
def test_requests_may_come_at_any_time_and_prompts_be_read_in_pieces(architecture: str, pass_tokens: int) -> None:
    """Breaks when a piece of a prompt sees too little, or a newcomer changes what others say."""
    model = forests.language_model(architecture)
    sampling = Sampling(max_new_tokens=7)
    engine = Engine(model, room=Room(tokens=400, page=4, pass_tokens=pass_tokens, rows=3))
    told: list[News] = []
    for prompt in PROMPTS:
        engine.add(Request(prompt=prompt, sampling=sampling))
        told += engine.step() + engine.step()
    told += run(engine)
    for number, spoken in enumerate(Engine(model).speak(PROMPTS, sampling)):
        assert texts(told)[number, 0] == spoken.tokens.tolist()
    assert engine.counts.held == engine.counts.running == engine.counts.waiting == 0
    assert [news.ended for news in told if news.ended] == ["length"] * len(PROMPTS)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_when_pages_run_out_the_last_gives_way_and_says_the_same_later(name: str) -> None:
    """Breaks when a text that was put back goes on from wrong keys, says a token twice, or never comes back."""
    model = adapted("llama", name)
    sampling = Sampling(max_new_tokens=12, temperature=0.8, seed=3)
    engine = Engine(model, room=Room(tokens=36, page=4, rows=8))
    for prompt in PROMPTS:
        engine.add(Request(prompt=prompt, sampling=sampling))
    crowded = 0
    told: list[News] = []
    while engine.busy:
        before = engine.counts.running
        told += engine.step()
        crowded += engine.counts.running < before and not any(news.ended for news in told[-before:])
    for number, prompt in enumerate(PROMPTS):
        (spoken,) = Engine(model).speak([prompt], sampling)
        assert texts(told)[number, 0] == spoken.tokens.tolist()
    assert engine.counts.held == 0


@pytest.mark.parametrize(("architecture", "name"), [("llama", "none"), ("llama", "prefix"), ("gpt2", "lora")])
def test_a_prompt_that_many_begin_with_is_read_once(architecture: str, name: str) -> None:
    """Breaks when it is read again, or found under tokens that are not its own."""
    model = adapted(architecture, name)
    common = forests.tokens(RNG, 21)
    prompts = [np.concatenate([common, forests.tokens(RNG, count)]) for count in (1, 5, 2, 9)]
    sampling = Sampling(max_new_tokens=5)
    engine = Engine(model, room=Room(tokens=400, page=4))
    for prompt in prompts:
        engine.add(Request(prompt=prompt, sampling=sampling))
    told = run(engine)
    expected = [Engine(model).speak([prompt], sampling)[0].tokens.tolist() for prompt in prompts]
    assert [texts(told)[number, 0] for number in range(4)] == expected
    assert engine.counts.reused >= 3 * 16
    before = engine.counts.read
    engine.add(Request(prompt=prompts[1], sampling=sampling))
    assert texts(run(engine))[4, 0] == expected[1] and engine.counts.read - before <= 6 + 4
    engine.forget()
    before = engine.counts.read
    engine.add(Request(prompt=prompts[1], sampling=sampling))
    assert texts(run(engine))[5, 0] == expected[1] and engine.counts.read - before >= 26


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_a_text_that_is_longer_than_all_room_runs_where_every_layer_has_a_window(name: str) -> None:
    """Breaks when pages that no window sees are kept, or one goes that is seen still; with others beside it too."""
    model = adapted("mistral", name)
    prompt, sampling = forests.tokens(np.random.default_rng(5), 70), Sampling(max_new_tokens=40)
    room = Room(tokens=24, page=4, pass_tokens=16)
    for others in ([], PROMPTS[:2]):
        engine = Engine(model, room=room)
        for each in [prompt, *others]:
            engine.add(Request(prompt=each, sampling=sampling))
        told = []
        while engine.busy:
            told += engine.step()
            assert engine.counts.held <= room.pages
            if not others and told:
                # A window of 6 lies in 3 pages at most.
                assert engine.counts.held <= 3
        said = [each for news in told if news.request == 0 for each in news.said]
        spoken = Spoken(np.array([each.token for each in said], np.int32), [each.log_prob for each in said], "length")
        assert len(said) == 40
        check_against_full_forwards(model, prompt, spoken)
        assert engine.counts.held == 0


def test_room_is_counted_by_what_windows_see() -> None:
    """Breaks when a long text is refused that fits, or one is taken that never will, as of a layer that sees all."""
    long = Request(prompt=forests.tokens(RNG, 70), sampling=Sampling(max_new_tokens=100))
    for architecture, fits in (("mistral", True), ("gemma2", False), ("llama", False)):
        model = forests.language_model(architecture)
        gate = Gate(model, Room(tokens=24, page=4), reads_text=False, pooled=False)
        if fits:
            gate.check(long, "it")
        else:
            with pytest.raises(DataError, match="the cache holds 24"):
                gate.check(long, "it")
    gate = Gate(forests.language_model("mistral"), Room(tokens=8, page=4), reads_text=False, pooled=False)
    with pytest.raises(DataError, match="the cache holds 8"):
        gate.check(long, "it")


def test_after_a_step_of_training_the_same_engine_speaks_with_the_new_weights() -> None:
    """Breaks when keys of old weights are read, or the engine holds a copy of the model."""
    model = adapted("llama", "lora")
    engine = Engine(model, room=Room(tokens=400, page=4))
    engine.add(Request(prompt=PROMPTS[2], sampling=Sampling(max_new_tokens=6)))
    run(engine)
    forests.shake(model.attachments["default"].named_parameters().values(), seed=8)
    engine.forget()
    engine.add(Request(prompt=PROMPTS[2], sampling=Sampling(max_new_tokens=6)))
    told = run(engine)
    said = [each for news in told for each in news.said]
    spoken = Spoken(np.array([each.token for each in said], np.int32), [each.log_prob for each in said], "length")
    check_against_full_forwards(model, PROMPTS[2], spoken)


@pytest.mark.parametrize("rows", [2, 8])
def test_choices_of_a_request_share_its_prompt_and_are_what_each_would_be_alone(rows: int) -> None:
    """Breaks when twins write into each other's last page, or draw each other's numbers."""
    model = forests.language_model("llama")
    sampling = Sampling(max_new_tokens=9, temperature=1.0, seed=5)
    engine = Engine(model, room=Room(tokens=400, page=4, rows=rows))
    engine.add(Request(prompt=PROMPTS[2], sampling=sampling, choices=4))
    told = run(engine)
    expected = Engine(model).speak([PROMPTS[2]] * 4, sampling)
    assert [texts(told)[0, choice] for choice in range(4)] == [each.tokens.tolist() for each in expected]
    if rows == 8:
        assert engine.counts.read == len(PROMPTS[2]) + 4 * 8
    assert engine.counts.held == 0


def test_of_many_the_best_are_told_likeliest_first() -> None:
    """Breaks when the best are chosen by another measure, or told one by one before all are known."""
    model = forests.language_model("llama")
    sampling = Sampling(max_new_tokens=6, temperature=1.3, seed=1)
    engine = Engine(model)
    engine.add(Request(prompt=PROMPTS[0], sampling=sampling, choices=2, best_of=6))
    told = run(engine)
    every = Engine(model).speak([PROMPTS[0]] * 6, sampling)
    ranked = sorted(every, key=lambda each: -sum(each.log_probs) / len(each.log_probs))
    assert [news.choice for news in told] == [0, 1]
    assert [[said.token for said in news.said] for news in told] == [each.tokens.tolist() for each in ranked[:2]]


def test_a_cancelled_request_gives_its_pages_back_at_once() -> None:
    """Breaks when a client that went away keeps memory or is told more, or others are disturbed."""
    model = forests.language_model("llama")
    sampling = Sampling(max_new_tokens=20)
    engine = Engine(model, room=Room(tokens=400, page=4, rows=2))
    for prompt in PROMPTS[:3]:
        engine.add(Request(prompt=prompt, sampling=sampling, choices=1))
    engine.step()
    engine.step()
    held = engine.counts.held
    assert engine.cancel(0) and not engine.cancel(0) and not engine.cancel(99)
    assert engine.counts.held < held
    assert engine.cancel(2)
    told = run(engine)
    assert [(news.request, news.ended) for news in told if news.ended] == [
        (0, "cancelled"), (2, "cancelled"), (1, "length"),
    ]  # fmt: skip
    assert engine.counts.held == engine.counts.waiting == engine.counts.running == 0


@pytest.mark.parametrize(("architecture", "name"), [("llama", "none"), ("gpt2", "prefix"), ("mistral", "lora")])
@pytest.mark.parametrize("pass_tokens", [4, 512])
def test_log_probabilities_of_a_prompt_are_those_of_a_forward(architecture: str, name: str, pass_tokens: int) -> None:
    """Breaks when a token is told by the wrong state, twice, or not at all where its page was found."""
    model = adapted(architecture, name)
    engine = Engine(model, room=Room(tokens=400, page=4, pass_tokens=pass_tokens))
    prompt = PROMPTS[2]
    for _ in range(2):
        asked = Sampling(max_new_tokens=1, prompt_log_probs=True)
        number = engine.add(Request(prompt=prompt, sampling=asked, choices=2))
        (told,) = [news.prompt for news in run(engine) if news.prompt is not None]
        log_probs = torch.log_softmax(forests.logits(model, prompt), -1)[:-1]
        expected = log_probs.gather(1, torch.from_numpy(prompt[1:].astype(np.int64))[:, None])[:, 0]
        assert [said.token for said in told] == prompt[1:].tolist(), number
        np.testing.assert_allclose([said.log_prob for said in told], expected.numpy(), atol=1e-4)


def test_what_can_never_run_is_refused_when_it_is_asked_for() -> None:
    """Breaks when a request waits for ever for room that there is not."""
    engine = Engine(forests.language_model("llama"), room=Room(tokens=16, page=4))
    with pytest.raises(DataError, match="the cache holds 16"):
        engine.add(Request(prompt=PROMPTS[0], sampling=Sampling(max_new_tokens=9)))
    with pytest.raises(RecipeError, match="names the adapter 'a'"):
        engine.add(Request(prompt=PROMPTS[0], sampling=Sampling(max_new_tokens=1), adapter="a"))
    with pytest.raises(RecipeError, match="room.page is 0"):
        Room(tokens=16, page=0)
    assert not engine.busy


def test_a_token_below_0_is_told_when_it_is_asked_for() -> None:
    """Breaks when it comes up inside a step, which is everybody's."""
    engine = Engine(forests.language_model("llama"))
    with pytest.raises(RecipeError, match="token -1 has no row"):
        engine.add(Request(prompt=np.array([-1, 6], np.int32)))


def test_an_answer_as_long_as_the_context_takes_no_more_room_than_that() -> None:
    """Breaks when room is taken for what was asked for and cannot be said."""
    model = forests.language_model("gpt2")
    left = (model.context_tokens or 0) - len(PROMPTS[0])
    [[spoken]] = Engine(model).answer([Request(prompt=PROMPTS[0], sampling=Sampling(max_new_tokens=10**9))])
    assert len(spoken.tokens) == left > 0 and spoken.ended == "length"


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_step_that_breaks_off_ends_what_it_was_at(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when an engine stays busy for ever with what it cannot go on with, or keeps its pages."""
    paged = forests.language_model("llama")
    model = paged if kind == "llama" else LanguageModel(forests.mamba(), source="tiny/mamba", digest="")
    engine = Engine(model)
    sampling = Sampling(max_new_tokens=4)
    expected = [each.tokens.tolist() for each in engine.speak(PROMPTS[:2], sampling)]
    for request in (Request(prompt=PROMPTS[0], choices=2), Request(prompt=PROMPTS[1], beams=2),
                    Request(prompt=PROMPTS[2], best_of=3)):  # fmt: skip
        engine.add(request)
    engine.step()

    @wraps(model.module.forward)
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the pass is broken")

    with monkeypatch.context() as patched:
        patched.setattr(model.module, "forward", broken)
        patched.setattr("luthier.infer.reader.flat_hidden", broken)
        with pytest.raises(RuntimeError, match="the pass is broken"):
            engine.step()
    told = [news for news in run(engine) if news.ended]
    assert {news.request for news in told} == {2, 3, 4} and {news.ended for news in told} == {"failed"}
    assert all("the pass is broken" in str(news.failure) for news in told)
    assert engine.counts.held == engine.counts.waiting == engine.counts.running == 0 and not engine.busy
    assert [each.tokens.tolist() for each in engine.speak(PROMPTS[:2], sampling)] == expected


class Every(Guide):
    """Lets every token through until it fails."""

    def __init__(self, fails_at: int) -> None:
        self.left = fails_at

    def allowed(self) -> Tensor | None:
        if not self.left:
            raise RecipeError("this guide has come to its end", allowed="shorter texts")
        return None

    def said(self, token: int) -> None:
        self.left -= 1


def test_a_guide_that_fails_ends_its_own_request_and_no_other() -> None:
    """Breaks when one client's grammar ends everybody's texts, or its failure is told to nobody."""
    model = forests.language_model("llama")
    engine = Engine(model, room=Room(tokens=400, page=4))
    sampling = Sampling(max_new_tokens=6)
    for prompt in PROMPTS[:2]:
        engine.add(Request(prompt=prompt, sampling=sampling))
    failing = engine.add(Request(prompt=PROMPTS[2], sampling=sampling, guide=lambda: Every(3), choices=2))
    told = run(engine)
    expected = Engine(model).speak(PROMPTS[:2], sampling)
    assert [texts(told)[number, 0] for number in range(2)] == [each.tokens.tolist() for each in expected]
    ended = [news for news in told if news.request == failing and news.ended]
    assert [news.ended for news in ended] == ["failed"] * 2 and "come to its end" in str(ended[0].failure)
    assert engine.counts.held == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("tokens", [400, 60])
def test_with_drafts_the_text_is_the_same_in_fewer_passes(architecture: str, temperature: float, tokens: int) -> None:
    """Breaks when a draft is believed, its keys stay where it was wrong, or a page is missing behind it."""
    model = forests.language_model(architecture)
    # Prompts that repeat themselves, so that something is drafted.
    prompts = [np.concatenate([prompt] * 3) for prompt in PROMPTS[1:4]]
    sampling = Sampling(max_new_tokens=40 if tokens == 400 else 12, temperature=temperature, seed=6)
    plain, drafting = (Engine(model, room=Room(tokens=tokens, page=4)) for _ in range(2))
    passes = {}
    for engine, drafts in ((plain, 0), (drafting, 5)):
        for prompt in prompts:
            engine.add(Request(prompt=prompt, sampling=sampling, drafts=drafts))
        told = []
        count = 0
        while engine.busy:
            told += engine.step()
            count += 1
        passes[drafts] = (count, texts(told))
        assert engine.counts.held == 0
    assert passes[5][1] == passes[0][1]
    if temperature == 0 and tokens == 400:
        assert passes[5][0] < passes[0][0]
