"""Our own modules stand in for the zoo's where they were seen to give the same bits, and nowhere else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from luthier.adapters import Adapter
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import CorruptError, RecipeError
from luthier.data.forest import Forest
from luthier.data.hub import ModelFiles
from luthier.infer.engine import Engine
from luthier.model import known_decoders, load
from luthier.model.files.tensor_files import read_weights
from luthier.model.language_model import LanguageModel
from luthier.model.load import kind_of_source, load_model
from luthier.model.own.config import OwnConfig
from luthier.model.own.decoder import Decoder
from luthier.model.speaker import Sampling
from luthier.model.zoo_again import zoo_module
from luthier.quantizers import Quantizer
from luthier.recipes.opening.quantized import quantize
from tests import forests
from tests.tiny import HIDDEN, LAYERS, VOCABULARY, tiny_config

FOREST = Forest((forests.branching(seed=1), *forests.rows(3, seed=2)))
SHARED = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
          "bos_token_id": None, "eos_token_id": 1}  # fmt: skip


def _llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**{**SHARED, **more})


LIKE: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_config("llama"),
    "llama with biases, no padding": lambda: _llama(attention_bias=True, mlp_bias=True, pad_token_id=None),
    "llama 3": lambda: _llama(
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn": lambda: _llama(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                            "original_max_position_embeddings": 64}),
    "qwen2, tied": lambda: tiny_config("qwen2"),
    "qwen3": lambda: transformers.Qwen3Config(**SHARED, head_dim=16),
    "mistral, window": lambda: tiny_config("mistral"),
}  # fmt: skip
UNLIKE: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: tiny_config("gemma2"),
    "gpt2": lambda: tiny_config("gpt2"),
    "dropout": lambda: _llama(attention_dropout=0.1),
    "angles that go by the length": lambda: _llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "another activation": lambda: _llama(hidden_act="gelu"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that knows no decoder yet; kernels stay where they are."""
    monkeypatch.setattr(known_decoders, "cache_folder", lambda: tmp_path / "cache")


def folder_of(config: Any, place: Path, *, seed: int = 0) -> Path:
    """A model folder with weights that are all random."""
    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    forests.shake(list(module.parameters()), seed=seed, std=0.15)
    module.save_pretrained(str(place))
    return place


def both(folder: Path, precision: Any = "float32") -> tuple[LanguageModel, LanguageModel]:
    """A model as the zoo has it, and from our own modules once that is known."""
    first, second = (load_model(str(folder), precision=precision, device="cpu", own_modules=True) for _ in range(2))
    assert not isinstance(first.module, Decoder)
    return first, second


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LIKE)
def test_they_give_the_same_bits(kind: str, precision: str, tmp_path: Path) -> None:
    """Breaks when a norm, an angle, a window, a tie or a bias is another one than the zoo's."""
    zoo, own = both(folder_of(LIKE[kind](), tmp_path / "model"), precision)
    assert isinstance(own.module, Decoder)
    assert (own.digest, own.dtype, own.notices, own.sites.tied) == (zoo.digest, zoo.dtype, zoo.notices, zoo.sites.tied)
    assert [site.name for site in own.sites] == [site.name for site in zoo.sites]
    assert own.sites.stop_ids == zoo.sites.stop_ids and own.context_tokens == zoo.context_tokens
    assert {name: tensor.tolist() for name, tensor in own.module.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in zoo.module.state_dict().items()
    }
    assert torch.equal(own.token_outputs(FOREST).log_probs, zoo.token_outputs(FOREST).log_probs)


@pytest.mark.parametrize("kind", ["qwen2, tied", "qwen3", "mistral, window"])
@pytest.mark.parametrize("adapter", catalog.names("adapters"))
def test_what_is_on_them_has_the_same_gradients(adapter: str, kind: str, tmp_path: Path) -> None:
    """Breaks where something surrounds a part, and that part runs by itself in another way than the zoo's."""
    found = []
    for model in both(folder_of(LIKE[kind](), tmp_path / "model")):
        torch.manual_seed(1)
        model.attach(choose("adapters", Adapter, adapter).attach(model.sites))
        forests.shake([each for each in model.attachments["default"].named_tensors().values() if each.ndim > 1], seed=3)
        model.module.train()
        loss = forests.engine_loss(model, FOREST.trees)
        slopes = forests.gradients(loss, forests.trainable(model))
        found.append({"loss": loss.tolist(), **{name: each.tolist() for name, each in slopes.items()}})
    assert len(found[0]) > 1 and found[0] == found[1]


@pytest.mark.parametrize("quantizer", [name for name in catalog.names("quantizers") if name != "none"])
def test_they_are_packed_alike(quantizer: str, tmp_path: Path) -> None:
    """Breaks when a quantizer takes other layers of them, or a packed one computes in another way."""
    zoo, own = both(folder_of(LIKE["qwen2, tied"](), tmp_path / "model"))
    before = own.token_outputs(FOREST).log_probs
    for model in (zoo, own):
        quantize(model, choose("quantizers", Quantizer, quantizer), head=True)
    assert not torch.equal(own.token_outputs(FOREST).log_probs, before)
    assert torch.equal(own.token_outputs(FOREST).log_probs, zoo.token_outputs(FOREST).log_probs)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral, window"])
def test_they_say_the_same(kind: str, tmp_path: Path) -> None:
    """Breaks when the engine keeps other pages for them, or reads a prompt in another way."""
    prompts = [forests.tokens(np.random.default_rng(length), length) for length in (1, 9, 30)]
    wanted = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    zoo, own = (Engine(model).speak(prompts, wanted) for model in both(folder_of(LIKE[kind](), tmp_path / "model")))
    assert [list(each.tokens) for each in own] == [list(each.tokens) for each in zoo]
    assert [list(each.log_probs) for each in own] == [list(each.log_probs) for each in zoo] and len(own) == 3


@pytest.mark.parametrize("kind", UNLIKE)
def test_other_models_stay_with_the_zoo(kind: str, tmp_path: Path) -> None:
    """Breaks when a model of another shape, or one that drops, is believed to be such a decoder."""
    for model in both(folder_of(UNLIKE[kind](), tmp_path / "model")):
        assert not isinstance(model.module, Decoder)


def test_nobody_gets_them_who_has_not_asked(tmp_path: Path) -> None:
    """Breaks when whoever needs the zoo's module gets ours, once it is known, or calls ours and is not told."""
    folder = folder_of(LIKE["llama"](), tmp_path / "model")
    own = both(folder)[1].module
    assert isinstance(own, Decoder)
    with pytest.raises(RecipeError, match="own_modules=False"):
        own(input_ids=torch.arange(3)[None])
    assert not isinstance(load_model(str(folder), precision="float32", device="cpu").module, Decoder)


def test_other_weights_and_another_precision_are_proved_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when what was seen of some weights is believed of others: whatever makes them other numbers."""
    folder = folder_of(LIKE["llama"](), tmp_path / "model")
    both(folder)
    assert not isinstance(load_model(str(folder), precision="bfloat16", device="cpu", own_modules=True).module, Decoder)
    kept, times = (folder / "config.json").read_bytes(), list[Path]()
    folder_of(LIKE["llama"](), folder, seed=1)
    assert (folder / "config.json").read_bytes() == kept

    def noting(paths: list[Path], *, widen: bool) -> dict[str, torch.Tensor]:
        times.extend(paths)
        return read_weights(paths, widen=widen)

    monkeypatch.setattr(load, "read_weights", noting)
    load_model(str(folder), precision="bfloat16", device="cpu", own_modules=True)
    assert len(times) == 1, "what was read is read again"
    assert isinstance(both(folder)[1].module, Decoder)


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.1), ("rope_parameters", {"rope_theta": 99.0})])
def test_another_config_is_another_model(key: str, value: Any, tmp_path: Path) -> None:
    """Breaks when a config that was changed under the same weights is not read again."""
    folder = folder_of(LIKE["llama"](), tmp_path / "model")
    before = both(folder)[1].token_outputs(FOREST).log_probs
    config = json.loads((folder / "config.json").read_text())
    config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    zoo, own = both(folder)
    assert isinstance(own.module, Decoder) and not torch.equal(own.token_outputs(FOREST).log_probs, before)
    assert torch.equal(own.token_outputs(FOREST).log_probs, zoo.token_outputs(FOREST).log_probs)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"config": {}}', "cut", "other shape", "no layers", "odd calls"])
def test_a_memory_that_is_damaged_is_asked_anew(damage: str, tmp_path: Path) -> None:
    """Breaks when half a file, or one from elsewhere, ends a start."""
    folder = folder_of(LIKE["llama"](), tmp_path / "model")
    both(folder)
    for path in (tmp_path / "cache" / known_decoders.FOLDER).iterdir():
        text, said = path.read_text(), json.loads(path.read_text())
        if damage == "other shape" and "shape" in said:
            said["shape"]["parameters"]["lm_head.weight"] = [1, 1]
        if damage == "no layers" and "calls" in said:
            said["calls"] = []
        if damage == "odd calls" and "calls" in said:
            said["calls"] = [7, [0], ["0", 1.0, None], *said["calls"][1:]]
        path.write_text({"cut": text[: len(text) // 2], "other shape": json.dumps(said),
                         "no layers": json.dumps(said), "odd calls": json.dumps(said)}.get(damage, damage))  # fmt: skip
    assert isinstance(both(folder)[1].module, Decoder)


def test_a_model_with_files_that_lost_a_tensor_is_told_as_the_zoo_tells_it(tmp_path: Path) -> None:
    """Breaks when our own modules take what does not fit, or end in another error."""
    folder = folder_of(LIKE["llama"](), tmp_path / "model")
    both(folder)
    fewer = folder_of(_llama(num_hidden_layers=1), tmp_path / "fewer")
    shutil.copyfile(fewer / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CorruptError, match="missing"):
        load_model(str(folder), precision="float32", device="cpu", own_modules=True)


@pytest.mark.parametrize("kind", ["llama", "qwen2, tied"])
def test_the_zoo_takes_the_weights_back_as_they_are(kind: str, tmp_path: Path) -> None:
    """Breaks when a model that was trained in our modules is saved with other weights, or as another model."""
    zoo, own = both(folder_of(LIKE[kind](), tmp_path / "model"), "bfloat16")
    with torch.no_grad():
        for model in (zoo, own):
            model.module.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(2)
    assert zoo_module(zoo.module) is zoo.module
    back = zoo_module(own.module)
    for place, module in (("a", zoo.module), ("b", back)):
        module.save_pretrained(str(tmp_path / place))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    ids = torch.arange(8)[None]
    assert torch.equal(back(input_ids=ids).logits, zoo.module(input_ids=ids).logits)


@pytest.mark.parametrize("kind", LIKE)
def test_a_config_says_the_same_without_its_class(kind: str, tmp_path: Path) -> None:
    """Breaks when a value is lost on the way: whoever asks for it would get a default without a word."""
    folder = folder_of(LIKE[kind](), tmp_path / "model")
    zoo, own = (model.config for model in both(folder))
    assert isinstance(own, OwnConfig) and own.get_text_config() is own
    beside = ("dtype", "id2label", "label2id", "transformers_version")
    said = {name: value for name, value in zoo.to_dict().items() if name not in beside and name[0] != "_"}
    assert len(said) > 20 and {name: own.to_dict()[name] for name in said} == said
    assert getattr(own, "no_such_key", None) is None and kind_of_source(str(folder)) == "causal"


def test_a_start_from_memory_imports_neither_zoo_nor_compiler(tmp_path: Path) -> None:
    """Breaks when a start takes the time of a thousand modules that nobody asks for."""
    folder = folder_of(LIKE["llama"](), tmp_path / "model")
    program = f"""
import sys
from luthier.adapters.lora import LoRA
from luthier.model.load import kind_of_source, load_model
from luthier.model import known_decoders, load
from luthier.model.files.tensor_files import read_weights
from luthier.optimizers.adamw import AdamW
from pathlib import Path
known_decoders.cache_folder = lambda: Path({str(tmp_path / "cache")!r})
kind_of_source({str(folder)!r})
model = load_model({str(folder)!r}, precision="float32", device="cpu", own_modules=True)
attached = model.attach(LoRA(rank=2).attach(model.sites))
optimizer = AdamW().build(attached.named_tensors())
for each in attached.named_tensors().values():
    each.grad = each.detach().clone()
optimizer.step()
optimizer.zero_grad()
print(type(model.module).__name__, *sorted({{"transformers", "torch._dynamo", "sympy"}} & set(sys.modules)))
"""
    said = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(2)]  # fmt: skip
    assert said[0][0] == "LlamaForCausalLM" and said[1] == ["Decoder"]


def test_what_is_in_no_folder_is_never_known() -> None:
    assert known_decoders.known_decoder(ModelFiles("owner/name", None, cached=True)) is None
