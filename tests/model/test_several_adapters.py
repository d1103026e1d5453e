"""Several adapters in one batch: each tree computes with its own, as if no other were there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from luthier.adapters import Adapter
from luthier.adapters.bottleneck import Bottleneck
from luthier.adapters.dora import DoRA
from luthier.adapters.full import Full
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.adapters.sparse import Sparse
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Tree
from luthier.model.editing.edits import EditedModule, routed
from luthier.model.language_model import LanguageModel
from luthier.model.routes import Routes, predicted_routes, routes_of, routes_over, whole
from luthier.model.running.outputs import LossReport, TokenOutputs
from tests import forests
from tests.contracts.crossed import case

METHODS: Mapping[str, Adapter] = {
    "french": LoRA(rank=3, alpha=6.0),
    "code": LoRA(rank=5, alpha=2.5, targets=("q", "down")),
    "ia3": IA3(),
    "prefix": PrefixTuning(prefix_tokens=3),
    "prompt": PromptTuning(prompt_tokens=4),
}
UNLIKE = ("french", "ia3", "prefix", "prompt")
FUSED = ("french", "code")


def put(model: LanguageModel, name: str, adapter: Adapter) -> None:
    """Attach, move away from the start, and in the same way whoever else is there."""
    torch.manual_seed(len(name))
    attachment = model.attach(adapter.attach(model.sites), name=name)
    forests.shake(attachment.named_parameters().values(), seed=len(name), std=0.1)


def trees_of(names: tuple[str, ...], *, mixed: bool = True) -> list[Tree]:
    """Rows and a tree with branches for each adapter; where `mixed`, those of one do not follow each other."""
    own = {
        name: [*forests.rows(3, seed=place), forests.branching(seed=place, row=9)] for place, name in enumerate(names)
    }
    named = {name: [replace(tree, adapter=name) for tree in trees] for name, trees in own.items()}
    if not mixed:
        return [tree for trees in named.values() for tree in trees]
    return [tree for turn in zip(*named.values(), strict=True) for tree in turn]


def gradients(model: LanguageModel, trees: list[Tree], name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the trees of one adapter, and the gradients of its parameters when all trees run at once."""
    for attachment in model.attachments.values():
        for parameter in attachment.named_parameters().values():
            parameter.grad = None
    outputs = model.token_outputs(Forest(tuple(trees)))
    (outputs.log_probs * outputs.weights).sum().backward()
    own = torch.tensor([trees[tree].adapter in ("", name) for tree in outputs.trees.tolist()])
    parameters = model.attachments[name].named_parameters()
    return outputs.log_probs[own].detach(), {key: each.grad.clone() for key, each in parameters.items()}


def alone(
    architecture: str, name: str, adapter: Adapter, trees: list[Tree], *, fused: bool, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, with no other adapter on the model and trees that name nobody: what the engine did before."""
    model = forests.language_model(architecture, fused=fused, dtype=dtype)
    put(model, name, adapter)
    return gradients(model, [replace(tree, adapter="") for tree in trees if tree.adapter == name], name)


MODELS = [("llama", True), ("llama", False), ("qwen2", True), ("gpt2", False), ("gemma2", False), ("mistral", True)]
ADAPTERS = [UNLIKE, FUSED, ("prefix", "prompt"), ("french", "prompt")]


@pytest.mark.parametrize(
    ("architecture", "fused", "names", "dtype", "tolerance", "mixed"),
    [
        # All adapters on all models in each test run; in one precision and order, in turn.
        case(*model, names, *precision, mixed, quick=(one + two) % 4 == three)
        for (one, model), (two, names) in product(enumerate(MODELS), enumerate(ADAPTERS))
        for three, (precision, mixed) in enumerate(
            product(((torch.float32, 1e-5), (torch.float64, 5e-7)), (True, False))
        )
    ],
)
def test_each_adapter_in_a_batch_computes_and_learns_as_alone(
    architecture: str, names: tuple[str, ...], fused: bool, mixed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Breaks when a row sees an edit or a root of another adapter, starts at another position, or loses its gradient.

    In float64 only the adapters' own float32 rounds (scales are powers of two), and any influence of others would show.
    """
    model = forests.language_model(architecture, fused=fused, dtype=dtype)
    for name in names:
        put(model, name, METHODS[name])
    trees = trees_of(names, mixed=mixed)
    for name in names:
        found, slopes = gradients(model, trees, name)
        expected, truth = alone(architecture, name, METHODS[name], trees, fused=fused, dtype=dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert slopes.keys() == truth.keys()
        for key, slope in slopes.items():
            assert forests.relative_error(slope, truth[key]) <= tolerance, key


@pytest.mark.parametrize(
    "adapter", [DoRA(rank=2), Bottleneck(), Sparse(), LoRA(rank=2, targets=("head", "v"))], ids=repr
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_edits_at_heads_and_whole_feed_forwards_stay_with_their_rows(architecture: str, adapter: Adapter) -> None:
    """Breaks when an edit at another kind of site is passed over, or reaches the rows of the other adapter."""
    model = forests.language_model(architecture)
    put(model, "odd", adapter)
    put(model, "french", METHODS["french"])
    trees = trees_of(("odd", "french"))
    for name, method in (("odd", adapter), ("french", METHODS["french"])):
        found, slopes = gradients(model, trees, name)
        expected, truth = alone(architecture, name, method, trees, fused=True, dtype=torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for key, slope in slopes.items():
            assert forests.relative_error(slope, truth[key]) <= 1e-5, key


def test_trained_tokens_of_one_adapter_are_rows_of_its_own_head_only() -> None:
    """Breaks when the head's trained rows, which the chunked head takes as tensors, count for everyone's tokens."""
    tokens = LoRA(rank=2, trainable_tokens=(5, 9))
    model = forests.language_model("llama")
    put(model, "tokens", tokens)
    put(model, "french", METHODS["french"])
    trees = trees_of(("tokens", "french"))
    for name, method in (("tokens", tokens), ("french", METHODS["french"])):
        found, slopes = gradients(model, trees, name)
        expected, truth = alone("llama", name, method, trees, fused=True, dtype=torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for key, slope in slopes.items():
            assert forests.relative_error(slope, truth[key]) <= 1e-5, key


@pytest.mark.parametrize("names", [FUSED, UNLIKE], ids="-".join)
def test_no_token_of_one_adapter_reaches_another_not_even_when_it_is_not_a_number(names: tuple[str, ...]) -> None:
    """Breaks when rows of others are multiplied by zero instead of left out: zero times NaN is NaN."""
    model = forests.language_model("llama")
    for name in names:
        put(model, name, METHODS[name])
    trees = trees_of(names)
    before = gradients(model, trees, names[0])
    with torch.no_grad():
        for name in names[1:]:
            for parameter in model.attachments[name].named_parameters().values():
                parameter.fill_(torch.nan)
    log_probs, slopes = gradients(model, trees, names[0])
    assert torch.equal(log_probs, before[0])
    # A loss of NaN in one row makes no other row's gradient NaN: each depends on rows of its own.
    assert all(torch.equal(slope, before[1][key]) for key, slope in slopes.items())


@pytest.mark.parametrize("names", [FUSED, UNLIKE], ids="-".join)
def test_recomputed_blocks_know_whose_rows_are_whose(names: tuple[str, ...]) -> None:
    """Breaks when a block that is made again in the backward pass has forgotten the routes of the forward pass."""
    found = []
    for count in (0, 2):
        model = forests.language_model("llama")
        for name in names:
            put(model, name, METHODS[name])
        model.recompute(count)
        found.append([gradients(model, trees_of(names), name)[1] for name in names])
    for kept, again in zip(*found, strict=True):
        assert all(torch.equal(kept[key], again[key]) for key in kept)


@pytest.mark.parametrize("name", ["french", "ia3", "prefix", "prompt"])
def test_a_tree_in_parts_is_computed_by_its_own_adapter(name: str) -> None:
    """Breaks when branches that run apart from their root fall back to all adapters that are switched on."""
    model = forests.language_model("llama")
    for each in UNLIKE:
        put(model, each, METHODS[each])
    tree = replace(forests.branching(seed=4), adapter=name)
    _, truth = gradients(model, [tree], name)
    for parameter in model.attachments[name].named_parameters().values():
        parameter.grad = None

    def loss(outputs: TokenOutputs, _: Forest) -> LossReport:
        total = (outputs.log_probs * outputs.weights).sum()
        return LossReport(total, float(outputs.weights.sum()))

    parts = list(model.backward_in_parts(tree, loss, max_tokens=6))
    assert len(parts) > 2 and all(forest.trees[0].adapter == name for forest, _, _ in parts)
    for key, parameter in model.attachments[name].named_parameters().items():
        assert parameter.grad is not None and forests.relative_error(parameter.grad, truth[key]) <= 1e-5, key


def test_models_without_attention_route_whole_rows() -> None:
    """Breaks when the unrolled executor applies every adapter to every row of its padded batch."""

    def model() -> LanguageModel:
        module = forests.mamba()
        return LanguageModel(module, source="tiny/mamba", digest="")

    adapters = {"one": LoRA(rank=2, targets=("in_proj",)), "two": LoRA(rank=3, targets=("in_proj", "out_proj"))}
    both = model()
    assert both.executor.kind == "unrolled"
    for name, adapter in adapters.items():
        put(both, name, adapter)
    trees = trees_of(("one", "two"))
    for name, adapter in adapters.items():
        single = model()
        put(single, name, adapter)
        expected, truth = gradients(single, [replace(t, adapter="") for t in trees if t.adapter == name], name)
        found, slopes = gradients(both, trees, name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert all(forests.relative_error(slopes[key], truth[key]) <= 1e-5 for key in truth)


def test_the_base_is_multiplied_once_for_all_adapters() -> None:
    """Breaks when each adapter gets a pass of its own over the model."""
    model = forests.language_model("gpt2")
    for name in FUSED:
        put(model, name, METHODS[name])
    calls: list[int] = []
    for site in model.sites.linear():
        site.module.register_forward_hook(lambda module, given, out: calls.append(given[0].shape[1]))
    forest = Forest(tuple(trees_of(FUSED)))
    model.token_outputs(forest)
    assert calls == [forest.token_count] * len(model.sites.linear())


def test_many_adapters_at_once() -> None:
    """Breaks when the number of adapters in a batch is bounded, or their ranges are mistaken for each other's."""
    names = tuple(f"a{number}" for number in range(40))
    model = forests.language_model("llama")
    for number, name in enumerate(names):
        put(model, name, LoRA(rank=1 + number % 5, targets="all-linear" if number % 2 else ("q", "gate", "down")))
    trees = trees_of(names)
    for name in names[::13]:
        adapter = LoRA(rank=1 + int(name[1:]) % 5, targets="all-linear" if int(name[1:]) % 2 else ("q", "gate", "down"))
        expected, truth = alone("llama", name, adapter, trees, fused=True, dtype=torch.float32)
        found, slopes = gradients(model, trees, name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert all(forests.relative_error(slopes[key], truth[key]) <= 1e-5 for key in truth)


def test_what_cannot_be_in_one_batch_is_an_error() -> None:
    """Breaks when a tree of nobody, of somebody who is off, or beside somebody who trains the base, is computed."""
    model = forests.language_model("llama")
    put(model, "french", METHODS["french"])
    (row, *_) = forests.rows(1)
    with pytest.raises(RecipeError, match=r"'frensh'.*french"):
        model.token_outputs(Forest((replace(row, adapter="frensh"),)))
    with pytest.raises(RecipeError, match="1 of 2 trees name no adapter"):
        model.token_outputs(Forest((replace(row, adapter="french"), row)))
    model.switch("french", on=False)
    with pytest.raises(RecipeError, match="switched off"):
        model.token_outputs(Forest((replace(row, adapter="french"),)))
    model.switch("french", on=True)
    put(model, "whole", Full())
    with pytest.raises(RecipeError, match="'whole' trains the model's own weights"):
        model.token_outputs(Forest((replace(row, adapter="french"),)))
    with pytest.raises(RecipeError, match="french"), model.only("frensh"):
        pass


def test_a_module_that_regroups_tokens_is_refused() -> None:
    """Breaks when rows in an order of somebody's own (experts) are cut as if they were the batch's."""
    model = forests.language_model("gpt2")
    put(model, "french", METHODS["french"])
    edited = next(module for module in model.module.modules() if isinstance(module, EditedModule))
    size = model.sites.hidden
    with routed(model.module, whole("french", 6)):
        # All rows are of one: nobody has to tell them apart.
        edited(torch.zeros(6, size))
    with routed(model.module, routes_over([("french", 2), ("", 4)])):
        edited(torch.zeros(1, 6, size))
        for shape in ((6, size), (1, 5, size), (6, 1, size)):
            with pytest.raises(RecipeError, match="one at a time"):
                edited(torch.zeros(shape))
    assert edited.routes is None


def test_routes_join_neighbours_and_cover_everything() -> None:
    """Breaks when ranges are cut finer than needed, leave rows out, or predicted rows are counted as tokens."""
    trees = [replace(tree, adapter=name) for tree, name in zip(forests.rows(4, ones=True), "aabb", strict=True)]
    sizes = [tree.token_count for tree in trees]
    routes = routes_of(Forest(tuple(trees)))
    assert routes is not None and routes.names == ("a", "b")
    assert routes.sizes == [sizes[0] + sizes[1], sizes[2] + sizes[3]] and routes.count == sum(sizes)
    assert predicted_routes(Forest(tuple(trees))).sizes == [sizes[0] + sizes[1] - 2, sizes[2] + sizes[3] - 2]
    assert routes_of(Forest(tuple(forests.rows(3)))) is None and Routes(()).count == 0
