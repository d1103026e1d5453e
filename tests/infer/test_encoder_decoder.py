"""Generation by encoder-decoders: the zoo's own greedy answers, in batches of texts of different lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.infer.engine import Engine
from luthier.model.speaker import Sampling
from tests import forests, task_models
from tests.task_models import ANSWERS, TEXTS


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart"])
def test_greedy_answers_are_the_zoos(name: str) -> None:
    """Breaks when padding of a batch is read, or an answer begins with another token than the decoder's own."""
    model = task_models.language_model(name, ANSWERS)
    rng = np.random.default_rng(1)
    prompts = [forests.tokens(rng, count) for count in (7, 3, 11, 3)]
    start = int(model.module.config.decoder_start_token_id)
    spoken = Engine(model).speak(prompts, Sampling(max_new_tokens=8, stop_ids=(1,)))
    for prompt, answer in zip(prompts, spoken, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        said = [start]
        while len(said) < 9 and said[-1:] != [1]:
            logits = model.module(input_ids=ids, decoder_input_ids=torch.tensor([said]), use_cache=False).logits[0, -1]
            said.append(int(logits.argmax()))
        assert answer.tokens.tolist() == said[1:]


def test_a_classifier_says_no_text() -> None:
    """Breaks when the classes of a classifier are taken for tokens."""
    model = task_models.language_model("bert", TEXTS)
    with pytest.raises(RecipeError, match="says no text"):
        Engine(model).speak([np.array([5, 6], np.int32)], Sampling(max_new_tokens=2))
