"""The parity gate: its numbers are those of their formulas, and it refuses what is not the model it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.core.errors import GateError
from luthier.data.conversation import Conversation, Message, Row
from luthier.data.forest import Ints
from luthier.model.comparing.parity import Greedy, Questions, Side, compare, hear
from luthier.model.comparing.tolerances import BRAIN, COARSE, EXACT, HALF, Tolerance, tolerance_for

PROMPTS = (np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32))
ROW = Row(0, "rows.jsonl:1:1", Conversation((Message("user", "hello"), Message("assistant", "you"))))


class Fake(Side):
    """A side that says what it is told to."""

    def __init__(
        self, *, noise: float = 0.0, wide: int = 11, ids: Ints | None = None, stops: frozenset[int] | None = None,
        settings: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.name = "fake"
        self.noise, self.wide, self.ids, self.stops = noise, wide, ids, stops
        self.set, self.held = settings or {}, tensors or {}

    def logits(self, tokens: Ints) -> Any:
        plain = np.random.default_rng(len(tokens)).normal(size=(len(tokens), self.wide)) * 2
        noise = np.random.default_rng(1).normal(size=plain.shape) * self.noise
        return (plain + noise).astype(np.float32)

    def rendered(self, row: Row) -> tuple[Ints, ...] | None:
        return None if self.ids is None else (self.ids,)

    def stop_ids(self) -> frozenset[int] | None:
        return self.stops

    def settings(self) -> Mapping[str, Any]:
        return self.set

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        return self.held.items()


HEARD = hear(Fake(), Questions(PROMPTS))


def test_numbers_are_those_of_the_formulas() -> None:
    """Breaks when a sum leaves out a token, is divided twice, or KL is taken the other way round."""
    other = Fake(noise=0.7)
    report = compare(HEARD, other, EXACT)
    wanted, found = (torch.from_numpy(np.concatenate([side.logits(p) for p in PROMPTS])) for side in (Fake(), other))
    kl = torch.nn.functional.kl_div(found.double().log_softmax(-1), wanted.double().softmax(-1), reduction="batchmean")
    assert report.mean_kl == pytest.approx(float(kl), rel=1e-6)
    assert report.max_difference == pytest.approx(float((wanted - found).abs().max()))
    same = float((wanted.argmax(-1) == found.argmax(-1)).float().mean())
    assert report.greedy is not None and report.greedy.agreement == pytest.approx(same)
    assert report.as_dict()["agreement"] == report.greedy.agreement and "greedy" not in report.as_dict()
    assert report.tokens == 12 and report.prompts == 2
    by_prompt = [Fake().logits(prompt).std(-1).mean() for prompt in PROMPTS]
    assert report.spread == pytest.approx(sum(by_prompt) / 2)
    assert json.loads(json.dumps(report.as_dict()))["passed"] is False


def test_equal_sides_pass_and_need_no_finding() -> None:
    report = compare(HEARD, Fake(), EXACT)
    assert report.passed and report.mean_kl == 0 and report.greedy == Greedy(
        agreement=1.0, decided=12, decided_agreement=1.0
    ) and report.max_difference == 0
    report.require()


@pytest.mark.parametrize(
    ("side", "part"),
    [
        (Fake(noise=0.1), "logits differ by up to"),
        (Fake(noise=4.0), "tokens that are no near ties"),
        (Fake(noise=float("nan")), "not finite"),
        (Fake(wide=12), "it gives 5 x 12 numbers for a prompt, not 5 x 11"),
        (Fake(ids=np.array([1, 9, 3, 4], np.int32)), "rows.jsonl:1:1 becomes 4 tokens, not 3; token 1 is 9, not 2"),
        (Fake(ids=np.array([1, 2], np.int32)), "becomes 2 tokens, not 3; token 2 is not there, not 3"),
        (Fake(stops=frozenset({3, 1})), "its answers end at 1/3, and the source's at 2"),
        (Fake(settings={"rope_parameters.rope_theta": 1e4}), "rope_theta is 10000.0, and the source's 500000.0"),
    ],
)  # fmt: skip
def test_what_differs_is_refused_and_told(side: Fake, part: str) -> None:
    """Breaks when one of the checks is skipped, or its sentence does not name what differs."""
    source = Fake(
        ids=np.array([1, 2, 3], np.int32), stops=frozenset({2}), settings={"rope_parameters.rope_theta": 5e5, "x": 1}
    )
    side.ids = np.array([1, 2, 3], np.int32) if side.ids is None else side.ids
    report = compare(hear(source, Questions(PROMPTS, (ROW,))), side, EXACT)
    with pytest.raises(GateError, match="is not the model it was made from") as caught:
        report.require()
    assert part in caught.value.received and caught.value.exit_code == 78
    assert "max |logit difference|" in caught.value.received and "tokens, 1 of 1" in caught.value.received.replace(
        "0 of 1", "1 of 1")  # fmt: skip


def test_tensors_that_differ_are_named_the_worst_first() -> None:
    weights = {f"layer.{n}": torch.randn(20, 30, generator=torch.Generator().manual_seed(n)) for n in range(4)}
    heard = replace(hear(Fake(tensors=weights), Questions(PROMPTS)))
    broken = {**weights, "layer.1": weights["layer.1"] * 1.5, "layer.2": weights["layer.2"].roll(3, 0)}
    report = compare(heard, Fake(noise=1.0, tensors=broken), EXACT)
    assert any("layer.1 is 1.5 times what it was" in each for each in report.findings)
    assert report.findings.index(next(each for each in report.findings if "layer.2" in each)) < len(report.findings) - 1
    assert not any("layer.0" in each or "layer.3" in each for each in report.findings)
    del broken["layer.3"]
    report = compare(heard, Fake(noise=1.0, tensors=broken), EXACT)
    assert any("1 tensors are missing (layer.3)" in each for each in report.findings)


@pytest.mark.parametrize(("tolerance", "dtype"), [(EXACT, "float32"), (HALF, "float16"), (BRAIN, "bfloat16")])
def test_a_tensor_that_logits_hardly_show_is_found_by_its_sketch(tolerance: Tolerance, dtype: str) -> None:
    """Breaks when a layer that is one percent off passes because many others hide it, or when rounding does not."""
    weights = {f"layer.{n}": torch.randn(200, 300, generator=torch.Generator().manual_seed(n)) for n in range(4)}
    heard = hear(Fake(tensors=weights), Questions(PROMPTS))
    rounded = {name: each.to(getattr(torch, dtype)) for name, each in weights.items()}
    assert compare(heard, Fake(tensors=rounded), tolerance).passed
    broken = {**rounded, "layer.2": rounded["layer.2"] * 1.01}
    report = compare(heard, Fake(tensors=broken), tolerance)
    assert len(report.findings) == 1 and report.findings[0].startswith("layer.2 is 1.01 times what it was")
    assert compare(heard, Fake(tensors=broken), replace(tolerance, weights=None)).passed


def test_states_are_compared_by_their_difference_alone() -> None:
    side = Fake(noise=1e-6)
    side.gives = "states"
    report = compare(HEARD, side, EXACT)
    assert report.passed and report.mean_kl is None and report.greedy is None and "KL" not in report.numbers()


@pytest.mark.parametrize(("margin", "passes"), [(0.09, True), (0.11, False)])
def test_what_is_a_near_tie_is_no_disagreement(margin: float, passes: bool) -> None:
    """Breaks when rounding is taken for damage, or damage for rounding, or the artefact's own margin counts."""

    class Close(Fake):
        def __init__(self, ahead: int) -> None:
            super().__init__()
            self.ahead = ahead

        def logits(self, tokens: Ints) -> Any:
            held = np.tile([1.0, 1.0, -1.0, -1.0], (len(tokens), 1)).astype(np.float32)
            held[:3, self.ahead] += margin if self.ahead == 0 else 0.01
            return held

    bounds = Tolerance(form="a test", difference=1.0, kl=1.0, tie=0.1)
    report = compare(hear(Close(0), Questions(PROMPTS)), Close(1), bounds)
    decided = Greedy(agreement=0.5, decided=0 if passes else 6, decided_agreement=1.0 if passes else 0.0)
    assert report.passed == passes and report.greedy == decided
    assert "50.0 % (100.0 % of the 0 that are no near ties) over 12 tokens" in report.numbers() or not passes


def test_single_numbers_are_compared_by_their_difference_alone() -> None:
    """A reward of one number has no likeliest class, and agrees with whatever it is held against."""
    heard = hear(Fake(wide=1), Questions(PROMPTS))
    report = compare(heard, Fake(wide=1, noise=0.01), EXACT)
    assert report.mean_kl is None and report.greedy is None and not report.passed
    assert report.spread == pytest.approx(np.concatenate(heard.logits).std(), rel=1e-5)
    assert compare(heard, Fake(wide=1), EXACT).passed


def test_what_is_let_pass_belongs_to_the_form_of_the_weights() -> None:
    assert tolerance_for(torch.float32) is EXACT and tolerance_for(torch.float16) is HALF
    assert BRAIN.loosest(COARSE) == replace(COARSE, form=BRAIN.form) == replace(COARSE.loosest(BRAIN), form=BRAIN.form)
    assert EXACT.loosest(replace(HALF, weights=None)).weights is None
    assert tolerance_for(torch.bfloat16) is BRAIN and tolerance_for(torch.float32, computed="bfloat16") is COARSE
