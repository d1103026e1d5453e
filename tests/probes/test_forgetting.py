"""Forgetting: losses before and after, the price, and advice that follows what was found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.model.comparing.pair import Pair, Text
from luthier.probes.forgetting import Forgetting
from tests.pairs import lora_pair, loss


def told(kept: tuple[float, float], task: tuple[float, float] | None = (3.0, 1.0)) -> tuple[Pair, list[str]]:
    """A pair whose losses before and after are these, and what is said of it."""
    pair, model = lora_pair("llama")
    known = {"old text": kept, **({} if task is None else {"the task": task})}

    def text(name: str, kind: str) -> Text:
        return Text(name, kind, lambda _: known[name][any(each.active.on for each in model.attachments.values())])

    texts = [text("old text", "kept"), *([] if task is None else [text("the task", "task")])]
    pair = replace(pair, texts=tuple(texts))
    return pair, list(Forgetting().of(pair).verdict)


def test_losses_are_those_of_the_base_and_of_the_tuned_model() -> None:
    """Breaks when the adapter is on for the base, or off for the tuned model."""
    pair, model = lora_pair("llama")
    numbers = Forgetting().of(pair).numbers
    with model.without_attachments():
        assert numbers["old text_before"] == pytest.approx(loss(model))
    assert numbers["old text_after"] == pytest.approx(loss(model))
    rise = loss(model) - float(numbers["old text_before"] or 0)
    assert numbers["forgetting"] == pytest.approx(rise)


@pytest.mark.parametrize(("kept", "words"), [((1.0, 1.0), "Nothing was forgotten"), ((1.0, 1.05), "A small price"),
                                             ((1.0, 2.0), "a tenth of the tokens")])  # fmt: skip
def test_the_advice_follows_the_loss(kept: tuple[float, float], words: str) -> None:
    """Breaks when a model that lost a lot is told the same as one that lost nothing."""
    pair, said = told(kept)
    assert any(words in sentence for sentence in said)
    assert Forgetting().of(pair).numbers["price"] == pytest.approx((kept[1] - kept[0]) / 2)


def test_without_an_old_text_nothing_is_claimed_of_forgetting() -> None:
    """Breaks when a task's own gain is told as nothing forgotten."""
    pair, _ = told((1.0, 1.0))
    report = Forgetting().of(replace(pair, texts=pair.texts[1:]))
    assert "nothing is known of forgetting" in report.verdict[-1] and "forgetting" not in report.numbers
