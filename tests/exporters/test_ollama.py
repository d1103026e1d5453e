"""Exports for Ollama: a Modelfile that says what the model does, and a refusal where its language has no words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from luthier.core.errors import RecipeError, TemplateError
from luthier.data.rendering.go_template import ollama_values, render
from luthier.data.tokenizer import Tokenizer
from luthier.exporters.ollama import Ollama
from luthier.model.gguf.modelfile import Modelfile, modelfile
from luthier.model.gguf.reading import GgufFile
from luthier.recipes.exporting.export import Source, export
from tests.exported import subject
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
    return made_of(template, **values).text


def made_of(template: str | None = CHAT_TEMPLATE, **values: Any) -> Modelfile:
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


def test_what_cannot_be_stripped_is_told() -> None:
    said = text_of(CHAT_TEMPLATE.replace("message['content']", "message['content'].lstrip()"))
    assert said.startswith("# white space around a message is not treated as by the model's template")


def with_bos() -> Tokenizer:
    """The tiny tokenizer, beginning texts with a token."""
    raw = tiny_tokenizer()
    raw.bos_token = "<|start|>"
    raw.backend_tokenizer.post_processor = processors.TemplateProcessing("<|start|> $A", None, [("<|start|>", 2)])
    return Tokenizer.of(raw)


@pytest.mark.parametrize("begins", [True, False])
def test_bos_is_put_before_a_text_where_it_was_in_training(begins: bool, tmp_path: Path) -> None:
    """Breaks when the file tells Ollama to begin with a token that the template has elsewhere, or nowhere."""
    tokenizer, template = with_bos(), CHAT_TEMPLATE if begins else f"Chat: {CHAT_TEMPLATE}"
    given = replace(subject("llama", tmp_path), tokenizer=tokenizer, chat_template=template)
    assert tokenizer.adds_bos
    Ollama(type="F32").write(given, tmp_path, lambda _line: None)
    assert GgufFile.open(tmp_path / "model.gguf").keys["tokenizer.ggml.add_bos_token"] is begins
    text = Read.of((tmp_path / "Modelfile").read_text())["TEMPLATE"][0]
    made = render(text, ollama_values([{"role": "user", "content": "x"}]))
    assert made.startswith("user\n" if begins else "Chat: <|start|>user\n")
    if not begins:
        with pytest.raises(TemplateError, match="which Ollama puts before every text of this base"):
            made_of(template, tokenizer=tokenizer, adapter="./adapter.gguf")
