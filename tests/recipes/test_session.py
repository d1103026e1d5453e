"""One's own loop with four primitives gives what the recipe gives, and a saved session goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier.core.errors import DataError, DriftError, RecipeError
from luthier.recipes.opening.session import Session, load
from tests.cli.commands import COLOURS, chat

ROWS = [chat(f"the colour of {n} is", COLOURS[n % 8]) for n in range(16)]


def session(model: Path, adapter: object = None) -> Session:
    # In float32 on every machine: Adam makes a whole step of a gradient that is nothing but rounding.
    knobs = {"optimizer": luthier.AdamW(learning_rate=0.01), "precision": "float32"}
    return load(model, adapter=adapter or luthier.LoRA(rank=4, alpha=8.0), **knobs)


def test_a_loop_of_one_s_own_lowers_the_loss(llama: Path) -> None:
    own = session(llama)
    before = own.loss(ROWS)
    losses = []
    for _ in range(6):
        losses.append(own.forward_backward(ROWS).loss)
        assert own.optim_step().applied
    assert own.loss(ROWS) < before - 0.3 and losses[-1] < losses[0]
    assert losses[0] == pytest.approx(before, abs=1e-5)


def test_two_halves_make_the_step_of_the_whole(llama: Path) -> None:
    one, other = session(llama), session(llama)
    one.forward_backward(ROWS)
    # Of unequal weight, so that a mean of means would differ.
    other.forward_backward(ROWS[:5])
    other.forward_backward(ROWS[5:])
    norms = one.optim_step().grad_norm, other.optim_step().grad_norm
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name, tensor in one.attachment.named_tensors().items():
        torch.testing.assert_close(tensor, other.attachment.named_tensors()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "ia3", "prefix_tuning", "full"])
def test_what_is_saved_is_loaded(adapter: str, tmp_path: Path, llama: Path) -> None:
    own = session(llama, adapter)
    own.forward_backward(ROWS)
    own.optim_step()
    saved = own.save(tmp_path / "mine")
    again = load(saved)
    assert again.loss(ROWS) == pytest.approx(own.loss(ROWS), abs=1e-6)
    said = [one.sample(["the colour of 3 is"], max_new_tokens=6) for one in (own, again)]
    assert said[0] == said[1]
    with pytest.raises(RecipeError, match="is not empty"):
        own.save(saved.parent)


def test_sampling_is_a_function_of_the_seed(llama: Path) -> None:
    own = session(llama)
    draws = [own.sample(["a", "b"], max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_rows_may_have_any_of_the_formats(llama: Path) -> None:
    own = session(llama)
    same = [
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        [{"prompt": "a", "completion": "b"}],
        [{"instruction": "a", "input": "", "output": "b"}],
    ]
    assert len({round(own.loss(rows), 6) for rows in same}) == 1
    with pytest.raises(DataError, match="no row was given"):
        own.forward_backward([])
    with pytest.raises(DataError, match="row 1"):
        own.forward_backward([chat("a", "b"), chat("a", "")])


def test_an_adapter_of_other_weights_is_not_loaded(tmp_path: Path, copied: Path) -> None:
    own = session(copied)
    saved = own.save(tmp_path / "mine")
    tensors = load_file(copied / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DriftError, match="base weights"):
        load(saved)
