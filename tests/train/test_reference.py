"""Notes on tokens, the reference policy, temperatures and value heads: what objectives of preferences are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import Field

from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.core.errors import DataError
from luthier.data.forest import ROOT, Forest, Segment, Tree
from luthier.data.rendering.rendered import Rendered
from luthier.model.editing.edits import Edit
from luthier.model.editing.value_head import ValueHead
from luthier.model.language_model import LanguageModel
from luthier.model.running.outputs import LossReport, TokenOutputs
from luthier.objectives import Objective
from luthier.optimizers.adamw import AdamW
from luthier.train.stepper import Stepper
from tests.forests import ARCHITECTURES, shake, zoo


def segment(generator: np.random.Generator, count: int, parent: int = ROOT) -> Segment:
    weights = np.zeros(count, np.float32) if parent == ROOT else np.ones(count, np.float32)
    return Segment(generator.integers(0, 60, count).astype(np.int32), weights, parent)


def pair(seed: int, row: int = 0) -> Tree:
    """A prompt with two answers."""
    generator = np.random.default_rng(seed)
    return Tree((segment(generator, 5), segment(generator, 4, 0), segment(generator, 6, 0)), row=row)


class Leash(Objective):
    """The square of how far each token is from the reference, and from the values: nothing that anybody would train."""

    heat: float = Field(1.0, description="of the policy")
    valued: bool = Field(False, description="whether there is a value head")

    @property
    def reference(self) -> bool:
        return True

    @property
    def policy_temperature(self) -> float:
        return self.heat

    def own(self, size: int, device: torch.device) -> list[Edit]:
        return [ValueHead(size, device=device)] if self.valued else []

    def trees(self, view: Rendered, *, epoch: int = 0) -> list[Tree]:
        raise NotImplementedError

    def loss(self, outputs: TokenOutputs, forest: Forest) -> LossReport:
        ratio = outputs.log_probs - outputs.notes["reference"]
        total = (outputs.weights * ratio.square()).sum()
        if outputs.values is not None:
            total = total + (outputs.weights * (outputs.values - ratio.detach() - 1).square()).sum()
        return LossReport(total, forest.weight)


def made(architecture: str, objective: Leash, *, full: bool = False, micro_tokens: int = 1000) -> Stepper:
    model = LanguageModel(zoo(architecture), source=architecture, digest="")
    torch.manual_seed(1)
    size = int(model.config.get_text_config().hidden_size)
    adapter = Full() if full else LoRA()
    attachment = model.attach([*adapter.attach(model.sites), *objective.own(size, model.device)])
    shake(attachment.named_parameters().values(), seed=2)
    return Stepper(model, attachment, objective, AdamW(), micro_tokens=micro_tokens)


def plain(architecture: str, trees: list[Tree], heat: float) -> torch.Tensor:
    """log p of the answers of untouched models at a temperature, one row for each answer."""
    module = zoo(architecture)
    found = []
    for tree in trees:
        for leaf in tree.segments[1:]:
            ids = torch.from_numpy(np.concatenate([tree.segments[0].tokens, leaf.tokens]).astype(np.int64))
            with torch.no_grad():
                logits = module(ids[None]).logits[0].float() / heat
            log_probs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
            found.append(log_probs[-len(leaf.tokens) :])
    return torch.cat(found)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("heat", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_the_model_without_what_is_trained(architecture: str, heat: float, full: bool) -> None:
    """Breaks when the reference sees the adapter or trained weights, or another temperature than the policy's."""
    stepper = made(architecture, Leash(heat=heat), full=full)
    trees = [pair(1), pair(2, row=1)]
    [forest] = stepper.micro_batches(trees)
    [(noted, outputs, report)] = list(stepper.passes(forest))
    expected = plain(architecture, trees, heat)
    assert torch.allclose(outputs.notes["reference"], expected, atol=2e-5)
    assert float((outputs.log_probs.detach() - expected).abs().max()) > 1e-3
    assert float(report.sum.detach()) > 0 and any(p.grad is not None for p in stepper.parameters.values())
    # What is noted once is not computed again.
    bare = Forest(tuple(tree for tree in noted.trees))
    [(again, _, _)] = list(stepper.passes(bare))
    assert again is bare


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_notes_and_values_are_the_same_in_parts(architecture: str) -> None:
    """Breaks when a branch loses its notes, when a value is taken at another state, or the head has no gradient."""
    found = []
    for micro_tokens in (1000, 7):
        stepper = made(architecture, Leash(heat=0.8, valued=True), micro_tokens=micro_tokens)
        report = stepper.forward_backward([pair(1)])
        grads = {name: p.grad.clone() for name, p in stepper.parameters.items() if p.grad is not None}
        found.append((report, grads))
    (whole, expected), (parts, split) = found
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert set(split) == set(expected) and sum("root" in name for name in expected) == 2
    for name, gradient in expected.items():
        assert torch.allclose(split[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-9), name


def test_values_are_of_the_state_a_token_is_chosen_in() -> None:
    """Breaks when a value is that of the state after its token."""
    model = LanguageModel(zoo("llama"), source="llama", digest="")
    head = ValueHead(int(model.config.hidden_size), device=model.device)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.attach([head])
    tree = pair(3)
    values = model.token_outputs(Forest((tree,))).values
    ids = torch.from_numpy(np.concatenate([tree.segments[0].tokens, tree.segments[1].tokens]).astype(np.int64))
    states = model.module.base_model(ids[None]).last_hidden_state[0].float()
    assert values is not None
    assert torch.allclose(values[:4], states[4:8] @ head.weight, atol=1e-4)
    model.detach()
    assert model.token_outputs(Forest((tree,))).values is None


def test_a_note_is_on_all_trained_tokens_of_a_tree_or_on_none() -> None:
    """Breaks when some tokens of a tree would be trained with a note that nobody has made."""
    tree = pair(4)
    half = Tree((tree.segments[0], tree.segments[1].noting("sampled", np.ones(4, np.float32)), tree.segments[2]))
    with pytest.raises(DataError, match="1 of 2 segments"):
        _ = Forest((half,)).layout
    whole = Tree((*half.segments[:2], tree.segments[2].noting("sampled", np.full(6, 2, np.float32))))
    notes = Forest((whole, tree)).layout.notes["sampled"]
    assert notes[:10].tolist() == [1] * 4 + [2] * 6 and np.isnan(notes[10:]).all()
