"""Several adapters trained at once by hand: each ends as it ends alone, and each is saved and loaded alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.recipes.opening.session import Session, load
from luthier.recipes.several.session import SeveralSession, load_several
from tests import forests
from tests.cli.commands import COLOURS, chat

ROWS = {
    "french": [chat(f"the colour of {n} is", COLOURS[n % 8]) for n in range(12)],
    "code": [chat(f"say {n}", "x" * (1 + n % 5)) for n in range(7)],
    "scaled": [chat(f"{n} and one", str(n + 1)) for n in range(9)],
    "prefix": [chat(f"what is {n}", COLOURS[-n % 8]) for n in range(5)],
    "prompt": [chat(f"who is {n}", COLOURS[3 * n % 8]) for n in range(6)],
}
ADAPTERS: dict[str, Adapter] = {
    "french": luthier.LoRA(rank=4, alpha=8.0),
    "code": luthier.LoRA(rank=2, alpha=4.0, targets=("q", "v")),
    "scaled": luthier.IA3(),
    "prefix": luthier.PrefixTuning(prefix_tokens=3),
    "prompt": luthier.PromptTuning(prompt_tokens=2),
}
KNOBS: dict[str, Any] = {"optimizer": luthier.AdamW(learning_rate=0.01), "precision": "float32"}
STEPS = 6


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tiny_path: Callable[[str], Path]) -> Path:
    return tiny_path(request.param)


def part(rows: list[Any], step: int) -> list[Any]:
    """The rows of a step: more in some than in others."""
    return rows[step % 3 :: 2]


def trained_together(base: Path, names: list[str]) -> SeveralSession:
    together = load_several(base, {name: ADAPTERS[name] for name in names}, **KNOBS)
    for step in range(STEPS):
        together.forward_backward({name: part(ROWS[name], step) for name in names})
        together.optim_step(factor=1.0 - 0.1 * step)
    return together


def trained_alone(base: Path, name: str) -> Session:
    alone = load(base, adapter=ADAPTERS[name], **KNOBS)
    for step in range(STEPS):
        alone.forward_backward(part(ROWS[name], step))
        alone.optim_step(factor=1.0 - 0.1 * step)
    return alone


@pytest.mark.parametrize("names", [["french", "code"], list(ADAPTERS)], ids=len)
def test_each_ends_equal_to_being_trained_alone(base: Path, names: list[str]) -> None:
    """Breaks when a loss is divided by everybody's weight, gradients are clipped together, or rows are mixed up."""
    together = trained_together(base, names)
    for name in names:
        alone = trained_alone(base, name).attachment.named_parameters()
        found = together[name].attachment.named_parameters()
        start = load(base, adapter=ADAPTERS[name], **KNOBS).attachment.named_parameters()
        off = [float((found[key] - each).detach().norm()) for key, each in alone.items()]
        size = [float(each.detach().norm()) for each in alone.values()]
        assert math.hypot(*off) <= 1e-6 * math.hypot(*size), name
        # Tensor by tensor Adam makes of the rounding of a small gradient as much as of that of a large one.
        assert all(one <= 1e-5 * whole for one, whole in zip(off, size, strict=True)), name
        assert not any(torch.equal(each, start[key]) for key, each in alone.items())


def test_reports_and_losses_are_each_adapter_s_own(llama: Path) -> None:
    """Breaks when losses, weights or counts of tokens are told of everybody together."""
    names = list(ADAPTERS)
    together = load_several(llama, {name: ADAPTERS[name] for name in names}, **KNOBS)
    found = together.forward_backward({name: ROWS[name] for name in names})
    for name in names:
        alone = load(llama, adapter=ADAPTERS[name], **KNOBS)
        expected = alone.forward_backward(ROWS[name])
        assert (found[name].tokens, found[name].trained_tokens) == (expected.tokens, expected.trained_tokens)
        assert found[name].weight == expected.weight == together[name].stepper.pending_weight
        assert found[name].loss == pytest.approx(expected.loss, rel=1e-5)
        assert found[name].row_losses.keys() == expected.row_losses.keys()
        assert together[name].loss(ROWS[name]) == pytest.approx(alone.loss(ROWS[name]), rel=1e-5)
    steps = together.optim_step()
    assert set(steps) == set(names) and all(step.applied for step in steps.values())


def test_who_has_no_rows_does_not_step(llama: Path) -> None:
    """Breaks when an adapter without a gradient is moved by weight decay or by a moment of earlier steps."""
    together = load_several(llama, {name: ADAPTERS[name] for name in ("french", "scaled")}, **KNOBS)
    together.forward_backward(ROWS_OF_BOTH)
    together.optim_step()
    before = {key: each.detach().clone() for key, each in together["scaled"].attachment.named_parameters().items()}
    together.forward_backward({"french": ROWS["french"]})
    assert set(together.optim_step()) == {"french"}
    assert all(torch.equal(before[k], p) for k, p in together["scaled"].attachment.named_parameters().items())


def test_a_number_of_one_that_is_not_finite_stays_with_it(llama: Path) -> None:
    """Breaks when the losses of adapters meet in anything but a sum, or one bad gradient keeps all from stepping."""
    names = ["french", "code"]
    sound, spoilt = (load_several(llama, {name: ADAPTERS[name] for name in names}, **KNOBS) for _ in range(2))
    with torch.no_grad():
        for parameter in spoilt["code"].attachment.named_parameters().values():
            parameter.fill_(torch.inf)
    found = [one.forward_backward({name: ROWS[name] for name in names}) for one in (sound, spoilt)]
    assert not math.isfinite(found[1]["code"].loss) and found[1]["french"] == found[0]["french"]
    steps = [one.optim_step() for one in (sound, spoilt)]
    assert not steps[1]["code"].applied and steps[1]["french"].applied
    assert steps[1]["french"].grad_norm == steps[0]["french"].grad_norm
    for one, other in zip(
        sound["french"].attachment.named_parameters().values(),
        spoilt["french"].attachment.named_parameters().values(),
        strict=True,
    ):
        assert torch.equal(one, other)


ROWS_OF_BOTH = {name: ROWS[name] for name in ("french", "scaled")}


def test_smaller_micro_batches_change_no_gradient(llama: Path) -> None:
    """Breaks when a micro-batch that holds rows of some adapters only loses or repeats somebody's gradient."""
    found = []
    for micro_tokens in (4096, 40):
        together = load_several(llama, ADAPTERS, micro_tokens=micro_tokens, **KNOBS)
        together.forward_backward(ROWS)
        found.append({
            f"{name}.{key}": parameter.grad.clone()
            for name, session in together.sessions.items()
            for key, parameter in session.attachment.named_parameters().items()
            if parameter.grad is not None
        })  # fmt: skip
    whole, cut = found
    assert whole.keys() == cut.keys() and len(whole) > 20
    forests.assert_same_gradients(cut, whole)


def test_when_memory_runs_out_the_step_of_all_is_done_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when an attempt that failed midway leaves the gradient of some adapters twice."""
    names = ["french", "code"]
    truth = load_several(llama, {name: ADAPTERS[name] for name in names}, **KNOBS)
    truth.forward_backward({name: ROWS[name] for name in names})
    tight = load_several(llama, {name: ADAPTERS[name] for name in names}, micro_tokens=200, **KNOBS)
    model = type(tight.batcher.model)
    real, passes = model.token_outputs, []

    def failing(self: Any, forest: Any, *, temperature: float = 1.0) -> Any:
        passes.append(forest.token_count)
        if len(passes) == 2:
            raise MemoryError("no more")
        return real(self, forest, temperature=temperature)

    monkeypatch.setattr(model, "token_outputs", failing)
    reports = tight.forward_backward({name: ROWS[name] for name in names})
    assert len(passes) > 3 and tight.batcher.micro_tokens < 200
    for name in names:
        assert len(reports[name].splits) == 1
        pairs = zip(
            tight[name].attachment.named_parameters().values(),
            truth[name].attachment.named_parameters().values(),
            strict=True,
        )
        for found, expected in pairs:
            assert found.grad is not None and expected.grad is not None
            assert forests.relative_error(found.grad, expected.grad) <= 1e-4
        assert tight[name].stepper.pending_weight == truth[name].stepper.pending_weight


def test_each_is_saved_and_loaded_alone(tmp_path: Path, llama: Path) -> None:
    """Breaks when a saved adapter holds another's tensors, or answers with somebody else's."""
    together = trained_together(llama, list(ADAPTERS))
    saved = together.save(tmp_path / "all")
    for name in ADAPTERS:
        again = load(saved / name / "adapter")
        assert again.loss(ROWS[name]) == pytest.approx(together[name].loss(ROWS[name]), abs=1e-6)
        prompts = ["the colour of 3 is", "say 2"]
        assert again.sample(prompts, max_new_tokens=6) == together[name].sample(prompts, max_new_tokens=6)


def test_what_cannot_be_trained_together_is_an_error(llama: Path) -> None:
    with pytest.raises(RecipeError, match="'whole' trains the model's own weights"):
        load_several(llama, {"french": "lora", "whole": "full"})
    with pytest.raises(RecipeError, match="no adapter was named"):
        load_several(llama, {})
    with pytest.raises(RecipeError, match="'a.b' cannot name an attachment"):
        load_several(llama, {"a.b": "lora"})
    with pytest.raises(RecipeError, match=r"optimizers for \['french'\]"):
        load_several(llama, {"french": "lora", "code": "lora"}, optimizer={"french": "sgd"})
    together = load_several(llama, {"french": "lora"})
    with pytest.raises(RecipeError, match=r"'frensh'.*french"):
        together.forward_backward({"frensh": ROWS["french"]})
    with pytest.raises(RecipeError, match="without a gradient"):
        together.optim_step()
