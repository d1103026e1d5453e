"""Untrained rows of control tokens: each way a row can be untrained is found, and no trained row is called so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.data.forest import Ints
from luthier.data.tokenizer import Tokenizer
from luthier.model import special_tokens
from luthier.model.language_model import LanguageModel
from luthier.model.load import load_model, resolve_source
from luthier.model.special_tokens import Examination, Use, examine
from tests import forests
from tests.forests import ARCHITECTURES

SIZE, WIDTH, SIGMA = 1024, 64, 0.02
STOP, ROLE = 5, 6
WORDS = np.arange(40, SIZE, dtype=np.int32)
UNUSED = np.arange(10, 40, dtype=np.int32)
SEEDLING_WORDS = np.arange(7, 4096, dtype=np.int32)
Damage = Callable[[Tensor, torch.Generator], None]


def grown(*, tied: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model whose rows look learned: they share directions, their norms vary, control tokens are among them."""
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=tied, initializer_range=SIGMA, pad_token_id=0, bos_token_id=None,
        eos_token_id=STOP,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in {module.get_input_embeddings().weight, module.get_output_embeddings().weight}:
                weight.copy_(learned(SIZE))
    return LanguageModel(module.to(dtype).eval(), source="grown", digest="")


def learned(count: int) -> Tensor:
    """Rows with a decaying spectrum and log-normal norms, about four times as long as fresh ones."""
    spectrum = torch.arange(1, WIDTH + 1).float().pow(-0.7)
    rows = torch.nn.functional.normalize(torch.randn(count, WIDTH) * spectrum, dim=1)
    return rows * 4 * SIGMA * math.sqrt(WIDTH) * (0.2 * torch.randn(count, 1)).exp()


def looked_at(model: LanguageModel, uses: Sequence[Use] | None = None, *, unused: Ints = UNUSED) -> Examination:
    """The examination of the stop token and a role marker."""
    both = [Use(STOP, "<|end|>", True, True, True), Use(ROLE, "<|user|>", True, False, False)]
    return examine(model, both if uses is None else uses, words=WORDS, unused=unused)


def fresh(weight: Tensor, generator: torch.Generator) -> None:
    """The row is as transformers makes one."""
    weight[STOP] = SIGMA * torch.randn(WIDTH, generator=generator)


def loud(weight: Tensor, generator: torch.Generator) -> None:
    """The row is as torch makes one: a hundred times longer."""
    weight[STOP] = torch.randn(WIDTH, generator=generator)


def zero(weight: Tensor, generator: torch.Generator) -> None:
    """The row is zero."""
    weight[STOP] = 0


def faded(weight: Tensor, generator: torch.Generator) -> None:
    """Weight decay has shrunk a row that nothing else moved."""
    weight[STOP] *= 0.05


def average(weight: Tensor, generator: torch.Generator) -> None:
    """A resize filled the row with the mean."""
    weight[STOP] = weight[40:].mean(0) + 1e-5 * torch.randn(WIDTH, generator=generator)


def copied(weight: Tensor, generator: torch.Generator) -> None:
    """A resize filled the row with that of another control token."""
    weight[STOP] = weight[12]


def among_unused(weight: Tensor, generator: torch.Generator) -> None:
    """The softmax has pushed all tokens that never come the same way."""
    pushed = learned(1)[0]
    pushed = pushed * float(weight[40:].norm(dim=1).median() / pushed.norm())
    noise = SIGMA * torch.randn(31, WIDTH, generator=generator)
    weight[10:40] = pushed + noise[:30]
    weight[STOP] = pushed + noise[30]


DAMAGES: dict[Damage, str] = {
    fresh: "it is noise|times shorter", loud: "it is noise", zero: "it is zero", faded: "times shorter",
    average: "the mean of the other rows", copied: "exactly the row of token 12",
    among_unused: "among the rows of 30 control tokens",
}  # fmt: skip
each_damage = pytest.mark.parametrize(("damage", "words"), DAMAGES.items(), ids=[each.__name__ for each in DAMAGES])


@each_damage
@pytest.mark.parametrize("tied", [True, False])
def test_each_way_of_being_untrained_is_found_and_named(damage: Damage, words: str, tied: bool) -> None:
    """Breaks when a row that nothing trained passes for a learned one, or another token is blamed."""
    model = grown(tied=tied)
    assert looked_at(model).findings == ()
    ends = model.sites.role("embed", "head")
    with torch.no_grad():
        damage(ends[-1].weight_parameter, torch.Generator().manual_seed(1))
    (finding,) = looked_at(model).findings
    assert (finding.id, finding.text, finding.stops, finding.in_training) == (STOP, "<|end|>", True, False)
    assert finding.place == ("embedding and output head" if tied else "output head")
    assert any(part in finding.why for part in words.split("|")), finding.why
    assert math.isclose(finding.norm, float(ends[-1].weight()[STOP].norm()), rel_tol=1e-5)
    assert 0.7 < finding.median / (4 * SIGMA * math.sqrt(WIDTH)) < 1.4


def test_most_rows_of_noise_are_found_whatever_their_length_and_no_word_is() -> None:
    """Breaks when the test of noise misses what it is for (fresh rows: all) or calls trained rows noise."""
    found = {"fresh": 0, "loud": 0, "words": 0}
    model = grown(tied=True)
    weight = model.sites.role("embed")[0].weight_parameter
    kept = weight.detach().clone()
    for trial in range(40):
        generator = torch.Generator().manual_seed(trial)
        for name, damage in (("fresh", fresh), ("loud", loud)):
            with torch.no_grad():
                damage(weight, generator)
            found[name] += len(looked_at(model).findings)
    with torch.no_grad():
        weight.copy_(kept)
    uses = [Use(int(token), str(token), True, True, False) for token in WORDS[:400]]
    found["words"] = len(examine(model, uses, words=WORDS, unused=UNUSED).findings)
    assert found["fresh"] == 40 and found["loud"] >= 30 and found["words"] <= 4, found


def test_a_row_matters_where_the_token_is_used() -> None:
    """Breaks when BOS is blamed for its row in the head, or a stop token for a row that nobody reads."""
    model = grown(tied=False)
    embed, head = model.sites.role("embed", "head")
    with torch.no_grad():
        head.weight_parameter[ROLE] = 0
        embed.weight_parameter[STOP] = 0
    only_read, only_said = Use(ROLE, "<|user|>", True, False, False), Use(STOP, "<|end|>", False, True, True)
    assert looked_at(model, [only_read, only_said]).findings == ()
    said, read = Use(ROLE, "<|user|>", True, True, False), Use(STOP, "<|end|>", True, True, True)
    assert {(each.id, each.place) for each in looked_at(model, [said, read]).findings} == {
        (ROLE, "output head"), (STOP, "embedding"),
    }  # fmt: skip


def test_what_an_adapter_trains_is_told() -> None:
    """Breaks when a user is told to train rows that the run trains, or a row outside of it counts as trained."""
    model = grown(tied=False)
    with torch.no_grad():
        for site in model.sites.role("embed", "head"):
            site.weight_parameter[STOP] = 0
            site.weight_parameter[ROLE] = 0
    expected = {"none": [False] * 3, "stop": [True, False, True], "embed": [True, False, False], "full": [True] * 3}
    adapters = {
        "stop": LoRA(trainable_tokens=(STOP,)),
        "embed": LoRA(trainable_tokens=(STOP,), trainable_token_targets=("embed",)),
        "full": Full(),
        "none": LoRA(),
    }
    for name, adapter in adapters.items():
        model.attach(adapter.attach(model.sites))
        assert [finding.in_training for finding in looked_at(model).findings] == expected[name], name
        model.detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_said_of_a_base_whose_words_are_noise(architecture: str) -> None:
    """Breaks when an untrained model raises an alarm, or is taken for one that knows its tokens."""
    model = forests.language_model(architecture)
    use = Use(1, "<|end|>", True, True, True)
    found = examine(model, [use], words=np.arange(3, 128, dtype=np.int32), unused=np.array([0], np.int32))
    assert found.findings == () and found.tested == (use,)
    (why,) = found.skipped
    assert "untrained" in why and found.skipped[why][0].startswith("embedding")


def test_too_few_words_are_no_population() -> None:
    """Breaks when a handful of rows decides about another one."""
    found = examine(grown(tied=True), [Use(STOP, "x", True, True, True)], words=WORDS[:50], unused=UNUSED)
    (why,) = found.skipped
    assert found.findings == () and "too few" in why


def test_the_examination_leaves_the_random_numbers_and_the_model_alone() -> None:
    """Breaks when a plan changes the run it describes."""
    model = grown(tied=True)
    before, state = forests.snapshot(model.module), torch.get_rng_state()
    first, second = looked_at(model), looked_at(model)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state) and forests.snapshot(model.module) == before


def test_rows_in_bfloat16_are_measured_in_float32() -> None:
    """Breaks when rounding of the base makes trained rows look like one another."""
    model = grown(tied=True, dtype=torch.bfloat16)
    assert looked_at(model).findings == ()
    with torch.no_grad():
        fresh(model.sites.role("embed")[0].weight_parameter, torch.Generator().manual_seed(2))
    assert [finding.id for finding in looked_at(model).findings] == [STOP]


# -------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The sigma of each population that was worked out, in order, with a cache that knows none of them."""
    monkeypatch.setattr(special_tokens, "cache_folder", lambda: tmp_path / "cache")  # kernels stay where they are
    seen: list[float] = []
    population = special_tokens._population

    def noting(rows: Tensor, sigma: float, generator: torch.Generator) -> special_tokens._Population | str:
        seen.append(sigma)
        return population(rows, sigma, generator)

    monkeypatch.setattr(special_tokens, "_population", noting)
    return seen


def damaged(damage: Damage) -> LanguageModel:
    """A tied model with a damaged stop token."""
    model = grown(tied=True)
    with torch.no_grad():
        damage(model.sites.role("embed")[0].weight_parameter, torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("damage", [fresh, loud, zero, faded, lambda weight, generator: None])
def test_the_same_rows_are_looked_at_once(damage: Damage, compared: list[float]) -> None:
    """Breaks when a second start says something else, or works it out again."""
    first = looked_at(damaged(damage))
    assert looked_at(damaged(damage)) == first and len(compared) == 1
    assert bool(first.findings) == (damage in (fresh, loud, zero, faded))


def test_why_nothing_can_be_said_is_remembered_too(compared: list[float]) -> None:
    """Breaks when an untrained base, whose words are noise, is measured at each start."""
    use = Use(1, "<|end|>", True, True, True)
    made = [
        examine(forests.language_model("llama"), [use], words=np.arange(3, 128, dtype=np.int32),
                unused=np.array([0], np.int32))
        for _ in range(2)
    ]  # fmt: skip
    assert made[0] == made[1] and made[0].skipped and len(compared) == len(made[0].skipped[next(iter(made[0].skipped))])


@pytest.mark.parametrize("token", [STOP, ROLE, int(UNUSED[3]), int(WORDS[-1])])
def test_another_row_anywhere_is_looked_at_anew(token: int, compared: list[float]) -> None:
    """Breaks when what is said of rows outlives them."""
    looked_at(grown(tied=True))
    other = grown(tied=True)
    with torch.no_grad():
        other.sites.role("embed")[0].weight_parameter[token, 7] += 1e-3
    looked_at(other)
    assert len(compared) == 2


def test_other_names_other_tokens_and_another_sigma_are_looked_at_anew(compared: list[float]) -> None:
    """Breaks when a finding names the token of another tokenizer, or is measured by another config."""
    model = grown(tied=True)
    looked_at(model)
    looked_at(model, [Use(STOP, "<|stop|>", True, True, True), Use(ROLE, "<|user|>", True, False, False)])
    looked_at(model, [Use(STOP, "<|end|>", True, True, True)])
    looked_at(model, unused=UNUSED[:-1])
    model.module.config.initializer_range = 0.05
    looked_at(model)
    assert len(compared) == 5


@pytest.mark.parametrize("text", ["{", "[]", '{"median": "1"}', '{"median": 1.0, "rows": [[5, 3, 1.0]]}'])
def test_a_damaged_memory_is_found_out_anew(text: str, compared: list[float], tmp_path: Path) -> None:
    """Breaks when a file that was cut short stops a start, or stays."""
    first = looked_at(damaged(fresh))
    (path,) = (tmp_path / "cache" / special_tokens.FOLDER).iterdir()
    whole = path.read_text("utf-8")
    path.write_text(text, "utf-8")
    assert looked_at(damaged(fresh)) == first
    assert len(compared) == 2 and path.read_text("utf-8") == whole


# ------------------------------------------------------------------------------------------------- a trained base


@pytest.fixture(scope="module")
def seedling() -> tuple[LanguageModel, Tokenizer]:
    """The small base model that ships with luthier."""
    return load_model("seedling"), Tokenizer.load(resolve_source("seedling"))


def seedling_uses(tokenizer: Tokenizer) -> list[Use]:
    """The control tokens of its template: begin, end, system, user, assistant."""
    return [Use(token, tokenizer.decode([token]), True, token == 1, token == 1) for token in (0, 1, 3, 4, 5)]


def test_the_trained_control_tokens_of_the_seedling_raise_no_alarm(seedling: tuple[LanguageModel, Tokenizer]) -> None:
    """Breaks when a base that has learned its template is called untrained."""
    model, tokenizer = seedling
    found = examine(model, seedling_uses(tokenizer), words=SEEDLING_WORDS, unused=np.array([2, 6], np.int32))
    assert found.findings == () and found.skipped == {}


def test_one_row_of_fresh_noise_in_the_seedling_is_found(seedling: tuple[LanguageModel, Tokenizer]) -> None:
    """Breaks when real rows hide a fresh one. Its pad and tool tokens were never in its texts, and that shows too."""
    model, tokenizer = seedling
    weight = model.sites.role("embed")[0].weight_parameter
    kept = weight[1].clone()
    try:
        for trial in range(10):
            with torch.no_grad():
                noise = torch.randn(len(kept), generator=torch.Generator().manual_seed(trial))
                weight[1] = (0.02 * noise).to(weight.dtype)
            found = examine(model, seedling_uses(tokenizer), words=SEEDLING_WORDS, unused=np.array([2, 6], np.int32))
            assert [(each.id, each.text) for each in found.findings] == [(1, "<|end|>")], trial
    finally:
        with torch.no_grad():
            weight[1] = kept
    tool = Use(6, "<|tool|>", True, False, False)
    (finding,) = examine(model, [tool], words=SEEDLING_WORDS, unused=np.array([2], np.int32)).findings
    assert finding.why == "it is nearly the row of token 2, so one of the two was never learned by itself"
