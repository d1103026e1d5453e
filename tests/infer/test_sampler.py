"""Choosing tokens: distributions against transformers' processors and closed forms, draws against distributions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, final

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as some
from jaxtyping import Bool
from torch import Tensor

from luthier.core.errors import NumericError, RecipeError
from luthier.data.forest import Ints
from luthier.infer.guides import Guide
from luthier.infer.request import Said
from luthier.infer.sampler import Chooser, choose, choose_drafted, distribution, log_probs_of, require_possible
from luthier.model.speaker import Sampling

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)


def logits_of(seed: int, rows: int, vocabulary: int, *, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def having_said(chooser: Chooser, tokens: list[int]) -> Chooser:
    for token in tokens:
        chooser.take(Said(token, -1.0))
    return chooser


@final
class Only(Guide):
    """Allows the same tokens at every place; of the first ones of a vocabulary."""

    def __init__(self, tokens: set[int], size: int) -> None:
        self.tokens, self.size = tokens, size
        self.heard: list[int] = []

    def allowed(self) -> Bool[Tensor, " V"] | None:
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[list(self.tokens)] = True
        return mask

    def said(self, token: int) -> None:
        self.heard.append(token)


def expected(sampling: Sampling, said: list[int], scores: Tensor) -> Tensor:
    """What transformers draws from, with the penalties it does not have by their formula, in float64."""
    before = torch.tensor([[*PROMPT.tolist(), *said]])
    scores = scores.double()[None]
    if sampling.repetition_penalty != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(before, scores)
    for token in set(said):
        scores[0, token] -= sampling.presence_penalty + said.count(token) * sampling.frequency_penalty
    for token, bias in sampling.logit_bias:
        scores[0, token] += bias
    if len(said) < sampling.min_new_tokens:
        scores[0, list(sampling.stop_ids)] = float("-inf")
    steps: list[Any] = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(transformers.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        scores = step(before, scores)
    return torch.softmax(scores[0], -1)


@some.composite
def samplings(draw: some.DrawFn, vocabulary: int) -> dict[str, Any]:
    """Settings; made a Sampling in the test, because the checks of its shapes draw numbers themselves."""
    some_bias = some.tuples(some.integers(0, vocabulary - 1), some.floats(-5, 5))
    return {
        "temperature": draw(some.sampled_from([0.3, 0.7, 1.0, 2.5])),
        "top_k": draw(some.sampled_from([0, 0, 1, 2, 7, 40, vocabulary, 10 * vocabulary])),
        "top_p": draw(some.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.05, 1e-6])),
        "min_p": draw(some.sampled_from([0.0, 0.0, 0.01, 0.2, 0.9])),
        "repetition_penalty": draw(some.sampled_from([1.0, 1.0, 1.3, 0.8])),
        "presence_penalty": draw(some.sampled_from([0.0, 0.0, 0.7, -1.1])),
        "frequency_penalty": draw(some.sampled_from([0.0, 0.0, 0.4, -0.6])),
        "logit_bias": tuple(draw(some.lists(some_bias, max_size=3))),
        "min_new_tokens": draw(some.integers(0, 6)),
        "stop_ids": tuple(draw(some.sets(some.integers(0, 3), max_size=2))),
        "likeliest": draw(some.integers(0, 3)),
    }


@given(data=some.data(), seed=some.integers(0, 2**30), vocabulary=some.sampled_from([8, 100, 3000, 20_003]))
def test_distributions_are_those_of_transformers_and_of_the_formulas(
    data: some.DataObject, seed: int, vocabulary: int
) -> None:
    """Breaks when a penalty, a cut or their order is another, or rows of a batch get each other's settings."""
    rows = [Sampling(**each) for each in data.draw(some.lists(samplings(vocabulary), min_size=1, max_size=4))]
    scores = logits_of(seed, len(rows), vocabulary, scale=data.draw(some.sampled_from([0.1, 1.0, 6.0])))
    said = [data.draw(some.lists(some.integers(0, 7), max_size=9)) for _ in rows]
    choosers = [having_said(Chooser(row, PROMPT), before) for row, before in zip(rows, said, strict=True)]
    kept = scores.clone()
    found = distribution(choosers, scores)
    for row, before, own, chances in zip(rows, said, scores, found, strict=True):
        # Sums in float32 may put a token on the other side of a nucleus's edge: one that lies within their rounding.
        nudges = (1, 1 - 3e-6, 1 + 3e-6) if row.top_p < 1 else (1,)
        near = [replace(row, top_p=min(1.0, row.top_p * nudge)) for nudge in nudges]
        assert any(torch.allclose(chances.double(), expected(one, before, own), atol=1e-5, rtol=0) for one in near)
    told = choose(choosers, scores)
    assert torch.equal(scores, kept)
    log_probs = torch.log_softmax(scores, -1)
    for row, own, chances, one, chooser in zip(rows, log_probs, found, told, choosers, strict=True):
        assert chances[one.token] > 0 and chooser.said[-1] == one.token and chooser.log_probs[-1] == one.log_prob
        assert one.log_prob == pytest.approx(float(own[one.token]), abs=1e-5)
        best = own.topk(row.likeliest)
        assert [token for token, _ in one.likeliest] == best.indices.tolist()
        np.testing.assert_allclose([value for _, value in one.likeliest], best.values.numpy(), atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 6.0])
@pytest.mark.parametrize(
    "cut",
    [
        {"top_p": 0.3},
        {"top_p": 0.05, "temperature": 2.0},
        {"top_k": 300, "top_p": 0.4},
        {"top_k": 5000, "top_p": 0.9},
        {"top_k": 256, "min_p": 0.3},
        {"min_p": 0.001},
    ],
)
def test_cuts_of_any_width_are_those_of_transformers(cut: dict[str, Any], scale: float) -> None:
    """Breaks when a cut that lies beyond the likeliest tokens looked at first is taken to lie among them."""
    sampling = Sampling(**{"temperature": 1.0, **cut})
    scores = logits_of(11, 1, 20_003, scale=scale)
    found = distribution([Chooser(sampling, PROMPT)], scores)[0]
    torch.testing.assert_close(found.double(), expected(sampling, [], scores[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cut", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 400}])
def test_a_number_draws_the_token_where_the_sum_over_the_vocabulary_reaches_it(cut: dict[str, Any]) -> None:
    """Breaks when the order of the sum is that of a sort, and a seed's text hangs on how a cut is found."""
    sampling = Sampling(**{"temperature": 1.0, **cut})
    scores = logits_of(8, 1, 3000, scale=2.5)
    choosers = [Chooser(sampling, PROMPT, choice=choice) for choice in range(200)]
    sums = expected(sampling, [], scores[0]).cumsum(0)
    numbers = torch.tensor([chooser.uniform() for chooser in choosers], dtype=torch.float64)
    wanted = torch.searchsorted(sums, numbers, right=True)
    told = torch.tensor([said.token for said in choose(choosers, scores.expand(200, -1))])
    # A number next to the border of two tokens may fall to either by rounding.
    assert int((told != wanted).sum()) <= 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, top_k=5),
        Sampling(temperature=1.4, top_p=0.7),
        Sampling(temperature=1.0, min_p=0.1, frequency_penalty=0.5),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Breaks when the inverse of the distribution is off by one, or numbers of neighbouring choices hang together."""
    draws, scores = 10_000, logits_of(1, 1, 60, scale=1.5)
    choosers = [having_said(Chooser(sampling, PROMPT, choice=choice), [2, 2, 9]) for choice in range(draws)]
    chances = distribution(choosers[:1], scores)[0].double().numpy()
    said = [one.token for one in choose(choosers, scores.expand(draws, -1))]
    found = np.bincount(said, minlength=60) / draws
    assert set(said) <= set(np.flatnonzero(chances))
    assert (np.abs(found - chances) <= 5 * np.sqrt(chances * (1 - chances) / draws) + 1e-9).all()


def test_random_numbers_are_even_and_those_of_neighbours_do_not_hang_together() -> None:
    """Breaks when seed, choice and place are mixed so poorly that texts of one request resemble each other."""

    def numbers(seed: int, choice: int) -> list[float]:
        chooser = Chooser(Sampling(seed=seed), PROMPT, choice=choice)
        drawn = []
        for _ in range(100):
            drawn.append(chooser.uniform())
            chooser.take(Said(0, 0.0))
        return drawn

    table = np.array([[numbers(seed, choice) for choice in range(30)] for seed in (*range(20), -1, 2**63)])
    flat = table.ravel()
    assert flat.min() >= 0 and flat.max() < 1 and len(np.unique(flat)) == flat.size
    counts = np.histogram(flat, 50, (0, 1))[0]
    assert ((counts - flat.size / 50) ** 2 / (flat.size / 50)).sum() < 100  # chi-square, 49 degrees: 1 in 30,000
    for axis in range(3):
        left, right = np.delete(table, -1, axis).ravel(), np.delete(table, 0, axis).ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(left.size)


MIXED = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, top_k=9, seed=1),
    Sampling(temperature=1.2, top_p=0.8, seed=2, likeliest=3),
    Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.2, seed=3),
    Sampling(frequency_penalty=0.3, logit_bias=((7, 2.0),)),
    Sampling(temperature=1.0, seed=1),
]


def continued(choosers: list[Chooser], count: int, table: Tensor) -> list[list[int]]:
    """`count` tokens of each, by a model that looks at the last token alone."""
    for _ in range(count):
        last = [chooser.said[-1] if chooser.said else 0 for chooser in choosers]
        choose(choosers, table[last])
    return [chooser.said for chooser in choosers]


def test_a_text_does_not_depend_on_what_else_is_in_the_batch() -> None:
    """Breaks when rows of a batch share numbers or settings, or a greedy neighbour changes the way."""
    table = logits_of(5, 50, 50, scale=1.5)
    alone = [continued([Chooser(one, PROMPT, choice=2)], 30, table)[0] for one in MIXED]
    assert continued([Chooser(one, PROMPT, choice=2) for one in MIXED], 30, table) == alone
    backwards = continued([Chooser(one, PROMPT, choice=2) for one in reversed(MIXED)], 30, table)
    assert backwards == list(reversed(alone)) and alone[1] == alone[6]
    others = continued([Chooser(MIXED[1], PROMPT, choice=choice) for choice in range(20)], 30, table)
    assert len({tuple(each) for each in others}) == 20 and others[2] == alone[1]


def test_all_greedy_is_the_best_of_each_row_also_in_bfloat16() -> None:
    """Breaks when log-probabilities are computed in the logits' own precision."""
    scores = logits_of(2, 6, 500).bfloat16()
    told = choose([Chooser(Sampling(), PROMPT) for _ in range(6)], scores)
    wanted = torch.log_softmax(scores.double(), -1)
    assert [one.token for one in told] == scores.argmax(-1).tolist()
    np.testing.assert_allclose([one.log_prob for one in told], wanted.max(-1).values.numpy(), atol=1e-5)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_what_has_no_weight_is_never_drawn(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a number next to one falls behind the last token, or onto one that was cut."""
    monkeypatch.setattr(Chooser, "uniform", lambda self: number)
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf"), float("-inf")]])
    (said,) = choose([Chooser(Sampling(temperature=1.0), PROMPT)], scores)
    assert said.token == (1 if number == 0.0 else 3)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9])
def test_extreme_temperatures_are_their_limits(temperature: float) -> None:
    """Breaks when a division by a tiny temperature makes infinities or NaN."""
    scores = logits_of(3, 1, 40)
    found = distribution([Chooser(Sampling(temperature=temperature), PROMPT)], scores)[0]
    limit = torch.full((40,), 1 / 40) if temperature > 1 else (scores[0] == scores.max()).float()
    torch.testing.assert_close(found, limit, atol=1e-6, rtol=0)


def test_tokens_that_tie_at_an_edge_are_kept_together() -> None:
    """Breaks when which of several equal tokens is cut depends on how a sort is done."""
    scores = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for cut in ({"top_k": 2}, {"top_p": 0.6}):
        found = distribution([Chooser(Sampling(temperature=1.0, **cut), PROMPT)], scores)[0]  # type: ignore[arg-type]
        assert (found > 0).tolist() == [True, True, True, False]


def test_a_guide_bounds_before_the_cuts_and_hears_what_was_said() -> None:
    """Breaks when top-k leaves only what the grammar forbids, or the guide's vocabulary must be the model's."""
    scores = logits_of(7, 3, 30)
    best = int(scores[0].argmax())
    for size in (20, 30, 45):
        guides = [Only({4, 6} - {best}, size) for _ in range(2)]
        strict = Sampling(temperature=1.0, top_k=1, top_p=0.1, min_p=0.9)
        choosers = [Chooser(strict, PROMPT, guide=guides[0]), Chooser(Sampling(), PROMPT),
                    Chooser(Sampling(), PROMPT, guide=guides[1])]  # fmt: skip
        told = choose(choosers, scores)
        assert told[0].token == (4 if scores[0, 4] > scores[0, 6] else 6)
        assert told[1].token == int(scores[1].argmax())
        assert told[2].token == (4 if scores[2, 4] > scores[2, 6] else 6)
        assert [guide.heard for guide in guides] == [[told[0].token], [told[2].token]]
        # The log-probability is the model's own.
        assert told[0].log_prob == pytest.approx(float(torch.log_softmax(scores[0], -1)[told[0].token]), abs=1e-5)


def test_a_guide_is_asked_once_for_each_token() -> None:
    """Breaks when asking ahead, to see whether a guide fails, costs a grammar its work twice or leaves an old mask."""
    asked = []
    guide = Only({4, 6}, 20)
    allowed = guide.allowed
    guide.allowed = lambda: asked.append(set(guide.tokens)) or allowed()  # type: ignore[method-assign, func-returns-value]
    chooser = Chooser(Sampling(), PROMPT, guide=guide)
    for tokens in ({4, 6}, {7}):
        guide.tokens = tokens
        first = chooser.bound(30)
        assert first is not None and set(first.nonzero()[:, 0].tolist()) == tokens
        assert choose([chooser], logits_of(1, 1, 30))[0].token in tokens
    assert asked == [{4, 6}, {7}]


def test_a_guide_at_its_end_may_stop_before_the_least_number_of_tokens() -> None:
    """Breaks when min_new_tokens and a grammar that is over leave nothing together."""
    sampling = Sampling(min_new_tokens=5, stop_ids=(2, 900))
    (said,) = choose([Chooser(sampling, PROMPT, guide=Only({2}, 10))], logits_of(1, 1, 10))
    assert said.token == 2
    (said,) = choose([Chooser(sampling, PROMPT, guide=Only({2, 3}, 10))], logits_of(1, 1, 10))
    assert said.token == 3
    lost = Chooser(sampling, PROMPT, guide=Only({11}, 12))
    for ask in (lambda: lost.bound(10), lambda: choose([lost], logits_of(1, 1, 10))):
        with pytest.raises(RecipeError, match="allows none of the model's 10 tokens after 0 tokens"):
            ask()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    """Breaks when a broken model speaks on."""
    scores = logits_of(1, 2, 10)
    scores[1, 3] = bad
    choosers = [Chooser(Sampling(temperature=temperature, top_p=0.9), PROMPT) for _ in range(2)]
    with pytest.raises(NumericError, match="1 of 10 logits are not finite"):
        choose(choosers, scores)
    assert [chooser.said for chooser in choosers] == [[], []]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(logit_bias=((10, 1.0),)), "logit_bias names token 10; the model's tokens, 0 to 9"),
        (Sampling(logit_bias=((-1, 1.0),)), "logit_bias names token -1"),
        (Sampling(logit_bias=((3, float("inf")),)), "the logit_bias of token 3 is inf"),
        (Sampling(likeliest=11), "likeliest is 11; 0 to 10"),
    ],
)
def test_settings_beyond_the_vocabulary_are_refused(sampling: Sampling, message: str) -> None:
    """Breaks when they become an index error in the middle of a batch, or the wrong token."""
    with pytest.raises(RecipeError, match=message):
        require_possible(sampling, 10)
    with pytest.raises(RecipeError, match=message):
        choose([Chooser(sampling, PROMPT)], logits_of(1, 1, 10))


def test_no_continuation_needs_no_choice() -> None:
    """Breaks when a step without rows is an error."""
    assert choose([], logits_of(1, 0, 10)) == []


def test_log_probabilities_of_given_tokens() -> None:
    """Breaks when a prompt's token is told with its neighbour's row, or the likeliest are not of the same row."""
    scores = logits_of(4, 5, 30)
    tokens = torch.tensor([3, 29, 0, 7, 7])
    wanted = torch.log_softmax(scores.double(), -1)
    told = log_probs_of(scores, tokens, 2)
    assert [one.token for one in told] == tokens.tolist()
    np.testing.assert_allclose([one.log_prob for one in told], wanted[range(5), tokens].numpy(), atol=1e-5)
    assert [[token for token, _ in one.likeliest] for one in told] == wanted.topk(2).indices.tolist()
    assert log_probs_of(scores[:0], tokens[:0]) == [] and log_probs_of(scores, tokens)[0].likeliest == ()
    with pytest.raises(RecipeError, match="likeliest is 31"):
        log_probs_of(scores, tokens, 31)


# ------------------------------------------------------------------------------------------------------------- drafts


def drafted(chooser: Chooser, count: int, table: Tensor, drafts: list[list[int]]) -> list[int]:
    """`count` tokens by steps that each look at a draft first."""
    told: list[int] = []
    while len(told) < count:
        draft = drafts[len(told) % len(drafts)]
        last = [told[-1] if told else 0, *draft]
        for said in choose_drafted(chooser, table[last], draft):
            told.append(said.token)
            if len(told) == count:
                break
    return told


@pytest.mark.parametrize("sampling", MIXED)
def test_the_text_is_the_same_with_any_draft(sampling: Sampling) -> None:
    """Breaks when a token after a wrong one is taken, the last free token is dropped, or a draft moves the numbers."""
    table = logits_of(5, 50, 50, scale=1.5)
    alone = Chooser(sampling, PROMPT)
    plain = continued([alone], 40, table)[0]
    right = [plain[at : at + 4] for at in range(40)]
    wrong = [[*plain[at : at + 2], (plain[min(at + 2, 39)] + 1) % 50, 3] for at in range(40)]
    for drafts in (right, wrong, [[]], [[1, 2, 3]]):
        chooser = Chooser(sampling, PROMPT)
        assert drafted(chooser, 40, table, drafts) == plain == chooser.said
        np.testing.assert_allclose(chooser.log_probs, alone.log_probs, atol=1e-5)


def test_a_right_draft_is_taken_whole_with_one_token_more() -> None:
    """Breaks when a draft brings nothing."""
    table = logits_of(5, 50, 50)
    plain = continued([Chooser(Sampling(), PROMPT)], 6, table)[0]
    for right in range(6):
        draft: list[int] = [*plain[:right], (plain[right] + 1) % 50][:5]
        told = list(choose_drafted(Chooser(Sampling(), PROMPT), table[[0, *draft]], draft))
        assert [said.token for said in told] == plain[: right + 1]


def test_drawn_with_a_draft_follows_the_distribution() -> None:
    """Breaks when a draft makes its own token likelier: the distribution of the first and second token, by counting."""
    table = logits_of(9, 6, 6, scale=1.0)
    draws, counts = 4000, np.zeros((6, 6))
    for choice in range(draws):
        chooser = Chooser(Sampling(temperature=1.0), PROMPT, choice=choice)
        told = drafted(chooser, 2, table, [[2, 1]])
        counts[told[0], told[1]] += 1
    chances = torch.softmax(table.double(), -1).numpy()
    wanted = chances[0][:, None] * chances
    assert (np.abs(counts / draws - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / draws)).all()


def test_the_prompt_counts_for_repetition_alone() -> None:
    """Breaks when presence or frequency look at the prompt (they are of what was said), or repetition does not."""
    scores = torch.full((1, 8), 1.0)
    prompt: Ints = np.array([2, 2, 6], np.int32)
    settings = Sampling(temperature=1.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125)
    found = distribution([having_said(Chooser(settings, prompt), [6, 7, 7])], scores)[0].log()
    wanted = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5 - 0.25 - 0.125, 0.5 - 0.25 - 0.25])
    torch.testing.assert_close(found - found[0], wanted - 1.0, atol=1e-5, rtol=0)
