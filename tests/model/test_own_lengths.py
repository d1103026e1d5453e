"""Texts of one pass, each turned by its own length, against the zoo's own forward of each alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.data.forest import Forest, Segment, Span, Tree
from luthier.model.language_model import LanguageModel
from luthier.model.running.own_lengths import short_length, span_lengths
from luthier.objectives.sft import SFT
from tests import forests, longrope
from tests.longrope import SHORT, Kind

KINDS: tuple[Kind, ...] = ("llama", "phi3")
RNG = np.random.default_rng(3)
LENGTHS = (5, SHORT, SHORT + 1, 9, 60)


def row(length: int, *, place: int = 0, adapter: str = "") -> Tree:
    """A row whose every token counts."""
    return Tree((forests.segment(RNG, length, weights=[1.0] * length),), row=place, adapter=adapter)


def apart(model: LanguageModel, trees: list[Tree]) -> Tensor:
    """What the trees say, each alone in a pass of the zoo's own forward."""
    found = []
    for tree in trees:
        (segment,) = tree.segments
        ids = torch.from_numpy(segment.tokens.astype(np.int64))
        log_probs = torch.log_softmax(model.module(input_ids=ids[None], use_cache=False).logits[0], -1)
        found.append(log_probs[:-1].gather(1, ids[1:, None])[:, 0])
    return torch.cat(found).detach()


def test_a_tree_is_as_long_as_its_longest_way() -> None:
    """Breaks when branches are turned otherwise than the prompt they share, or places ahead are left out."""
    spans = [Span(0, 7, ()), Span(7, 10, (0,)), Span(10, 11, (0,)), Span(11, 13, (0, 1)), Span(13, 17, ())]
    assert span_lengths(spans, [0] * 5) == [12, 12, 12, 12, 4]
    assert span_lengths(spans, [5, 5, 5, 5, 0]) == [17, 17, 17, 17, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_what_it_says_alone(kind: Kind) -> None:
    """Breaks when a long row turns its neighbours, or the module is left other than it was."""
    model = longrope.language_model(kind)
    assert (model.executor.blocks is not None) == (kind == "llama") and model.executor.kind == "segments"
    assert short_length(model.module.base_model) == SHORT
    trees = [row(length, place=place) for place, length in enumerate(LENGTHS)]
    before = type(model.module.base_model.rotary_emb)
    found = model.token_outputs(Forest(tuple(trees))).log_probs
    assert type(model.module.base_model.rotary_emb) is before
    expected = apart(model, trees)
    torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=0)
    # The angles matter: in one pass of the zoo's rule the short ones would be others.
    alone = model.token_outputs(Forest((trees[0],))).log_probs
    ids = np.concatenate([trees[0].segments[0].tokens, forests.tokens(RNG, SHORT)])
    turned = torch.log_softmax(forests.logits(model, ids), -1)[: LENGTHS[0] - 1]
    wrong = turned.gather(1, torch.from_numpy(ids[1 : LENGTHS[0]].astype(np.int64))[:, None])[:, 0]
    assert float((alone - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_branches_and_parts_are_turned_as_the_longest_of_their_tree(kind: Kind) -> None:
    """Breaks when a part of a long tree is turned as the short text that it looks like."""
    model = longrope.language_model(kind)
    torch.manual_seed(0)
    forests.shake(model.attach(LoRA(rank=2).attach(model.sites)).named_parameters().values())
    parameters = dict(model.attachments["default"].named_parameters())
    sizes = [(7, -1), (4, 0), (SHORT, 0), (3, 1)]
    segments = [forests.segment(RNG, size, parent=parent, weights=[1.0] * size) for size, parent in sizes]
    tree = Tree(tuple(segments))
    once = forests.gradients(SFT().loss(model.token_outputs(Forest((tree,))), Forest((tree,))).sum, parameters)
    model.module.zero_grad(set_to_none=True)
    parts = list(model.backward_in_parts(tree, SFT().loss, max_tokens=5))
    assert len(parts) > 2
    for key, parameter in parameters.items():
        assert parameter.grad is not None and forests.relative_error(parameter.grad, once[key]) <= 1e-5, key
    longest = Tree((Segment(np.concatenate([segments[0].tokens, segments[2].tokens]), np.ones(7 + SHORT, np.float32)),))
    found = model.token_outputs(Forest((tree,))).log_probs[6 + 4 : 6 + 4 + SHORT]
    torch.testing.assert_close(found.detach(), apart(model, [longest])[6:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("named", [False, True])
def test_a_learned_root_counts_and_a_prompt_is_turned_with_its_text(kind: Kind, method: str, named: bool) -> None:
    """Breaks when rows see the prompt of texts that are not as long as they are."""
    model = longrope.language_model(kind)
    adapter = PromptTuning(prompt_tokens=4) if method == "prompt" else PrefixTuning(prefix_tokens=4, init_std=0.5)
    torch.manual_seed(0)
    forests.shake(model.attach(adapter.attach(model.sites), name="one").named_parameters().values())
    lengths = (3, SHORT - 4, SHORT - 3, 8, 40)
    names = ["one" if named else ""] * len(lengths)
    trees = [row(length, adapter=name) for length, name in zip(lengths, names, strict=True)]
    found = model.token_outputs(Forest(tuple(trees))).log_probs
    alone = [model.token_outputs(Forest((tree,))).log_probs for tree in trees]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)
    if method == "prompt":
        (parameter,) = model.attachments["one"].named_parameters().values()
        embed = model.module.get_input_embeddings()
        for tree, own in zip(trees, alone, strict=True):
            ids = torch.from_numpy(tree.segments[0].tokens.astype(np.int64))
            states = torch.cat([parameter, embed(ids)])[None]
            logits = model.module(inputs_embeds=states, use_cache=False).logits[0, 4:-1]
            expected = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)


def test_several_adapters_in_one_batch_are_each_alone() -> None:
    """Breaks when roots of two lengths of one adapter are mixed up with those of another."""
    model = longrope.language_model("llama")
    methods = {"p": PromptTuning(prompt_tokens=3), "q": PromptTuning(prompt_tokens=5), "l": LoRA(rank=2)}
    for name, adapter in methods.items():
        torch.manual_seed(1)
        forests.shake(model.attach(adapter.attach(model.sites), name=name).named_parameters().values())
    own = [(4, "p"), (30, "q"), (22, "q"), (5, "l"), (33, "p"), (26, "l"), (6, "q")]
    trees = [row(length, adapter=name) for length, name in own]
    found = model.token_outputs(Forest(tuple(trees))).log_probs
    alone = [model.token_outputs(Forest((tree,))).log_probs for tree in trees]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)
