"""Prompt tuning: tokens' own embeddings as prompt are those tokens, and what a prompt may start as."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.adapters.prompt_tuning import PromptTuning
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Segment, Tree
from luthier.infer.engine import Engine
from luthier.model.language_model import LanguageModel
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.model.speaker import Sampling
from tests import forests
from tests.forests import ARCHITECTURES

PROMPT = (9, 77, 31, 4, 50)


def prompted(architecture: str) -> LanguageModel:
    """A model whose learned prompt is the embeddings of the tokens of PROMPT."""
    model = forests.language_model(architecture)
    method = PromptTuning(prompt_tokens=5, init="text", init_ids=tuple((token,) for token in PROMPT))
    model.attach(method.attach(model.sites))
    return model


def negative_log_likelihood(outputs: TokenOutputs, forest: Forest) -> LossReport:
    """The summed loss, as plain as can be."""
    return LossReport(-(outputs.log_probs * outputs.weights).sum(), float(outputs.weights.sum()), {})


def rooted(trees: list[Tree]) -> Forest:
    """The same trees behind the tokens of PROMPT; the first token of each stays without a prediction."""
    silent = Segment(np.array(PROMPT, np.int32), np.zeros(len(PROMPT), np.float32))
    made = []
    for tree in trees:
        segments = [silent]
        for each in tree.segments:
            first = each.parent < 0
            weights = np.append(0 * each.weights[:1], each.weights[1:]) if first else each.weights
            segments.append(Segment(each.tokens, weights, each.parent + 1))
        made.append(Tree(tuple(segments), row=tree.row))
    return Forest(tuple(made))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_of_tokens_is_those_tokens(architecture: str) -> None:
    """Breaks when positions, a scale of embeddings, or what a window sees differ for a prompt."""
    model = prompted(architecture)
    trees = [forests.branching(seed=4), *forests.rows(2, seed=1)]
    found = model.token_outputs(Forest(tuple(trees))).log_probs
    expected = forests.brute_log_probs(forests.zoo(architecture, ours=False), rooted(trees))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_its_gradient_is_that_of_the_embeddings(architecture: str) -> None:
    """Breaks when the prompt is cut off from the graph, or only the first text of a batch reaches it."""
    model = prompted(architecture)
    (parameter,) = model.attachments["default"].named_parameters().values()
    trees = forests.rows(3, seed=2)
    forests.engine_loss(model, trees).backward()
    module = forests.zoo(architecture, ours=False)
    embed = module.get_input_embeddings()
    prompt = embed.weight[list(PROMPT)].detach().clone().requires_grad_()
    total = torch.zeros(())
    for tree in trees:
        segment = tree.segments[0]
        ids = torch.from_numpy(segment.tokens.astype(np.int64))
        logits = module(inputs_embeds=torch.cat([prompt, embed(ids)])[None]).logits[0]
        log_probs = torch.log_softmax(logits[len(PROMPT) : -1], -1).gather(1, ids[1:, None])[:, 0]
        total = total - (log_probs * torch.from_numpy(segment.weights[1:])).sum()
    (expected,) = torch.autograd.grad(total, prompt)
    assert parameter.grad is not None
    assert forests.relative_error(parameter.grad, expected) <= 1e-4


def test_in_parts_the_gradient_is_the_same() -> None:
    """Breaks when the prompt's graph is used twice, or left out for the branches."""
    found = []
    for max_tokens in (4, 10_000):
        model = prompted("llama")
        tree = forests.branching(seed=4)
        if max_tokens == 4:
            for _ in model.backward_in_parts(tree, negative_log_likelihood, max_tokens=max_tokens):
                pass
        else:
            forests.engine_loss(model, [tree]).backward()
        (parameter,) = model.attachments["default"].named_parameters().values()
        found.append(parameter.grad)
    assert forests.relative_error(found[0], found[1]) <= 1e-5


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_recomputing_changes_no_bit(recomputed: int) -> None:
    """Breaks when a recomputed block sees another prompt than it saw first."""
    grads = []
    for count in (0, recomputed):
        model = prompted("llama")
        model.recompute(count)
        forests.engine_loss(model, forests.rows(3, seed=2)).backward()
        (parameter,) = model.attachments["default"].named_parameters().values()
        grads.append(parameter.grad)
    assert torch.equal(grads[0], grads[1])


def test_generation_goes_on_from_the_prompt() -> None:
    """Breaks when generation forgets the prompt, or puts it before every token."""
    question = np.array([5, 17, 90], np.int32)
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    (found,) = Engine(prompted("llama")).speak([question], sampling)
    plain = Engine(forests.language_model("llama"))
    (expected,) = plain.speak([np.concatenate([np.array(PROMPT, np.int32), question])], sampling)
    assert found.tokens.tolist() == expected.tokens.tolist()


def test_what_it_starts_as() -> None:
    """Breaks when a text is not repeated to fit, a label is no mean, or sampled rows are no rows."""
    model = forests.language_model("llama")
    rows = model.module.get_input_embeddings().weight.detach()

    def start(method: PromptTuning) -> torch.Tensor:
        torch.manual_seed(0)
        return method.attach(model.sites)[0].tensors()["prompt_embeddings"].detach()

    text = PromptTuning(prompt_tokens=5, init="text", init_texts=("ab", "c"))
    named = text.with_token_ids(len, (), lambda words: [ord(letter) - 90 for letter in words])
    assert torch.equal(start(named), rows[[7, 8, 9, 7, 8]])
    labels = PromptTuning(prompt_tokens=4, init="labels", init_texts=("ab", "c"))
    named = labels.with_token_ids(len, (), lambda words: [ord(letter) - 90 for letter in words])
    found = start(named)
    torch.testing.assert_close(found[:2], torch.stack([rows[7:9].mean(0), rows[9]]))
    for each in (found[2:], start(PromptTuning(prompt_tokens=9))):
        assert all(bool((rows == row).all(1).any()) for row in each) and len(each.unique(dim=0)) == len(each)
    noise = start(PromptTuning(prompt_tokens=100, init="random", init_std=0.1))
    assert float(noise.abs().max()) <= 0.1 and float(noise.std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_what_it_cannot_start_as() -> None:
    """Breaks when a missing text, an empty label, a foreign token or too long a prompt ends in an index error."""
    sites = forests.language_model("llama").sites
    with pytest.raises(RecipeError, match="nothing says which"):
        PromptTuning(init="text").attach(sites)
    with pytest.raises(RecipeError, match="has no token"):
        PromptTuning(init="labels", init_texts=("",)).with_token_ids(len, (), lambda text: [])
    with pytest.raises(RecipeError, match="has no row"):
        PromptTuning(init="text", init_ids=((10**6,),)).attach(sites)
    with pytest.raises(RecipeError, match="set prompt_tokens"):
        PromptTuning(prompt_tokens=10**5).attach(sites)
    with pytest.raises(RecipeError, match="encoder and a decoder"):
        PromptTuning.from_peft({"num_virtual_tokens": 3, "num_transformer_submodules": 2})
