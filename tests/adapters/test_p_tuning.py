"""P-tuning: the encoders of PEFT, and that a saved prompt needs none."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from luthier.adapters.p_tuning import PTuning
from luthier.core.errors import RecipeError
from luthier.model.editing.prompts import EncodedPrompt, Prompt
from tests import forests


@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("lstm", 1), ("lstm", 2), ("none", 2)])
def test_the_count_is_that_of_the_modules(encoder: Literal["mlp", "lstm", "none"], layers: int) -> None:
    """Breaks when the closed form forgets a direction, a layer or a bias."""
    model = forests.language_model("llama")
    method = PTuning(prompt_tokens=3, encoder=encoder, encoder_size=5, lstm_layers=layers)
    (edit,) = method.attach(model.sites)
    assert sum(parameter.numel() for parameter in edit.parameters()) == method.parameter_count(model.sites)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_it_is_the_encoder_of_peft(encoder: Literal["mlp", "lstm"]) -> None:
    """Breaks when a layer is missing, bends elsewhere, or reads the prompt in one direction only."""
    peft: Any = pytest.importorskip("peft")
    model = forests.language_model("llama")
    (edit,) = PTuning(prompt_tokens=6, encoder=encoder, encoder_size=5).attach(model.sites)
    assert isinstance(edit, EncodedPrompt)
    config = peft.PromptEncoderConfig(
        encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=5, num_virtual_tokens=6,
        token_dim=model.sites.hidden, num_transformer_submodules=1, num_layers=2, num_attention_heads=4,
    )  # fmt: skip
    theirs = peft.PromptEncoder(config)
    pairs = [(theirs.embedding.weight, edit.prompt)]
    own = edit.encoder if encoder == "mlp" else edit.encoder.mlp
    assert isinstance(own, nn.Module)
    pairs += list(zip(theirs.mlp_head.parameters(), own.parameters(), strict=True))
    if encoder == "lstm":
        pairs += list(zip(theirs.lstm_head.parameters(), edit.encoder.lstm.parameters(), strict=True))
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
    expected = theirs(torch.arange(6)[None])[0]
    torch.testing.assert_close(edit.embeddings(torch.float32), expected, rtol=1e-5, atol=1e-6)


def test_what_is_read_from_a_file_has_no_encoder() -> None:
    """Breaks when a folded prompt is encoded once more."""
    model = forests.language_model("llama")
    method = PTuning(prompt_tokens=4)
    again = PTuning.from_peft(method.peft_config(model.sites))
    (edit,) = again.attach(model.sites)
    assert again.encoder == "none" and isinstance(edit, Prompt) and edit.token_count == 4
    with pytest.raises(RecipeError, match="encoder and a decoder"):
        PTuning.from_peft({"num_virtual_tokens": 3, "num_transformer_submodules": 2})


def test_dropout_is_between_layers_and_in_training_only() -> None:
    """Breaks when the knob is not read, or a prompt is saved with something dropped."""
    model = forests.language_model("llama")
    (edit,) = PTuning(encoder="lstm", lstm_dropout=0.5, encoder_size=8).attach(model.sites)
    assert isinstance(edit, EncodedPrompt)
    edit.train()
    assert not torch.equal(edit.embeddings(torch.float32), edit.embeddings(torch.float32))
    edit.eval()
    assert torch.equal(edit.embeddings(torch.float32), edit.embeddings(torch.float32))
