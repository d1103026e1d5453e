"""Mixes of adapters: each part times its weight, exactly, wherever rows name an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.adapters.bottleneck import Bottleneck
from luthier.adapters.dora import DoRA
from luthier.adapters.full import Full
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA, combined
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.adapters.trainable_tokens import TrainableTokens
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Span, Tree
from luthier.model.attending.attention import ForestPlan
from luthier.model.language_model import LanguageModel
from luthier.model.running.executor import flat_hidden
from luthier.model.running.outputs import LossReport
from tests import forests
from tests.contracts.crossed import crossed

ADAPTERS: dict[str, Adapter] = {
    "french": LoRA(rank=3, alpha=6.0),
    "code": LoRA(rank=5, alpha=2.5, targets=("q", "down")),
    "formal": LoRA(rank=2, init="pissa", targets=("v", "up", "o")),
    "ia3": IA3(),
    "narrow": Bottleneck(preset="houlsby", size=4),
    "beside": Bottleneck(preset="parallel", size=4),
    "dora": DoRA(rank=2, targets=("q", "v", "down")),
    "tokens": LoRA(rank=2, targets=("v",), trainable_tokens=(5, 9)),
    "head": LoRA(rank=2, targets=("head", "q")),
    "prefix": PrefixTuning(prefix_tokens=3),
    "prompt": PromptTuning(prompt_tokens=4),
}
KINDS = [("llama", True), ("llama", False), ("gpt2", False), ("mistral", True), ("gemma2", False)]
kinds = pytest.mark.parametrize(("architecture", "fused"), KINDS)


def put(model: LanguageModel, *names: str) -> LanguageModel:
    """Attach, moved away from the start, each in the same way whoever else is there."""
    for name in names:
        adapter = ADAPTERS[name]
        if name in ("beside", "narrow") and not model.sites.role("feed"):
            adapter = Bottleneck(size=4)
        if name == "formal" and not model.sites.role("up"):
            adapter = LoRA(rank=2, init="pissa", targets=("v", "down"))
        torch.manual_seed(len(name))
        attachment = model.attach(adapter.attach(model.sites), name=name)
        forests.shake(attachment.named_parameters().values(), seed=len(name), std=0.1)
    return model


def made(architecture: str, *names: str, fused: bool = True, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return put(forests.language_model(architecture, fused=fused, dtype=dtype), *names)


def trees(name: str, *, seed: int = 0) -> list[Tree]:
    return [replace(tree, adapter=name) for tree in (*forests.rows(2, seed=seed), forests.branching(seed=seed))]


def outputs(model: LanguageModel, *names: str) -> list[Tensor]:
    """The log-probabilities of some trees under each name, all in one batch, those of different names mixed."""
    turns = [replace(one, adapter=name) for turn in zip(*(trees(n) for n in names), strict=True)
             for one, name in zip(turn, names, strict=True)]  # fmt: skip
    found = model.token_outputs(Forest(tuple(turns)))
    owners = torch.tensor([place % len(names) for place in found.trees.tolist()])
    return [found.log_probs[owners == place].detach() for place in range(len(names))]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@kinds
def test_a_mix_of_low_rank_terms_is_the_sum_of_the_updates(architecture: str, fused: bool) -> None:
    """Breaks when factors are added instead of laid side by side: that has products of one's A with another's B."""
    weights = {"french": 0.75, "code": -1.5, "formal": 0.5}
    model = made(architecture, *weights, fused=fused)
    model.mix("blend", [*weights.items()])
    (found, alone, _) = outputs(model, "blend", "french", "code")
    oracle = made(architecture, *weights, fused=fused)
    parts = [(oracle.attachments[name].edits, weight) for name, weight in weights.items()]
    _, edits = combined(parts, oracle.sites)
    for name in weights:
        oracle.detach(name)
    oracle.attach(edits, name="whole")
    close(found, outputs(oracle, "whole")[0])
    close(alone, outputs(made(architecture, "french", fused=fused), "french")[0])


TOGETHER = [
    ("french", "code"), ("ia3", "french"), ("narrow", "ia3", "code"), ("dora", "beside"), ("tokens", "french"),
    ("head", "tokens"), ("french", "prefix"), ("prompt", "ia3", "french"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "kind"), crossed(TOGETHER, KINDS, always=KINDS[:1]))
def test_a_mix_with_weights_of_one_is_all_of_them_switched_on(
    kind: tuple[str, bool], names: tuple[str, ...]
) -> None:
    """Breaks when edits of a mix nest in another order than those of attachments, or a root's part is left out."""
    architecture, fused = kind
    model = made(architecture, *names, fused=fused)
    model.mix("all", [(name, 1.0) for name in names])
    expected = model.token_outputs(Forest(tuple(trees("")))).log_probs.detach()
    close(outputs(model, "all", names[0])[0], expected)


@pytest.mark.parametrize(("name", "kind"), crossed(ADAPTERS, KINDS, always=KINDS[:1]))
def test_a_mix_of_one_part_is_that_adapter_to_the_bit(kind: tuple[str, bool], name: str) -> None:
    """Breaks when a weight of one is multiplied in, or a weight of zero leaves something of a part behind."""
    architecture, fused = kind
    model = made(architecture, name, fused=fused)
    model.mix("same", [(name, 1.0)])
    model.mix("none", [(name, 0.0)])
    model.mix("base", [])
    for mix, other in (("same", name), ("none", "base")):
        assert torch.equal(outputs(model, mix)[0], outputs(model, other)[0]), mix
    plain = forests.language_model(architecture, fused=fused).token_outputs(Forest(tuple(trees(""))))
    close(outputs(model, "base", "same")[0], plain.log_probs)


@kinds
@pytest.mark.parametrize("weight", [0.5, -1.25])
def test_a_weight_scales_what_an_edit_changes(architecture: str, fused: bool, weight: float) -> None:
    """Breaks when a vector or an addition is scaled as a whole, and not what it changes."""
    for name in ("ia3", "narrow"):
        model, oracle = (made(architecture, name, fused=fused) for _ in range(2))
        model.mix("scaled", [(name, weight)])
        with torch.no_grad():
            for edit in oracle.attachments[name].edits:
                if name == "ia3":
                    edit.vector.copy_(1 + weight * (edit.vector - 1))
                else:
                    edit.scale *= weight
        close(outputs(model, "scaled", name)[0], outputs(oracle, name)[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_scaled_dora_lies_on_the_line_between_the_weights(architecture: str) -> None:
    """Breaks when lengths are scaled by themselves: what is promised is W + w (W' - W)."""
    model, merged, plain = made(architecture, "dora"), made(architecture, "dora"), forests.language_model(architecture)
    model.mix("half", [("dora", 0.5)])
    merged.merge("dora")
    with torch.no_grad():
        for mine, theirs in zip(plain.module.parameters(), merged.module.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    expected = plain.token_outputs(Forest(tuple(trees("")))).log_probs
    close(outputs(model, "half", "dora")[0], expected, 2e-5)


@kinds
@pytest.mark.parametrize("adapter", [TrainableTokens(tokens=(5, 9)), LoRA(rank=2, targets=("head",))], ids=repr)
def test_a_scaled_change_of_the_head_is_a_smaller_change(architecture: str, fused: bool, adapter: Adapter) -> None:
    """Breaks when trained rows of the head, or a term on it, count whole in a mix, or for somebody else."""

    def moved(std: float) -> LanguageModel:
        model = made(architecture, "french", fused=fused)
        attachment = model.attach(adapter.attach(model.sites), name="top")
        # What rows change is linear in them; of a term it is in the second factor, which starts at zero.
        changed = [each for name, each in attachment.named_parameters().items() if not name.endswith("down")]
        forests.shake(changed, seed=1, std=std)
        return model

    model, oracle = moved(0.2), moved(0.1)
    model.mix("mixed", [("top", 0.5), ("french", 1.0)])
    oracle.mix("mixed", [("top", 1.0), ("french", 1.0)])
    for found, expected in zip(outputs(model, "mixed", "french"), outputs(oracle, "mixed", "french"), strict=True):
        close(found, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_go_to_every_part_times_its_weight(fused: bool) -> None:
    """Breaks when a mix in a batch that is differentiated is cut off its parameters."""
    names, weight = ("french", "ia3", "dora"), 0.5
    found = {}
    for way in (True, False):
        model = made("llama", *names, fused=way and fused, dtype=torch.float64)
        model.mix("blend", [(name, weight) for name in names])
        result = model.token_outputs(Forest((*trees("blend"), *trees("french", seed=1))))
        (result.log_probs * result.weights).sum().backward()
        found[way] = [p.grad for name in names for p in model.attachments[name].named_parameters().values()]
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in found[True])
    for one, other in zip(found[True], found[False], strict=True):
        assert forests.relative_error(one, other) <= 1e-6
    model = made("llama", *names, fused=fused, dtype=torch.float64)
    model.mix("blend", [(name, weight) for name in names])
    parameter = model.attachments["ia3"].edits[0].vector

    def total() -> Tensor:
        result = model.token_outputs(Forest(tuple(trees("blend"))))
        return (result.log_probs * result.weights).sum()

    total().backward()
    assert parameter.grad is not None
    sums = []
    with torch.no_grad():
        start = float(parameter[3])
        for step in (1e-2, -1e-2):
            parameter[3] = start + step
            sums.append((float(total()), float(parameter[3])))
    slope = (sums[0][0] - sums[1][0]) / (sums[0][1] - sums[1][1])
    assert float(parameter.grad[3]) == pytest.approx(slope, rel=2e-2)


# ------------------------------------------------------------------------------------------------ rows of a flat pass


def states(model: LanguageModel, rows: Sequence[tuple[str, int]], *, gradients: bool) -> list[Tensor]:
    """The final states of texts under names, in one flat pass, by what `LanguageModel.routes` says of them."""
    texts = [forests.tokens(np.random.default_rng(seed), 4 + seed % 5) for _, seed in rows]
    spans, start = [], 0
    for text in texts:
        spans.append(Span(start, start + len(text), ()))
        start += len(text)
    with torch.set_grad_enabled(gradients):
        routes = model.routes((name, len(text)) for (name, _), text in zip(rows, texts, strict=True))
        plan = ForestPlan(spans=tuple(spans), routes=routes, row_routes=routes)
        places = torch.cat([torch.arange(len(text)) for text in texts])
        tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
        made = flat_hidden(model.module, tokens, places, plan, blocks=model.executor.blocks)
        # Of the last block only rows that are asked for, as in generation.
        ends = torch.tensor([span.stop - 1 for span in spans])
        plan = ForestPlan(spans=tuple(spans), routes=routes, row_routes=model.routes((name, 1) for name, _ in rows))
        last = flat_hidden(model.module, tokens, places, plan, blocks=model.executor.blocks, rows=ends)
    close(last.detach(), made[ends].detach())
    assert (routes.thin is None) == gradients
    return [made[span.start : span.stop].detach() for span in spans]


NAMES = ("", "french", "blend", "code", "ia3", "narrow", "formal", "dora", "odd")
PARTS = {"blend": [("french", 0.5), ("code", -1.0)], "odd": [("ia3", 0.5), ("french", 2.0), ("code", 1.0)]}


@kinds
@pytest.mark.parametrize("gradients", [False, True])
def test_rows_of_the_base_of_adapters_and_of_mixes_are_each_as_alone(
    architecture: str, fused: bool, gradients: bool
) -> None:
    """Breaks when a row of nobody sees an edit, or terms that are added at once reach other rows than theirs."""
    names = ("french", "code", "formal", "ia3", "narrow", "dora")
    model = made(architecture, *names, fused=fused)
    for mix, parts in PARTS.items():
        model.mix(mix, parts)
    rows = [(name, seed) for seed in range(3) for name in NAMES]
    found = states(model, rows, gradients=gradients)
    for each, row in zip(found, rows, strict=True):
        (alone,) = states(model, [row], gradients=True)
        close(each, alone)
    lora = [(name, seed) for seed in range(2) for name in ("", "french", "blend", "code", "formal")]
    for each, row in zip(states(model, lora, gradients=gradients), lora, strict=True):
        close(each, states(model, [row], gradients=True)[0])
    (base,) = states(made(architecture, fused=fused), [("", 1)], gradients=True)
    assert torch.equal(states(model, [("", 1)], gradients=True)[0], base)


@pytest.mark.parametrize("fused", [True, False])
def test_nobody_else_is_read_not_even_to_be_multiplied_by_zero(fused: bool) -> None:
    """Breaks when terms of others are masked instead of left out."""
    model = made("llama", "french", "code", fused=fused)
    rows = [("french", 1), ("code", 2), ("", 3), ("french", 4)]
    before = states(model, rows, gradients=False)
    with torch.no_grad():
        for parameter in model.attachments["code"].named_parameters().values():
            parameter.fill_(torch.nan)
    after = states(model, rows, gradients=False)
    assert all(torch.equal(after[place], before[place]) for place in (0, 2, 3)) and bool(after[1].isnan().any())


def test_terms_that_are_kept_follow_the_parameters() -> None:
    """Breaks when a pass computes with factors from before a step, or with those of somebody who left."""
    model = made("llama", "french", "code")
    rows = [("french", 1), ("code", 2)]
    states(model, rows, gradients=False)
    forests.shake(model.attachments["french"].named_parameters().values(), seed=9)
    for each, row in zip(states(model, rows, gradients=False), rows, strict=True):
        close(each, states(model, [row], gradients=True)[0])
    model.detach("french")
    torch.manual_seed(77)
    again = model.attach(ADAPTERS["french"].attach(model.sites), name="french")
    forests.shake(again.named_parameters().values(), seed=78)
    for each, row in zip(states(model, rows, gradients=False), rows, strict=True):
        close(each, states(model, [row], gradients=True)[0])
    model.detach("code")
    model.detach("french")
    assert not model._terms.sites


def test_many_adapters_of_many_ranks() -> None:
    """Breaks when numbers of terms are mistaken for each other's as adapters come and go."""
    model = forests.language_model("llama")

    def come(number: int) -> None:
        torch.manual_seed(number)
        adapter = LoRA(rank=1 + number % 7, targets="all-linear" if number % 2 else ("q", "down"))
        forests.shake(model.attach(adapter.attach(model.sites), name=f"a{number}").named_parameters().values())

    for number in range(24):
        come(number)
    rows = [(f"a{number}", number) for number in range(24)]
    states(model, rows, gradients=False)
    for number in (3, 0, 17):
        model.detach(f"a{number}")
    for number in (40, 41, 42, 43):
        come(number)
    rows = [(name, int(name[1:])) for name in model.attachments]
    for each, row in zip(states(model, rows, gradients=False), rows, strict=True):
        close(each, states(model, [row], gradients=True)[0])


def test_bfloat16_rows_are_as_near_as_one_adapter_alone() -> None:
    """Breaks when factors in another precision than the rows' are read as if they were in it."""
    names = ("french", "code", "ia3")
    model, exact = (made("llama", *names, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    rows = [("french", 1), ("", 2), ("code", 3), ("ia3", 4)]
    for each, expected in zip(states(model, rows, gradients=False), states(exact, rows, gradients=False), strict=True):
        assert forests.relative_error(each.float(), expected) < 0.06


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_mixed_is_an_error() -> None:
    """Breaks when a root is scaled or doubled, a trained base is mixed, or a name is taken twice."""
    model = made("llama", "french", "prefix", "prompt")
    refused = [
        ("french", [], "cannot name a mix"),
        ("", [], "cannot name a mix"),
        ("m", [("frensh", 1.0)], "'frensh'.*french"),
        ("m", [("french", 1.0), ("french", 2.0)], "2 times"),
        ("m", [("french", float("nan"))], "weight nan"),
        ("m", [("prefix", 0.5)], "learned root.*1 for adapters"),
        ("m", [("prefix", 1.0), ("prompt", 1.0)], "2 parts with a learned root"),
    ]
    for name, parts, words in refused:
        with pytest.raises(RecipeError, match=words):
            model.mix(name, parts)
    model.mix("m", [("prefix", 1.0), ("prompt", 0.0)])
    with pytest.raises(RecipeError, match="cannot name a mix"):
        model.mix("m", [])
    with pytest.raises(RecipeError, match="cannot name an attachment"):
        model.attach(ADAPTERS["code"].attach(model.sites), name="m")
    with pytest.raises(RecipeError, match="part of the mix 'm'"):
        model.detach("prefix")
    model.detach("prompt")
    model.unmix("m")
    with pytest.raises(RecipeError, match="no mix is called 'm'"):
        model.unmix("m")
    model.detach("prefix")
    model.mix("half", [("french", 0.5)])
    with pytest.raises(RecipeError, match="part of the mix 'half'"):
        model.merge("french")
    model.switch("french", on=False)
    for named in ("half", "french"):
        with pytest.raises(RecipeError, match="'french' is switched off"):
            model.token_outputs(Forest(tuple(trees(named))))
        with pytest.raises(RecipeError, match="'french' is switched off"):
            model.routes([(named, 2)])
    with pytest.raises(RecipeError, match="'nobody'.*half"):
        model.routes([("nobody", 2)])
    model.switch("french", on=True)
    with pytest.raises(RecipeError, match="the mix 'half', in parts"):
        next(iter(model.backward_in_parts(replace(forests.branching(), adapter="half"),
                                          lambda outputs, _: LossReport(outputs.log_probs.sum(), 1.0), max_tokens=9)))
    model.attach(Full().attach(model.sites), name="whole")
    with pytest.raises(RecipeError, match="trains the model's own weights"):
        model.mix("w", [("whole", 1.0)])
    with pytest.raises(RecipeError, match="trains the model's own weights"):
        model.routes([("half", 2)])


@kinds
@pytest.mark.parametrize("name", ["french", "narrow", "tokens", "prompt"])
def test_an_adapter_for_rows_that_name_it_computes_no_others(architecture: str, fused: bool, name: str) -> None:
    """Breaks when an adapter that was brought for requests changes what is trained or sampled beside them."""
    plain = forests.language_model(architecture, fused=fused)
    expected = plain.token_outputs(Forest(tuple(trees("")))).log_probs
    usual = made(architecture, name, fused=fused)
    model = forests.language_model(architecture, fused=fused)
    torch.manual_seed(3)
    edits = usual.detach(name).edits
    model.attach(edits, name=name, named_only=True)
    assert torch.equal(model.token_outputs(Forest(tuple(trees("")))).log_probs, expected)
    assert model.active_root is None
    close(outputs(model, name)[0], outputs(made(architecture, name, fused=fused), name)[0])
    with pytest.raises(RecipeError, match="the same for all rows"):
        model.attach(Full().attach(model.sites), name="whole", named_only=True)
