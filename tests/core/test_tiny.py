"""The tiny models are what their users take them for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import KINDS, VOCABULARY, tiny_model, tiny_tokenizer


def test_the_tokenizer_writes_every_ascii_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\nthe thing\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCABULARY
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_models_load_from_their_folder_and_are_the_same_each_time(
    kind: str, tiny_path: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_path(kind)
    assert tiny_path(kind) == folder
    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(str(folder))("in the end")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(kind)(ids).logits)
