"""llama.cpp reads our files: the logits of every family, a LoRA on its base, ids of hard texts, the chat template.

A peer for tests, which is compiled where it is installed: `pip install llama-cpp-python`, then `pytest -m slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from luthier.data.tokenizer import Tokenizer
from luthier.model.gguf.lora_file import write_lora
from luthier.model.gguf.model_file import Model, read_weights_back, write_model
from luthier.model.gguf.reading import GgufFile
from luthier.model.gguf.vocabulary import PROBES
from luthier.model.load import resolve_source
from tests.model.gguf import models
from tests.model.gguf.test_lora_file import LAYERS, adapter, update
from tests.model.gguf.test_vocabulary import sentencepiece

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # it leaves files of its own open
IDS = (torch.arange(40) * 37 % 300 + 10)[None]


def written(path: Path, kind: str, tokenizer: Tokenizer, *, vocabulary: int) -> Any:
    """A random model of a family with this tokenizer, also as the file `path`."""
    config = models.config(kind)
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    write_model(path, Model(name="tiny", config=config, tensors=made.state_dict(), tokenizer=tokenizer,
                            template=tokenizer.chat_template, stop_ids=tokenizer.eos_ids), "F32")  # fmt: skip
    return made


def peer(path: Path, **settings: Any) -> Any:
    # Keys and values in float32: only the order of sums is left.
    return llama_cpp.Llama(str(path), n_ctx=128, verbose=False, logits_all=True, n_threads=1, type_k=0, type_v=0,
                           **settings)  # fmt: skip


def logits(engine: Any) -> Tensor:
    engine.reset()
    engine.eval(IDS[0].tolist())
    return torch.from_numpy(np.array(engine.scores[: IDS.shape[1]]))


@pytest.fixture(scope="module")
def seedling() -> Tokenizer:
    return Tokenizer.load(resolve_source("seedling"))


@pytest.mark.parametrize("kind", models.KINDS)
def test_every_family_computes_the_same(kind: str, seedling: Tokenizer, tmp_path: Path) -> None:
    """Positions from 0 to 39: beyond the windows of six, and over the bends of scaled frequencies."""
    made = written(tmp_path / "m.gguf", kind, seedling, vocabulary=4096)
    wanted = made(IDS).logits[0].detach()
    found = logits(peer(tmp_path / "m.gguf"))
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.std())
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) == 1


@pytest.mark.parametrize("choice", ["Q8_0", "Q4_0", "Q4_K"])
def test_every_format_is_read_alike(choice: Any, seedling: Tokenizer, tmp_path: Path) -> None:
    """Against our own reading of the same file; llama.cpp rounds inputs to eight bits, too."""
    made = models.wide()
    made.resize_token_embeddings(4096)
    made.config.tie_word_embeddings = False
    write_model(tmp_path / "m.gguf", Model(name="wide", config=made.config, tensors=made.state_dict(), stop_ids=(1,),
                                           tokenizer=seedling, template=None), choice)  # fmt: skip
    made.load_state_dict(read_weights_back(GgufFile.open(tmp_path / "m.gguf"), made.config))
    wanted = made(IDS).logits[0].detach()
    away = (logits(peer(tmp_path / "m.gguf")) - wanted).square().mean().sqrt()
    assert float(away) < 0.03 * float(wanted.std())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_lora_computes_the_same(kind: str, seedling: Tokenizer, tmp_path: Path) -> None:
    made = written(tmp_path / "m.gguf", kind, seedling, vocabulary=4096)
    folder = adapter(tmp_path / "peft", use_rslora=True, lora_alpha=2, alpha_pattern={"k_proj": 0.5})
    write_lora(tmp_path / "a.gguf", folder, made.config, name="mine")
    bare = made(IDS).logits[0].detach()
    with torch.no_grad():
        for layer in LAYERS:
            made.get_parameter(f"model.layers.0.{layer}.weight").add_(update(folder, layer))
    wanted = made(IDS).logits[0].detach()
    found = logits(peer(tmp_path / "m.gguf", lora_path=str(tmp_path / "a.gguf")))
    assert float((bare - wanted).abs().max()) > 1
    assert float((found - wanted).abs().max()) < 2e-2


@pytest.mark.parametrize("how", ["seedling", "prefix", "plain"])
def test_texts_are_cut_alike(how: str, seedling: Tokenizer, tmp_path: Path) -> None:
    tokenizer = seedling if how == "seedling" else sentencepiece(prefix=how == "prefix")
    written(tmp_path / "m.gguf", "llama", tokenizer, vocabulary=tokenizer.vocabulary_size + 5)
    engine = peer(tmp_path / "m.gguf")
    marked = [f"{special}user\nHello there{special} and 12" for special in sorted(tokenizer.specials.texts)]
    for text in (*PROBES, *marked):
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)[0].tolist()
    assert engine.tokenize(b"the", add_bos=True) == list(tokenizer.raw("the")["input_ids"])


def test_the_chat_template_renders_alike(seedling: Tokenizer, tmp_path: Path) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    written(tmp_path / "m.gguf", "llama", seedling, vocabulary=4096)
    template = peer(tmp_path / "m.gguf").metadata["tokenizer.chat_template"]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "yes"}, {"role": "user", "content": "?"}]  # fmt: skip
    theirs = Jinja2ChatFormatter(template=template, bos_token="<|begin|>", eos_token="<|end|>")(messages=messages)
    ours = seedling.raw.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs.prompt == ours
