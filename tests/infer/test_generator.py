"""Generation with a cache against forwards without one: tokens, log-probabilities, distributions, and every end."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from luthier.adapters import Adapter
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Forest, Ints, row_tree
from luthier.infer.generator import Generator
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
    answers = Generator(model).speak(PROMPTS, Sampling(max_new_tokens=9))
    for prompt, spoken in zip(PROMPTS, answers, strict=True):
        assert len(spoken.tokens) == len(spoken.log_probs) == 9 and spoken.ended == "length"
        check_against_full_forwards(model, prompt, spoken)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_log_probabilities_are_those_the_trainer_computes(name: str) -> None:
    """Breaks when generation and training disagree about the model they share."""
    model = adapted("mistral", name)
    (spoken,) = Generator(model).speak(PROMPTS[:1], Sampling(max_new_tokens=6, temperature=1.0, seed=4))
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
    alone = [Generator(model).speak([prompt], Sampling(max_new_tokens=8))[0] for prompt in PROMPTS]
    together = Generator(model, batch_rows=batch_rows).speak(PROMPTS, Sampling(max_new_tokens=8))
    assert [each.tokens.tolist() for each in together] == [each.tokens.tolist() for each in alone]
    sampled = Sampling(max_new_tokens=8, temperature=1.0, seed=2)
    expected = [each.tokens.tolist() for each in Generator(model).speak(PROMPTS, sampled)]
    found = [each.tokens.tolist() for each in Generator(model, batch_rows=batch_rows).speak(PROMPTS, sampled)]
    assert found == expected
    assert Generator(model).speak(PROMPTS[:1], sampled)[0].tokens.tolist() == expected[0]


def test_a_seed_is_a_text_and_the_global_generator_is_left_alone() -> None:
    """Breaks when sampling reads or moves torch's own generator, or the seed is not read."""
    generator = Generator(forests.language_model("llama"))
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
    answers = Generator(model, batch_rows=draws).speak([PROMPTS[1]] * draws, sampling)
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
    generator = Generator(forests.language_model("llama"))
    greedy = [each.tokens.tolist() for each in generator.speak(PROMPTS, Sampling(max_new_tokens=5))]
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        answers = generator.speak(PROMPTS, Sampling(max_new_tokens=5, temperature=1.0, **cut))  # type: ignore[arg-type]
        assert [each.tokens.tolist() for each in answers] == greedy


def test_every_row_ends_at_its_own_stop() -> None:
    """Breaks when a stop token is left out, or one row's stop ends or cuts another."""
    model = forests.language_model("llama")
    free = Generator(model).speak(PROMPTS, Sampling(max_new_tokens=10))
    stop = int(free[0].tokens[3])
    stopped = Generator(model).speak(PROMPTS, Sampling(max_new_tokens=10, stop_ids=(stop,)))
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
    free = Generator(model).speak(PROMPTS[:1], Sampling(**sampled))[0].tokens.tolist()  # type: ignore[arg-type]
    text = f"{free[2]}><{free[3]}"
    stopping = Sampling(**sampled, stop=("never", text))  # type: ignore[arg-type]
    (spoken,) = Generator(model, decode=decode).speak(PROMPTS[:1], stopping)
    assert spoken.tokens.tolist() == free[:4] and spoken.ended == "stop"
    with pytest.raises(DataError, match="no tokenizer"):
        Generator(model).speak(PROMPTS, Sampling(stop=("a",)))


@pytest.mark.parametrize(("architecture", "name"), [("llama", "none"), ("gpt2", "none"), ("gpt2", "prefix")])
def test_each_row_may_fill_the_context_whatever_shares_its_batch(architecture: str, name: str) -> None:
    """Breaks when a long neighbour cuts a short row, or a row that has ended runs past the last position."""
    model = adapted(architecture, name)
    root = 4 if name == "prefix" else 0
    prompts = [forests.tokens(RNG, count) for count in (240 - root, 250 - root, 255 - root)]
    answers = Generator(model).speak(prompts, Sampling(max_new_tokens=12))
    assert [len(each.tokens) for each in answers] == [12, 6, 1] and {each.ended for each in answers} == {"length"}
    for prompt, spoken in zip(prompts, answers, strict=True):
        check_against_full_forwards(model, prompt, Spoken(spoken.tokens[:-1], spoken.log_probs[:-1], "length"))
    for length in (256 - root, 300):
        with pytest.raises(DataError, match=f"fewer than {256 - root}"):
            Generator(model).speak([forests.tokens(RNG, length)], Sampling(max_new_tokens=1))


def test_an_empty_prompt_is_an_error() -> None:
    """Breaks when a row of padding alone is continued."""
    with pytest.raises(DataError, match="prompt 1 has no token"):
        Generator(forests.language_model("llama")).speak([PROMPTS[0], PROMPTS[0][:0]], Sampling())


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
    expected = Generator(model).speak(PROMPTS, Sampling(max_new_tokens=3))
    model.train(mode)
    assert Generator(model).speak(PROMPTS, Sampling(max_new_tokens=3))[0].log_probs == expected[0].log_probs
    assert model.module.training is mode
    assert all(edit.training is mode for edit in model.attachments["default"].edits)


def test_generation_with_attachments_off_is_the_base() -> None:
    """Breaks when a cache or a root of the adapter outlives its switch."""
    for name in ADAPTERS:
        model, base = adapted("llama", name), forests.language_model("llama")
        with model.without_attachments():
            found = Generator(model).speak(PROMPTS, Sampling(max_new_tokens=4))
        expected = Generator(base).speak(PROMPTS, Sampling(max_new_tokens=4))
        assert [each.log_probs for each in found] == [each.log_probs for each in expected]


def test_a_recurrent_model_speaks_from_its_own_state() -> None:
    """Breaks when the state is dropped between tokens, or padding enters it."""
    model = LanguageModel(forests.mamba(), source="tiny/mamba", digest="")
    answers = Generator(model).speak(PROMPTS, Sampling(max_new_tokens=6))
    for prompt, spoken in zip(PROMPTS, answers, strict=True):
        whole = torch.from_numpy(np.concatenate([prompt, spoken.tokens]).astype(np.int64))[None]
        log_probs = torch.log_softmax(model.module(input_ids=whole, use_cache=False).logits[0], -1)
        own = log_probs[len(prompt) - 1 : -1].detach()
        assert spoken.tokens.tolist() == own.argmax(-1).tolist()
        np.testing.assert_allclose(spoken.log_probs, own.max(-1).values.numpy(), atol=1e-4)
