"""Exports for Ollama: a Modelfile that says what the model does, and a refusal where its language has no words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import RecipeError, TemplateError
from luthier.data.rendering.go_template import ollama_values, render
from luthier.data.tokenizer import Tokenizer
from luthier.exporters.ollama import Ollama
from luthier.model.gguf.modelfile import modelfile
from luthier.recipes.export import Source, export
from tests.exporters.gguf_folders import lora_folder
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

pytest.importorskip("gguf")
TinyPath = Callable[[str], Path]


@dataclass
class Read:
    """A Modelfile as Ollama's parser reads it: a word, and a text that ends with the line or its quotes."""

    said: list[tuple[str, str]]

    @classmethod
    def of(cls, text: str) -> Read:
        said, rest = [], text
        while rest := rest.lstrip():
            if rest.startswith("#"):
                rest = rest.partition("\n")[2]
                continue
            word, _, rest = rest.partition(" ")
            if rest.startswith('"""'):
                value, _, rest = rest[3:].partition('"""')
            else:
                value, _, rest = rest.partition("\n")
            said.append((word, value))
        return cls(said)

    def __getitem__(self, word: str) -> list[str]:
        return [value for key, value in self.said if key == word]


def test_a_model_that_chats_as_it_was_trained(tiny_path: TinyPath, tmp_path: Path) -> None:
    source = Source(name=str(tiny_path("llama")), precision="float32")
    found = export(source, Ollama(type="F32", system="Be kind."), tmp_path / "out")
    assert set(found["files"]) >= {"model.gguf", "Modelfile"}
    read = Read.of((tmp_path / "out" / "Modelfile").read_text())
    assert read["FROM"] == ["./model.gguf"] and read["SYSTEM"] == ["Be kind."]
    assert read["PARAMETER"] == ['stop "<|end|>"']
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi \"you\"\nthere"}]
    wanted = "<|start|>system\nS<|end|>\n<|start|>user\nHi \"you\"\nthere<|end|>\n<|start|>assistant\n"
    assert render(read["TEMPLATE"][0], ollama_values(messages)) == wanted
    assert "ollama create" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_needs_the_name_of_its_base(tiny_path: TinyPath, tmp_path: Path) -> None:
    source = Source(name=str(tiny_path("llama")), precision="float32", adapter=str(lora_folder(tmp_path / "lora")))
    with pytest.raises(RecipeError, match="no base is named"):
        export(source, Ollama(part="adapter"), tmp_path / "out")
    export(source, Ollama(part="adapter", base="tiny:latest"), tmp_path / "out")
    read = Read.of((tmp_path / "out" / "Modelfile").read_text())
    assert read["FROM"] == ["tiny:latest"] and read["ADAPTER"] == ["./adapter.gguf"]


def text_of(template: str | None = CHAT_TEMPLATE, **values: Any) -> str:
    settings = {"base": "./model.gguf", "tokenizer": Tokenizer.of(tiny_tokenizer()), "stop_ids": (1,),
                "generation": {}, "template": template}  # fmt: skip
    return modelfile(**{**settings, **values})


def test_settings_have_ollamas_names() -> None:
    read = Read.of(text_of(stop_ids=(1, 2), generation={
        "temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1, "max_new_tokens": 128, "x": "y",
    }))  # fmt: skip
    assert read["PARAMETER"] == ['stop "<|end|>"', 'stop "<|start|>"', "temperature 0.7", "top_k 40",
                                 "repeat_penalty 1.1", "num_predict 128"]  # fmt: skip


def test_a_model_without_a_chat_is_given_its_prompt() -> None:
    assert Read.of(text_of(None, stop_ids=()))["TEMPLATE"] == ["{{ .Prompt }}"]


def test_what_a_modelfile_cannot_hold_is_refused() -> None:
    with pytest.raises(TemplateError, match="cannot be written in Ollama's language"):
        text_of("{% for message in messages %}{{ loop.index }}{{ message.content }}{% endfor %}")
    with pytest.raises(RecipeError, match="has quotes that end it"):
        text_of(system='say """')
    with pytest.raises(RecipeError, match="the name of the base is"):
        text_of(base="a\nADAPTER ./other")


def test_what_is_stripped_is_told() -> None:
    said = text_of(CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"))
    assert said.startswith("# the model's template strips white space around a message")
