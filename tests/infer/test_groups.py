"""Many answers to one prompt: read once, and drawn as if each had been asked for alone."""

from __future__ import annotations

import numpy as np

from luthier.infer.engine import Engine
from luthier.infer.groups import GroupSpeaker
from luthier.model.speaker import PolicySampling
from tests import forests


def test_answers_of_a_group_are_those_of_single_requests() -> None:
    """Breaks when answers of a group are copies, come in another order, or draw by another number."""
    model = forests.language_model("llama")
    rng = np.random.default_rng(2)
    one, two = forests.tokens(rng, 4), forests.tokens(rng, 6)
    sampling = PolicySampling(max_new_tokens=5, seed=9, temperature=1.3)
    asked = [one, one, one, two, two, one]
    grouped, single = GroupSpeaker(Engine(model)).speak(asked, sampling), Engine(model).speak(asked, sampling)
    assert [each.tokens.tolist() for each in grouped] == [each.tokens.tolist() for each in single]
    assert np.allclose([each.log_probs for each in grouped], [each.log_probs for each in single], atol=1e-5)
    assert len({tuple(each.tokens.tolist()) for each in grouped[:3]}) > 1
