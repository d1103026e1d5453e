"""Generation by packed weights against plain ones that hold the very numbers which they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core import catalog
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.infer.scheduler import Room
from luthier.model.packed import packing_of
from luthier.model.speaker import Sampling
from luthier.recipes.opening.quantized import quantize
from tests import forests
from tests.infer.test_engine import PROMPTS, check_against_full_forwards

METHODS = [name for name in catalog.names("quantizers") if name != "none"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_weights_say_what_their_numbers_say(method: str, architecture: str) -> None:
    """Breaks when a kernel for few rows, for many rows or for a head reads other numbers than were packed."""
    packed, plain = forests.language_model(architecture), forests.language_model(architecture)
    # A head that is tied would be two parameters.
    quantize(packed, catalog.load("quantizers", method)(), head=architecture != "gpt2")
    count = 0
    for (name, weight), (_, other) in zip(
        packed.module.named_parameters(), plain.module.named_parameters(), strict=True
    ):
        packing = packing_of(weight)
        if packing is not None:
            count += 1
            with torch.no_grad():
                numbers = packing.dense(torch.float32)
                other.copy_(numbers.T if architecture == "gpt2" else numbers)  # whose layers keep them the other way
        else:
            assert torch.equal(weight, other), name
    assert count >= 4
    sampling = Sampling(max_new_tokens=9)
    together = Engine(packed).speak(PROMPTS, sampling)
    for prompt, spoken, expected in zip(PROMPTS, together, Engine(plain).speak(PROMPTS, sampling), strict=True):
        check_against_full_forwards(packed, prompt, spoken)
        assert spoken.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(spoken.log_probs, expected.log_probs, atol=1e-4)
    # A prompt in pieces, one after another instead of side by side.
    engine = Engine(packed, room=Room(tokens=64, page=4, rows=1, pass_tokens=4))
    [[alone]] = engine.answer([Request(prompt=PROMPTS[2], sampling=sampling)])
    assert alone.tokens.tolist() == together[2].tokens.tolist()
