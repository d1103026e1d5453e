"""llama.cpp reads our files: the logits of every family, a LoRA on its base, ids of hard texts, the chat template.

A peer for tests, which is compiled where it is installed: `pip install llama-cpp-python`, then `pytest -m slow`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from luthier.data.forest import Ints
from luthier.data.tokenizer import Tokenizer
from luthier.exporters.gguf import Gguf
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.gguf.model_file import Model, read_weights_back, write_model
from luthier.model.gguf.reading import GgufFile
from luthier.model.gguf.reading_tokens import backend_of
from luthier.model.gguf.splits import APPROXIMATED, SPLITS, WHOLE_WORDS
from luthier.model.gguf.vocabulary import PROBES
from luthier.model.load import resolve_source
from tests.exported import ARCHITECTURES, subject
from tests.model.gguf import models
from tests.model.gguf.test_vocabulary import byte_level, sentencepiece, stripping, with_runs

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # it leaves files of its own open
IDS = (torch.arange(40) * 37 % 300 + 10)[None]
SMALL = (np.arange(30) * 37 % 120 + 3).astype(np.int32)


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


def logits(engine: Any, ids: Ints) -> Tensor:
    engine.reset()
    engine.eval(ids.tolist())
    return torch.from_numpy(np.array(engine.scores[: len(ids)]))


@pytest.fixture(scope="module")
def seedling() -> Tokenizer:
    return Tokenizer.load(resolve_source("seedling"))


@pytest.mark.parametrize("kind", models.KINDS)
def test_every_family_computes_the_same(kind: str, seedling: Tokenizer, tmp_path: Path) -> None:
    """Positions from 0 to 39: beyond the windows of six, and over the bends of scaled frequencies."""
    made = written(tmp_path / "m.gguf", kind, seedling, vocabulary=4096)
    wanted = made(IDS).logits[0].detach()
    found = logits(peer(tmp_path / "m.gguf"), IDS[0].numpy())
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
    away = (logits(peer(tmp_path / "m.gguf"), IDS[0].numpy()) - wanted).square().mean().sqrt()
    assert float(away) < 0.03 * float(wanted.std())


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"gpt2"}))
def test_a_lora_computes_the_same(architecture: str, tmp_path: Path) -> None:
    """On every matrix of every block, beside the base as its own file."""
    given, base = subject(architecture, tmp_path, adapter="lora"), subject(architecture, tmp_path / "base")
    for exporter, of, name in ((Gguf(type="F32"), base, "m"), (Gguf(part="adapter"), given, "a")):
        exporter.require(of)
        (tmp_path / name).mkdir()
        exporter.write(of, tmp_path / name, lambda _line: None)
    wanted, bare = (torch.from_numpy(ModelSide("", each.model).logits(SMALL)) for each in (given, base))
    engine = peer(tmp_path / "m" / "model.gguf", lora_path=str(tmp_path / "a" / "adapter.gguf"))
    found = logits(engine, SMALL)
    assert float((bare - wanted).abs().max()) > float(wanted.std())
    assert float((found - wanted).abs().max()) < 0.01 * float(wanted.std())
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


TOKENIZERS: dict[str, tuple[str, Callable[[], Tokenizer]]] = {
    "seedling": ("llama", lambda: Tokenizer.load(resolve_source("seedling"))),
    "Llama 2": ("llama", lambda: sentencepiece(prefix=True)),
    "Gemma": ("gemma", lambda: sentencepiece(prefix=False)),
    "Gemma 2": ("gemma2", lambda: sentencepiece(prefix=False)),
    "Phi 2": ("phi", with_runs),
    "Phi 3": ("phi3", stripping),
    **{name: ("qwen2", partial(byte_level, APPROXIMATED.get(name, cut), merged_whole=name in WHOLE_WORDS))
       for name, cut in SPLITS.items()},
}  # fmt: skip
HARD = (*PROBES, "ÜBER naïveÉcole ǅ ПриветМир İi", "Привет, мир! Ça va? ñandú 東京都 🙂🙂  ok", " ", "\n\n", "   the",
        "the   ", "a\t\t\tb\n\n  \n\n\n\nc", "\u2581the \u2581\u2581 x")  # fmt: skip


@pytest.mark.parametrize("how", TOKENIZERS)
def test_texts_are_cut_alike(how: str, tmp_path: Path) -> None:
    """By llama.cpp as by our reader of the file, whatever the text; as by the tokenizer, where nothing else is told."""
    kind, make = TOKENIZERS[how]
    tokenizer = make()
    written(tmp_path / "m.gguf", kind, tokenizer, vocabulary=tokenizer.vocabulary_size + 5)
    engine, read = peer(tmp_path / "m.gguf"), backend_of(GgufFile.open(tmp_path / "m.gguf").keys)
    marked = [f"{special}user\nHello there{special} and 12" for special in sorted(tokenizer.specials.texts)]
    for text in (*HARD, *marked):
        theirs = engine.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == read.encode(text, add_special_tokens=False).ids, text
        assert how in APPROXIMATED or theirs == tokenizer.encode(text)[0].tolist(), text
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
