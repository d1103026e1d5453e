"""The ten promises of an adapter, for every method of the catalog on every architecture, with its default knobs.

`VARIANTS` are knobs that make another method of one: they promise the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.adapters import Adapter, adapter_of
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import EditedModule
from luthier.model.files.adapter_config import read_config
from luthier.model.files.adapter_files import check_base, fill
from luthier.model.language_model import LanguageModel
from luthier.train.result import save_result
from tests import forests
from tests.contracts.crossed import case, crossed
from tests.contracts.resumption import FEW_BREAKS, Setup, assert_resumes
from tests.forests import ARCHITECTURES

METHODS = catalog.names("adapters")
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "lora, gaussian": {"method": "lora", "init": "gaussian"},
    "lora, orthogonal": {"method": "lora", "init": "orthogonal"},
    "lora, pissa": {"method": "lora", "init": "pissa"},
    "lora, pissa, rslora": {"method": "lora", "init": "pissa", "rank": 6, "rslora": True},
    "lora, olora": {"method": "lora", "init": "olora"},
    "lora, embedding": {"method": "lora", "rank": 4, "targets": ["embed", "q"], "plus_ratio": 2.0},
    "lora, plus": {"method": "lora", "init": "pissa", "rank": 4, "plus_ratio": 4.0},
    "sparse, gradient": {"method": "sparse", "choice": "gradient", "rows": 3},
    "sparse, random": {"method": "sparse", "choice": "random"},
}
NAMES = [*METHODS, *VARIANTS]
FOLDS = ("lora, pissa", "lora, olora", "lora, plus")
"""How the variants begin that a file holds in another form than training does."""
ROUNDED = ("lora, orthogonal",)
"""Those whose start is the base up to rounding: two factors that see nothing of each other, in numbers of 24 bits."""
IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)
RESUMED = [("llama", torch.float32), ("gpt2", torch.bfloat16)]
"""Where every adapter is resumed in each test run, its variants on one of the two in turn; the rest, and more moments
of a break, are among the slow tests."""
ALWAYS = ("llama", "gpt2")
"""The plainest, and the one whose projections are one weight that lies the other way round."""
each = pytest.mark.parametrize(("name", "architecture"), crossed(NAMES, ARCHITECTURES, always=ALWAYS))


def method(name: str) -> Adapter:
    """The adapter with its defaults, or those of a variant."""
    return choose("adapters", Adapter, dict(VARIANTS[name]) if name in VARIANTS else name)


def promises(name: str) -> set[str]:
    """What a method or a variant says of itself."""
    return {*method(name).provides, *(["folds-when-saved"] if name.startswith(FOLDS) else [])}


def attached(name: str, architecture: str, *, moved: bool = True) -> tuple[LanguageModel, Attachment]:
    """A model with the adapter on it, moved away from its start."""
    model = forests.language_model(architecture)
    torch.manual_seed(7)
    attachment = model.attach(method(name).attach(model.sites))
    if moved:
        forests.shake(attachment.named_parameters().values())
    return model, attachment


@each
def test_a_fresh_adapter_is_the_identity(name: str, architecture: str) -> None:
    """Breaks when an edit starts anywhere but at the base model. A learned root is seen from the start."""
    model, _ = attached(name, architecture, moved=False)
    with model.without_attachments():
        before = forests.logits(model, IDS)
    after = forests.logits(model, IDS)
    if name in ROUNDED:
        assert forests.relative_error(after, before) <= 1e-5
        return
    assert torch.equal(after, before) != ("learned-root" in promises(name))


@each
def test_gradients_reach_exactly_the_declared_parameters(name: str, architecture: str) -> None:
    """Breaks when a frozen parameter collects a gradient or a declared one has no part in the loss."""
    model, attachment = attached(name, architecture)
    declared = attachment.named_parameters()
    forests.engine_loss(model, [forests.branching(seed=1), *forests.rows(3)]).backward()
    for key, parameter in declared.items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, key
    others = {id(p): n for n, p in model.module.named_parameters()}
    for parameter in declared.values():
        others.pop(id(parameter), None)
    by_id = {id(p): p for p in model.module.parameters()}
    assert [n for i, n in others.items() if by_id[i].requires_grad or by_id[i].grad is not None] == []


@each
def test_the_declared_count_is_the_count_that_was_made(name: str, architecture: str) -> None:
    """Breaks when the closed form forgets a matrix, counts a tied one twice, or is asked after attaching."""
    model, attachment = attached(name, architecture)
    made = sum(parameter.numel() for parameter in attachment.named_parameters().values())
    assert method(name).parameter_count(model.sites) == made == attachment.parameter_count


@each
def test_names_are_unique_and_hold_every_parameter(name: str, architecture: str) -> None:
    """Breaks when two edits write the same name, or a parameter would not be saved."""
    _, attachment = attached(name, architecture)
    saved = {tensor.untyped_storage().data_ptr() for tensor in attachment.named_tensors().values()}
    trained = {tensor.untyped_storage().data_ptr() for tensor in attachment.named_parameters().values()}
    # What folds is saved as what its parameters make, and loaded as just that.
    exactly = not {"folds-when-saved", "saves-places"} & promises(name)
    assert (trained == saved) == exactly and (exactly or "folds-when-saved" in promises(name) or trained < saved)
    count = sum(len(edit.tensors()) for edit in attachment.edits)
    assert len(attachment.named_tensors()) == count


@each
def test_undo_gives_back_the_same_objects_and_the_same_bytes(name: str, architecture: str) -> None:
    """Breaks when a module stays wrapped, a parameter is a copy, or training touched the base."""
    model = forests.language_model(architecture)
    before = forests.snapshot(model.module)
    torch.manual_seed(7)
    attachment = model.attach(method(name).attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    forests.engine_loss(model, forests.rows(2)).backward()
    assert forests.snapshot(model.module) != before or attachment.root is not None
    model.detach()
    assert forests.snapshot(model.module) == before
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@each
def test_switched_off_is_the_base_bit_for_bit(name: str, architecture: str) -> None:
    """Breaks when the reference policy is not the base, or does not end with its block."""
    model, attachment = attached(name, architecture)
    base = forests.logits(forests.language_model(architecture), IDS)
    adapted = forests.logits(model, IDS)
    assert not torch.equal(adapted, base)
    with model.without_attachments():
        assert torch.equal(forests.logits(model, IDS), base)
    assert torch.equal(forests.logits(model, IDS), adapted) and attachment.enabled
    model.switch("default", on=False)
    assert torch.equal(forests.logits(model, IDS), base)
    forest = Forest(tuple(forests.rows(2)))
    plain = forests.brute_log_probs(forests.zoo(architecture, ours=False), forest)
    torch.testing.assert_close(model.token_outputs(forest).log_probs, plain, rtol=1e-4, atol=1e-5)
    model.detach()
    assert torch.equal(forests.logits(model, IDS), base)


@each
def test_merged_equals_unmerged(name: str, architecture: str) -> None:
    """Breaks when a factor, a bias or a transposed weight is folded wrongly; what cannot be folded must refuse."""
    model, _ = attached(name, architecture)
    adapted = forests.logits(model, IDS)
    if not {"mergeable", "trains-base"} & method(name).provides:
        with pytest.raises(RecipeError, match="cannot be merged"):
            model.merge()
        assert torch.equal(forests.logits(model, IDS), adapted)
        return
    model.merge()
    assert model.attachments == {} and not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not any(isinstance(module, EditedModule) for module in model.module.modules())
    assert forests.relative_error(forests.logits(model, IDS), adapted) <= 1e-5


@pytest.mark.parametrize(
    ("name", "architecture", "dtype"),
    [
        case(name, *where, quick=where in (("llama", torch.float32), ("gpt2", torch.bfloat16)))
        for name, where in product(NAMES, product(ARCHITECTURES, (torch.float32, torch.bfloat16)))
        if {"mergeable", "trains-base"} & method(name).provides
    ],
)
def test_a_merge_is_undone_bit_for_bit(name: str, architecture: str, dtype: torch.dtype) -> None:
    """Breaks when weights come back by subtraction, the adapter comes back in another state, or a digest stays."""
    model = forests.language_model(architecture, dtype=dtype)
    before, digest = forests.snapshot(model.module), model.digest
    torch.manual_seed(7)
    attachment = model.attach(method(name).attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    adapted, trained = forests.logits(model, IDS), list(attachment.named_parameters())
    model.switch("default", on=False)
    merged = model.merge()
    assert model.digest != digest
    assert forests.relative_error(forests.logits(model, IDS), adapted) <= (1e-5 if dtype == torch.float32 else 0.2)
    rounds = dtype == torch.bfloat16 and "trains-base" not in method(name).provides
    assert (merged.error > 0) == rounds == any(notice.startswith("merge: ") for notice in model.notices)
    assert model.unmerge() is attachment and not attachment.enabled and model.digest == digest
    model.switch("default", on=True)
    assert torch.equal(forests.logits(model, IDS), adapted) and list(attachment.named_parameters()) == trained
    model.detach()
    assert forests.snapshot(model.module) == before


@each
def test_saved_and_loaded_is_the_same_bit_for_bit(name: str, architecture: str, tmp_path: Path) -> None:
    """Breaks when a tensor is renamed, rounded, or lost on its way through the file."""
    model, attachment = attached(name, architecture)
    adapted = forests.logits(model, IDS)
    folder = save_result(tmp_path, model, attachment, method(name), {})
    if attachment.trains_base:
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="luthier_forest")
        fresh = LanguageModel(again, source="again", digest="")
        assert torch.equal(forests.logits(fresh, IDS), adapted)
        return
    fresh = forests.language_model(architecture)
    check_base(folder, fresh)
    loaded = fresh.attach(adapter_of(read_config(folder)).attach(fresh.sites))
    assert loaded.digest() != attachment.digest()
    fill(loaded, folder)
    assert loaded.digest() == attachment.digest()
    assert torch.equal(forests.logits(fresh, IDS), adapted)


@pytest.mark.parametrize("name", [name for name in NAMES if method(name).peft_type is not None])
def test_equal_adapters_are_equal_files(name: str, tmp_path: Path) -> None:
    """Breaks when an order, a date or an address finds its way into a file."""
    made = []
    for index in range(2):
        model, attachment = attached(name, "llama")
        folder = save_result(tmp_path / str(index), model, attachment, method(name), {"run": "a"})
        made.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert made[0] == made[1] and len(made[0]) == 4


@pytest.mark.parametrize(
    ("name", "architecture", "dtype"),
    [(name, *where) for name in METHODS for where in RESUMED]
    + [(name, *RESUMED[turn % len(RESUMED)]) for turn, name in enumerate(VARIANTS)],
)
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(
    name: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Breaks when an edit keeps something that training changes beside its parameters, or draws where none is saved."""
    assert_resumes(Setup(adapter=method(name), architecture=architecture, dtype=dtype), tmp_path, breaks=FEW_BREAKS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "architecture"), list(product(NAMES, ARCHITECTURES)))
def test_it_goes_on_bit_for_bit_on_every_architecture(
    name: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Breaks where the test above does, on an architecture it leaves out."""
    assert_resumes(Setup(adapter=method(name), architecture=architecture, dtype=dtype), tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "architecture", "first_off_first"),
    [
        # Every pair once in each test run, models and orders in turn.
        case(METHODS[one], METHODS[two], name, off, quick=(one + two) % 3 == place and (one // 3 + two) % 2 == off)
        for one, two in product(range(len(METHODS)), repeat=2)
        for place, name in enumerate(("llama", "qwen2", "gpt2"))
        for off in (True, False)
    ],
)
def test_two_attachments_come_off_in_either_order(
    first: str, second: str, architecture: str, first_off_first: bool
) -> None:
    """Breaks when one attachment takes the other's parts for the base, or leaves them wrapped in nothing."""
    model = forests.language_model(architecture)
    before, base = forests.snapshot(model.module), forests.logits(model, IDS)
    one = model.attach(method(first).attach(model.sites), name="one")
    forests.shake(one.named_parameters().values(), seed=1)
    with_one = None if one.root is not None else forests.logits(model, IDS)
    edits = method(second).attach(model.sites)
    if one.trains_base and "trains-base" in method(second).provides:
        with pytest.raises(RecipeError, match="one at a time"):
            model.attach(edits, name="two")
        model.detach("one")
        assert forests.snapshot(model.module) == before
        return
    two = model.attach(edits, name="two")
    forests.shake(two.named_parameters().values(), seed=2)
    assert method(second).parameter_count(model.sites) == two.parameter_count
    if one.root is not None and two.root is not None:
        with pytest.raises(RecipeError, match="one at a time"):
            forests.logits(model, IDS)
    else:
        loss = forests.engine_loss(model, forests.rows(2))
        parameters = {**one.named_parameters(), **{f"two.{k}": v for k, v in two.named_parameters().items()}}
        assert all(float(each.abs().max()) > 0 for each in forests.gradients(loss, parameters).values())
    left = "two" if first_off_first else "one"
    model.detach("one" if first_off_first else "two")
    if left == "one" and with_one is not None:
        assert torch.equal(forests.logits(model, IDS), with_one)
    model.switch(left, on=False)
    assert torch.equal(forests.logits(model, IDS), base)
    model.detach(left)
    assert forests.snapshot(model.module) == before
