"""Own loops for classifiers and encoder-decoders: the four primitives, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.optimizers.adamw import AdamW
from luthier.recipes.opening.session import Session, load
from luthier.recipes.several.session import load_several
from tests.task_folders import bert_folder, t5_folder

ROWS = [{"text": "the apple", "label": "fruit"}, {"text": "the saw", "label": "tool"}]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


def trained(session: Session, rows: list[dict[str, object]], steps: int = 30) -> float:
    for _ in range(steps):
        session.forward_backward(rows)
        session.optim_step()
    return session.loss(rows)


def test_a_classifier_is_trained_by_hand_saved_and_loaded(bert: Path, tmp_path: Path) -> None:
    """Breaks when the model is loaded for texts, a head is lost on its way, or classes change their numbers."""
    knobs = AdamW(learning_rate=0.01)
    session = load(bert, objective="classification", optimizer=knobs, classes=("fruit", "tool"), precision="float32")
    before = session.loss(ROWS)
    after = trained(session, ROWS)
    assert after < before / 2
    saved = session.save(tmp_path / "saved")
    again = load(saved, objective="classification", optimizer=knobs, precision="float32")
    assert again.model.task.classes == ("fruit", "tool")
    assert again.loss(ROWS) == pytest.approx(after, rel=1e-6)
    with pytest.raises(DataError, match="vegetable"):
        again.loss([{"text": "the leek", "label": "vegetable"}])


def test_an_encoder_decoder_is_trained_by_hand_and_sampled(tmp_path: Path) -> None:
    """Breaks when a session reads a prompt for an encoder by a chat template."""
    model = t5_folder(tmp_path / "t5")
    knobs = AdamW(learning_rate=0.005)
    session = load(model, objective="seq2seq", adapter="full", optimizer=knobs, precision="float32")
    rows: list[dict[str, object]] = [{"prompt": "what is it", "completion": "a fruit"}]
    trained(session, rows, 60)
    assert session.sample(["what is it"], max_new_tokens=8) == ["a fruit"]


def test_an_objective_that_does_not_fit_is_told(bert: Path) -> None:
    """Breaks when an encoder is loaded as a decoder, or a classifier without classes."""
    with pytest.raises(RecipeError, match="classification or masked_lm"):
        load(bert)
    with pytest.raises(DataError, match="0 classes"):
        load(bert, objective="classification")


def test_several_adapters_are_told_what_they_cannot_be_for(llama: Path, bert: Path) -> None:
    """Breaks when a model is loaded to go on with texts, and asked for classes at the first step."""
    with pytest.raises(RecipeError, match="classification for several adapters"):
        load_several(llama, {"one": "lora"}, objective="classification")
    with pytest.raises(RecipeError, match="classification or masked_lm"):
        load_several(bert, {"one": "lora"})
