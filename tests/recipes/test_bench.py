"""The bench: control tokens are examined before the first step, named by text, never added, and exported as stops."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from luthier.core.errors import LuthierError, RecipeError
from luthier.core.knobs import validate
from luthier.data.tokenizer import Tokenizer
from luthier.model.files.generation_files import GENERATION
from luthier.model.load import resolve_source
from luthier.recipes import control_tokens
from luthier.recipes.bench import Bench, lay_out
from luthier.recipes.opening import session
from luthier.recipes.schemas.finetune import FinetuneRecipe
from tests.cli.commands import Said, chat, luthier, recipe_text, write_rows
from tests.tiny import CHAT_TEMPLATE

EMBEDDING = "model.embed_tokens.weight"


def bench(model: Path | str, rows: Path, **more: Any) -> Bench:
    """Everything up to the first step."""
    return lay_out(validate(FinetuneRecipe, {"model": str(model), "data": str(rows), "precision": "float32", **more}))


def train(folder: Path, model: Path, rows: Path, *sets: object) -> Said:
    """`luthier train` of two steps in `folder`/run."""
    (folder / "recipe.yaml").write_text(recipe_text(model, rows), encoding="utf-8")
    return luthier("train", folder / "recipe.yaml", "--run", folder / "run", "--set", "budget.steps=2", *sets)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seedling with the row of its stop token drawn anew."""
    folder = Path(shutil.copytree(resolve_source("seedling"), tmp_path_factory.mktemp("spoilt") / "seedling"))
    tensors = load_file(folder / "model.safetensors")
    noise = 0.02 * torch.randn(tensors[EMBEDDING].shape[1], generator=torch.Generator().manual_seed(3))
    tensors[EMBEDDING][1] = noise.to(tensors[EMBEDDING].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_base_that_knows_its_template_is_tested_and_not_blamed(rows: Path) -> None:
    """Breaks when the plan does not say what was tested, or blames a trained token."""
    plan = bench("seedling", rows).plan
    assert plan["special_tokens"] == {
        "tested": ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"], "untrained": [], "not_tested": [],
    }  # fmt: skip
    assert not [notice for notice in plan["notices"] if "untrained" in notice]


def test_an_untrained_stop_token_is_the_first_notice_and_its_advice_works(
    tmp_path: Path, spoilt: Path, rows: Path
) -> None:
    """Breaks when a run whose answers will not stop starts without a word, or the line it is told to add is wrong."""
    plan = bench(spoilt, rows, adapter={"method": "lora", "trainable_tokens": [4]}).plan
    (finding,) = plan["special_tokens"]["untrained"]
    assert (finding["id"], finding["text"], finding["stops"], finding["in_training"]) == (1, "<|end|>", True, False)
    notice, advice = plan["notices"][:2]
    assert notice.startswith("STOP TOKEN '<|end|>' looks untrained in the base, so answers may not stop: it is noise")
    assert advice.startswith("to train just these rows too, add --set ") and "data.template" in advice
    said = train(tmp_path, spoilt, rows, "--dry-run", "--set", "adapter.trainable_tokens=[4]")
    told = re.search(r"--set ('.*?'|\S+); or use", said.must(0).out)
    assert "STOP TOKEN" in said.out and told is not None
    advised = shlex.split(told[1])
    assert advised == ['adapter.trainable_tokens=[4, "<|end|>"]']
    mended = train(tmp_path, spoilt, rows, "--dry-run", "--set", advised[0])
    assert "'<|end|>' looks untrained in the base, and this run trains it: it is noise" in mended.must(0).out
    assert "STOP TOKEN" not in mended.out


def test_other_adapters_are_told_how_to_train_rows(tmp_path: Path, spoilt: Path, rows: Path) -> None:
    """Breaks when the advice names a knob that the adapter does not have, or full training is told to train more."""
    said = train(tmp_path, spoilt, rows, "--dry-run", "--set", "adapter.method=ia3").must(0).out
    told = re.search(r"too, add (--set .*); or use", said)
    assert told is not None and shlex.split(told[1]) == [
        "--set", "adapter.method=lora", "--set", 'adapter.trainable_tokens=["<|end|>"]',
    ]  # fmt: skip
    assert "this run trains it" in train(tmp_path, spoilt, rows, "--dry-run", *shlex.split(told[1])).must(0).out
    for trains in ("full", "trainable_tokens"):
        (notice, *others) = bench(spoilt, rows, adapter=trains).plan["notices"]
        assert notice.startswith("'<|end|>' looks untrained in the base, and this run trains it")
        assert not any("to train just these" in other for other in others)


def test_a_base_without_training_is_not_tested_and_the_plan_says_so(llama: Path, rows: Path) -> None:
    """Breaks when noise is compared with noise, or the silence is not explained."""
    new = bench(f"fresh:{llama}", rows).plan
    assert new["special_tokens"]["tested"] == [] and "is new (fresh:)" in new["special_tokens"]["not_tested"][0]
    random = bench(llama, rows).plan
    assert random["special_tokens"]["untrained"] == []
    assert random["special_tokens"]["not_tested"] == [
        "the base looks untrained, its rows of words are noise (embedding, output head)"
    ]
    assert any("were not tested" in notice for notice in random["notices"])


def test_tokens_are_named_by_text(llama: Path, rows: Path) -> None:
    """Breaks when a text stays a text, or the run's recipe differs from one life to the next."""
    laid = bench(llama, rows, adapter={"method": "lora", "trainable_tokens": ["<|start|>", 7, " the", "h"]})
    ids = laid.recipe.adapter.model_dump()["trainable_tokens"]
    tokenizer = laid.tokenizer
    assert ids[:2] == (2, 7) and [tokenizer.token_text(token) for token in ids[2:]] == [" the", "h"]
    assert laid.plan["adapter"]["trainable_tokens"] == list(ids)
    assert bench(llama, rows, adapter="trainable_tokens").recipe.adapter.model_dump()["tokens"] == (1,)


@pytest.mark.parametrize(
    ("text", "words"),
    [("<|ends|>", r"is no token .* but \d of them.*did you mean <\|end\|>"), ("", "is no token"),
     ("colour", "is no token"), (128, "token 128 has no row")],
)  # fmt: skip
def test_what_is_no_token_is_refused_with_the_nearest(text: object, words: str, llama: Path, rows: Path) -> None:
    """Breaks when a text of several tokens trains the first of them, or a token would be made for it."""
    with pytest.raises(RecipeError, match=words):
        bench(llama, rows, adapter={"method": "lora", "trainable_tokens": [text]})


def with_a_token_more(model: Path) -> Path:
    """A tokenizer with one more control token, that ends the turns of its template, than the model has rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|stop|>")
    tokenizer.save_pretrained(model)
    return model


def test_a_token_without_a_row_is_an_error_and_nothing_is_resized(copied: Path, rows: Path) -> None:
    """Breaks when a model grows for a tokenizer, or the first step ends in an index error."""
    before = (copied / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"token 128 \('<\|stop\|>'\).* has 128 rows .*never resizes a vocabulary"):
        bench(with_a_token_more(copied), rows)
    luthier("generate", copied, "--prompt", "x").must(2, "token 128 has no row", "never resizes a vocabulary")
    with pytest.raises(RecipeError, match="token 128 has no row"):
        session.load(copied).forward_backward([{"prompt": "a", "completion": "b"}])
    assert (copied / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("template", ["auto", "chatml", "instruction"])
def test_no_template_adds_a_token(template: str, llama: Path, rows: Path) -> None:
    """Breaks when a template's markers become tokens of their own, or the model gets rows for them."""
    before = Tokenizer.load(llama)
    try:
        laid = bench(llama, rows, **{"data": {"train": str(rows), "template": template}})
    except LuthierError as refused:
        assert "control token" in str(refused)
        return
    assert len(laid.tokenizer.raw) == before.vocabulary_size == laid.model.vocabulary_size == 128
    assert laid.tokenizer.raw.get_vocab() == before.raw.get_vocab()
    assert laid.tokenizer.special_ids == before.special_ids


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_what_is_read_and_what_is_said_is_counted_over_all_views(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a piece of the data begins or ends between two tokens of a view."""
    rng = np.random.default_rng(chunk)
    lengths = [4, 1, 6, 2, 9]
    tokens = rng.integers(0, 40, sum(lengths)).astype(np.int32)
    weights = rng.integers(0, 2, sum(lengths)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    last = set(offsets[1:] - 1)
    monkeypatch.setattr(control_tokens, "CHUNK", chunk)
    store = SimpleNamespace(tokens=tokens, weights=weights, offsets=offsets, stop_ids=frozenset())
    read, said = control_tokens._seen(store)  # type: ignore[arg-type]  # the arrays are all it looks at
    assert set(np.flatnonzero(read)) == {int(t) for place, t in enumerate(tokens) if place not in last}
    assert set(np.flatnonzero(said)) == {int(t) for t, weight in zip(tokens, weights, strict=True) if weight}


@pytest.mark.parametrize("adapter", ["{method: lora, trainable_tokens: ['<|end|>', '<|start|>']}",
                                     "{method: trainable_tokens}", "{method: full}"])  # fmt: skip
def test_the_result_says_where_to_stop(adapter: str, tmp_path: Path, llama: Path, rows: Path) -> None:
    """Breaks when a program that reads the result does not know the token that ended the trained answers."""
    train(tmp_path, llama, rows, "--set", f"adapter={adapter}").must(0)
    folder = tmp_path / "run" / ("model" if "full" in adapter else "adapter")
    found = GenerationConfig.from_pretrained(folder)
    assert (found.eos_token_id, found.pad_token_id) == (1, 0)
    if "full" not in adapter:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        assert config.get("token_indices") == [1] or config["trainable_token_indices"]["lm_head"] == [1, 2]
    asked = ("--prompt", "the colour of 3 is", "--max-new-tokens", 4)
    luthier("generate", tmp_path / "run", *asked).must(0)


def test_a_template_s_own_stop_token_is_in_the_list(tmp_path: Path, copied: Path) -> None:
    """Breaks when only the tokenizer's eos reaches the result, and answers run on behind the end of a turn."""
    template = tmp_path / "other.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<|end|>", "<|pad|>"), encoding="utf-8")
    data = write_rows(tmp_path / "rows.jsonl", [chat(f"say {n}", "yes") for n in range(20)])
    train(tmp_path, copied, data, "--set", f"data.template={template}").must(0)
    path = tmp_path / "run" / "adapter" / GENERATION
    assert json.loads(path.read_text("utf-8"))["eos_token_id"] == [0, 1]


def test_generate_stops_where_an_adapter_from_elsewhere_says(tmp_path: Path, llama: Path, rows: Path) -> None:
    """Breaks when the stop tokens of a folder that luthier did not write are passed over."""
    train(tmp_path, llama, rows).must(0)
    folder = tmp_path / "run" / "adapter"
    asked = ("--prompt", "the", "--raw", "--max-new-tokens", 6, "--json")
    free = luthier("generate", llama, "--adapter", folder, *asked).must(0).json["answers"][0]["tokens"]
    (folder / "luthier.json").unlink()
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": [1, free[2]]}), encoding="utf-8")
    said = luthier("generate", llama, "--adapter", folder, *asked).must(0).json["answers"][0]
    assert said["tokens"] == free[: free.index(free[2]) + 1] and said["ended"] == "stop"
