"""Surgery where attachments meet: nesting, merging one of two, an edited head, names, and switching around errors."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA, LowRank, combined
from luthier.core.errors import DriftError, RecipeError
from luthier.data.forest import Forest
from luthier.model.editing import attachment
from luthier.model.editing.edits import EditedModule, base_parameters
from luthier.model.files.adapter_files import check_base
from luthier.model.language_model import LanguageModel
from luthier.model.load import state_digest
from luthier.model.running.executor import run_segments
from luthier.model.running.unrolled import run_unrolled
from luthier.train.result import save_result
from tests import forests

IDS = np.array([5, 17, 90, 3, 44, 71], dtype=np.int32)
MERGEABLE: dict[str, Adapter] = {
    "lora": LoRA(rank=3),
    "ia3": IA3(),
    "lora-2": LoRA(rank=2, alpha=4.0, targets=("q", "down")),
}


def put(model: LanguageModel, adapter: Adapter, name: str, *, seed: int) -> None:
    """Attach and move away from the start."""
    forests.shake(model.attach(adapter.attach(model.sites), name=name).named_parameters().values(), seed=seed)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("first", "second"), list(product(MERGEABLE, MERGEABLE)))
def test_merging_one_of_two_and_then_the_other_changes_nothing(first: str, second: str, architecture: str) -> None:
    """Breaks when a folded update lands inside a rescaling it used to stand outside of, or the reverse."""
    model = forests.language_model(architecture)
    put(model, MERGEABLE[first], "one", seed=1)
    put(model, MERGEABLE[second], "two", seed=2)
    both = forests.logits(model, IDS)
    model.merge("one")
    assert forests.relative_error(forests.logits(model, IDS), both) <= 1e-5
    model.merge("two")
    assert forests.relative_error(forests.logits(model, IDS), both) <= 1e-5


def test_merging_the_outer_one_first_is_refused_before_anything_changes() -> None:
    """Breaks when a merge out of order goes through: rescaled updates would become another model."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=3), "inner", seed=1)
    put(model, IA3(), "outer", seed=2)
    both, before = forests.logits(model, IDS), forests.snapshot(model.module)
    with pytest.raises(RecipeError, match="merge or detach 'inner' first"):
        model.merge("outer")
    assert forests.snapshot(model.module) == before and torch.equal(forests.logits(model, IDS), both)


def test_merges_are_undone_in_the_reverse_order_only() -> None:
    """Breaks when a weight of an earlier merge comes back over a later one, or an adapter outside another."""
    model = forests.language_model("llama")
    before = forests.snapshot(model.module)
    put(model, LoRA(rank=3), "one", seed=1)
    put(model, IA3(), "two", seed=2)
    both = forests.logits(model, IDS)
    model.merge("one")
    with pytest.raises(RecipeError, match="'two' cannot be taken out"):
        model.unmerge("two")
    model.merge("two")
    with pytest.raises(RecipeError, match="is 'two'"):
        model.unmerge("one")
    model.unmerge("two")
    put(model, LoRA(rank=3), "three", seed=3)
    with pytest.raises(RecipeError, match="three came or went"):
        model.unmerge("one")
    model.detach("three")
    model.unmerge("one")
    assert torch.equal(forests.logits(model, IDS), both) and list(model.attachments) == ["one", "two"]
    model.merge("one")
    model.merge("two", reversible=False)
    with pytest.raises(RecipeError, match="is nothing"):
        model.unmerge("one")
    model = forests.language_model("llama")
    put(model, Full(), "full", seed=1)
    put(model, LoRA(rank=3), "lora", seed=2)
    with pytest.raises(RecipeError, match="trains the weights that 'lora' would be folded into"):
        model.merge("lora")
    model.merge("full")
    model.merge("lora")
    model.unmerge("lora")
    model.unmerge("full")
    model.detach("lora")
    model.detach("full")
    plain = forests.snapshot(model.module)
    assert plain[1] == before[1]


def test_an_adapter_of_the_old_base_is_refused_on_a_merged_one(tmp_path: Path) -> None:
    """Breaks when a merged model still goes by the digest of what it was before."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=3), "default", seed=1)
    folder = save_result(tmp_path, model, model.attachments["default"], LoRA(rank=3), {})
    model.merge()
    with pytest.raises(DriftError, match="was trained on base weights"):
        check_base(folder, model)
    model.unmerge()
    check_base(folder, model)


def test_an_attachment_merged_while_off_does_not_silence_its_successor() -> None:
    """Breaks when the name of a merged attachment stays in a site's list of switched-off ones."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=3), "one", seed=1)
    put(model, IA3(), "two", seed=2)
    model.switch("one", on=False)
    model.merge("one")
    without = forests.logits(model, IDS)
    put(model, LoRA(rank=3), "one", seed=3)
    assert not torch.equal(forests.logits(model, IDS), without)


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "gpt2"])
def test_an_edited_head_keeps_the_scale_and_cap_of_its_model(architecture: str) -> None:
    """Breaks when log-probabilities under an edited head skip the final soft cap of the architecture."""
    model = forests.language_model(architecture)
    put(model, LoRA(rank=4, targets=("head", "v")), "default", seed=1)
    forest = Forest((*forests.rows(3), forests.branching(seed=1)))
    parts = []
    for tree in forest.trees[:3]:
        row = tree.segments[0]
        log_probs = torch.log_softmax(forests.logits(model, row.tokens)[:-1], -1)
        own = log_probs.gather(1, torch.from_numpy(row.tokens[1:].astype(np.int64))[:, None])[:, 0]
        parts.append(own[torch.from_numpy(row.weights[1:] != 0)])
    truth = torch.cat(parts)
    for run in (run_segments, run_unrolled):
        outputs = run(model.module, forest, head=model.head)
        torch.testing.assert_close(outputs.log_probs[: len(truth)].detach(), truth, rtol=1e-5, atol=1e-5)
    with model.without_attachments():
        plain = forests.brute_log_probs(forests.zoo(architecture, ours=False), forest)
        torch.testing.assert_close(model.token_outputs(forest).log_probs, plain, rtol=1e-4, atol=1e-5)


def test_tied_weights_stay_tied_under_full_and_after_undo() -> None:
    """Breaks when head and embedding are trained apart: the saved file holds only one of them."""
    model = forests.language_model("qwen2")
    table = model.module.get_input_embeddings().weight
    assert model.module.get_output_embeddings().weight is table
    attachment = model.attach(Full().attach(model.sites))
    trained = model.module.get_input_embeddings().weight
    assert trained is not table and model.module.get_output_embeddings().weight is trained
    assert sum(parameter is trained for parameter in attachment.named_parameters().values()) == 1
    with model.without_attachments():
        assert model.module.get_output_embeddings().weight is table is model.module.get_input_embeddings().weight
    model.detach()
    assert model.module.get_output_embeddings().weight is table is model.module.get_input_embeddings().weight


def test_parameters_of_the_base_are_found_under_their_own_names_below_edits() -> None:
    """Breaks when full fine-tuning beside a LoRA trains a copy of the LoRA."""
    model = forests.language_model("gpt2")
    plain = {name: id(parameter) for name, parameter in base_parameters(model.module).items()}
    put(model, LoRA(rank=2), "one", seed=1)
    assert any(isinstance(module, EditedModule) for module in model.module.modules())
    assert {name: id(parameter) for name, parameter in base_parameters(model.module).items()} == plain


def test_the_reference_policy_ends_with_its_block_even_after_an_error() -> None:
    """Breaks when an exception leaves the model switched off."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=2), "default", seed=1)
    adapted = forests.logits(model, IDS)

    def fail() -> None:
        with model.without_attachments():
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(forests.logits(model, IDS), adapted)


@pytest.mark.parametrize("name", ["default", "", "a.b"])
def test_names_of_attachments_are_unused_and_without_dots(name: str) -> None:
    """Breaks when a second attachment takes the place of the first without a word."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=2), "default", seed=1)
    with pytest.raises(RecipeError, match="cannot name"):
        model.attach(IA3().attach(model.sites), name=name)


def test_an_unknown_attachment_is_an_error_that_names_the_known() -> None:
    """Breaks when taking off what is not on passes for done."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=2), "poems", seed=1)
    with pytest.raises(RecipeError, match="poems"):
        model.detach("poem")
    with pytest.raises(RecipeError, match="changes nothing"):
        model.attach([], name="empty")


def test_a_swap_takes_microseconds_and_visits_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a swap does work at each site: walking to 14 sites, twice, took 270 microseconds, one switch 0.4.

    The bound is for machines that are busy, and for types that are checked at each call.
    """
    model = forests.language_model("llama")
    for name in ("one", "two"):
        put(model, LoRA(rank=3), name, seed=len(name))
    model.switch("two", on=False)

    def visit(module: object, name: str) -> None:
        raise AssertionError(f"a swap went to {name}")

    monkeypatch.setattr(attachment, "module_at", visit)
    names, times = [("one", "two"), ("two", "one")], []
    for turn in range(200):
        off, on = names[turn % 2]
        began = time.perf_counter()
        model.switch(off, on=False)
        model.switch(on, on=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-4


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -1.7)])
def test_a_combined_adapter_computes_the_weighted_sum_of_both(weights: tuple[float, float]) -> None:
    """Breaks when a combination is an approximation: concatenated factors are exact, site by site."""
    model = forests.language_model("llama")
    parts = []
    for seed, method in enumerate((LoRA(rank=3), LoRA(rank=2, alpha=4.0, targets=("q", "down")))):
        edits = method.attach(model.sites)
        forests.shake([parameter for edit in edits for parameter in edit.parameters()], seed=seed)
        parts.append(edits)
    whole, edits = combined(list(zip(parts, weights, strict=True)), model.sites)
    x = torch.randn(4, forests.HIDDEN, generator=torch.Generator().manual_seed(0))
    for edit in edits:
        assert isinstance(edit, LowRank)
        same = [each for own in parts for each in own if isinstance(each, LowRank) and each.site_name == edit.site_name]
        given = x if edit.down.shape[1] == forests.HIDDEN else torch.randn(4, edit.down.shape[1])
        zero = torch.zeros(4, edit.up.shape[0])
        own = {id(each): weight for edits_of, weight in zip(parts, weights, strict=True) for each in edits_of}
        expected = sum((own[id(each)] * each.after(given, zero) for each in same), zero)
        torch.testing.assert_close(edit.after(given, zero), expected, rtol=1e-5, atol=1e-6)
    assert whole.rank == 5


def test_ten_thousand_swaps_leave_the_base_as_it_was() -> None:
    """Breaks when switching an adapter copies or touches a weight of the base, or drifts from what was attached."""
    model = forests.language_model("llama")
    put(model, LoRA(rank=3), "one", seed=1)
    put(model, IA3(), "two", seed=2)
    model.switch("two", on=False)
    before, alone = forests.snapshot(model.module), forests.logits(model, IDS)
    digest = state_digest(model.module)
    for _ in range(5000):
        model.switch("one", on=False)
        model.switch("two", on=True)
        model.switch("two", on=False)
        model.switch("one", on=True)
    assert forests.snapshot(model.module) == before
    assert state_digest(model.module) == digest
    assert torch.equal(forests.logits(model, IDS), alone)
