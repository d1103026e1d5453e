"""Rows of single tokens: the same as training the whole matrices and looking at those rows, without their memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.adapters.trainable_tokens import TrainableTokens
from luthier.core.errors import RecipeError
from luthier.data.forest import Forest
from luthier.kernels.head import Head
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.token_rows import EVERYWHERE, row_sites, token_rows
from luthier.model.language_model import LanguageModel
from luthier.model.running.head import EditedHead
from tests import forests
from tests.forests import ARCHITECTURES
from tests.tiny import HIDDEN, VOCABULARY

TOKENS = (44, 5, 90)
IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


def rows_of(
    model: LanguageModel, tokens: Sequence[int] = TOKENS, *, name: str = "default", seed: int = 0
) -> Attachment:
    """Rows trained in the embedding and the head, moved away from their start."""
    edits = token_rows(model.sites, tokens, EVERYWHERE, file_key="rows", repeat_tied=False)
    attachment = model.attach(edits, name=name)
    forests.shake(attachment.named_parameters().values(), seed=seed)
    return attachment


@each
def test_rows_are_the_rows_of_a_model_whose_matrices_were_changed(architecture: str) -> None:
    """Breaks when another token changes too, the scale of an embedding is forgotten, or a tied head is left behind."""
    model = forests.language_model(architecture)
    (rows,) = rows_of(model).named_parameters().values()
    found = forests.logits(model, IDS)
    changed = forests.language_model(architecture)
    embed, head = changed.sites.role("embed")[0], changed.sites.role("head")[0]
    index = torch.tensor(TOKENS)
    with torch.no_grad():
        embed.weight_parameter[index] = rows[: len(TOKENS)]
        head.weight_parameter[index] = rows[-len(TOKENS) :]
    assert changed.sites.tied == (rows.shape[0] == len(TOKENS)) == (architecture not in ("llama", "mistral"))
    assert forests.relative_error(found, forests.logits(changed, IDS)) <= 1e-5


@each
def test_the_gradient_is_that_of_the_whole_matrices_at_these_rows(architecture: str) -> None:
    """Breaks when the chunked head loses a term, a cap or a scale, or a shared row gets half of its gradient."""
    plain = forests.row_tree(IDS, np.ones(9, np.float32), row=0)
    trees = [forests.branching(seed=2), *forests.rows(4, seed=1, ones=True), plain]
    model = forests.language_model(architecture)
    rows = rows_of(model)
    found = forests.gradients(forests.engine_loss(model, trees), rows.named_parameters())
    (gradient,) = found.values()
    changed = forests.language_model(architecture)
    (value,) = rows.named_parameters().values()
    embed, head = changed.sites.role("embed")[0], changed.sites.role("head")[0]
    index = torch.tensor(TOKENS)
    with torch.no_grad():
        embed.weight_parameter[index] = value[: len(TOKENS)]
        head.weight_parameter[index] = value[-len(TOKENS) :]
    everything = forests.trainable(changed)
    whole = forests.gradients(forests.engine_loss(changed, trees), everything)
    names = {id(parameter): name for name, parameter in everything.items()}
    parts = {names[id(site.weight_parameter)]: None for site in (embed, head)}
    expected = torch.cat([whole[name][index] for name in parts])
    forests.assert_same_gradients({"rows": gradient}, {"rows": expected})


@each
def test_both_executors_and_parts_agree_with_the_zoo(architecture: str) -> None:
    """Breaks when one way of running a forest has the rows and another has not."""
    model = forests.language_model(architecture)
    rows_of(model)
    forest = Forest((forests.branching(seed=4), *forests.rows(2, seed=3)))
    expected = forests.brute_log_probs(model.module, forest)
    torch.testing.assert_close(model.token_outputs(forest).log_probs, expected, rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_head_go_through_the_chunked_head_and_no_logits_are_kept() -> None:
    """Breaks when training a row keeps the logits of every token, or makes a gradient of the whole matrix."""
    model = forests.language_model("qwen2")
    attachment = rows_of(model)
    assert isinstance(model.head, Head) and len(model.head.changes) == 1
    tree = forests.row_tree(forests.tokens(np.random.default_rng(0), 200), np.ones(200, np.float32), row=0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = forests.engine_loss(model, [tree])
    loss.backward()
    matrix = model.sites.role("embed")[0].weight_parameter
    assert 0 < max(kept) < 199 * VOCABULARY
    assert matrix.grad is None and not matrix.requires_grad
    (rows,) = attachment.named_parameters().values()
    assert rows.grad is not None and rows.grad.shape == (len(TOKENS), HIDDEN)


def test_a_full_logits_path_would_be_seen() -> None:
    """The negative control of the test above: a low-rank update of the head does keep all logits."""
    model = forests.language_model("llama")
    model.attach(LoRA(rank=2, targets=("head",)).attach(model.sites))
    assert isinstance(model.head, EditedHead)
    tree = forests.row_tree(forests.tokens(np.random.default_rng(0), 200), np.ones(200, np.float32), row=0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        forests.engine_loss(model, [tree])
    assert max(kept) >= 199 * VOCABULARY


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_two_sets_of_rows_add_up_also_beside_other_edits_of_the_head(architecture: str) -> None:
    """Breaks when a token that is in both is changed once, or a low-rank head hides the rows."""
    model = forests.language_model(architecture)
    one, two = rows_of(model, name="one", seed=1), rows_of(model, (5, 7), name="two", seed=2)
    forest = Forest(tuple(forests.rows(3, seed=5)))
    both = forests.brute_log_probs(model.module, forest)
    torch.testing.assert_close(model.token_outputs(forest).log_probs, both, rtol=1e-4, atol=1e-5)
    low_rank = model.attach(LoRA(rank=2, targets=("head",)).attach(model.sites), name="three")
    forests.shake(low_rank.named_parameters().values())
    assert isinstance(model.head, EditedHead)
    torch.testing.assert_close(
        model.token_outputs(forest).log_probs, forests.brute_log_probs(model.module, forest), rtol=1e-4, atol=1e-5
    )
    parameters = {**one.named_parameters(), **{f"two {k}": p for k, p in two.named_parameters().items()}}
    found = forests.gradients(forests.engine_loss(model, forest.trees), parameters)
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())
    model.detach("three")
    model.detach("one")
    model.detach("two")


def test_a_whole_matrix_and_single_rows_are_trained_together() -> None:
    """Breaks when the rows lose their gradient where the head is trained as a whole too."""
    from luthier.adapters.full import Full

    model = forests.language_model("qwen2")
    full = model.attach(Full().attach(model.sites), name="full")
    rows = rows_of(model, name="rows")
    parameters = {**full.named_parameters(), "rows": next(iter(rows.named_parameters().values()))}
    found = forests.gradients(forests.engine_loss(model, forests.rows(3)), parameters)
    embed = next(name for name, parameter in parameters.items() if parameter.shape == (VOCABULARY, HIDDEN))
    forests.assert_same_gradients({"rows": found["rows"]}, {"rows": found[embed][torch.tensor(TOKENS)]})


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "llama"])
def test_merging_keeps_tied_matrices_tied(architecture: str) -> None:
    """Breaks when a merge leaves head and embedding as two matrices that a tied model saves as one."""
    model = forests.language_model(architecture)
    tied = model.sites.tied
    rows_of(model)
    model.merge()
    embed, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    assert (embed.weight is head.weight) == tied == (architecture != "llama")


def test_rows_in_bfloat16_start_at_the_base_and_stay_in_float32() -> None:
    """Breaks when small updates are rounded away, or a start that is not exactly the base moves the model."""
    model = forests.language_model("gemma2", dtype=torch.bfloat16)
    before = forests.logits(model, IDS)
    edits = token_rows(model.sites, TOKENS, EVERYWHERE, file_key="rows", repeat_tied=False)
    attachment = model.attach(edits)
    assert torch.equal(forests.logits(model, IDS), before)
    assert {parameter.dtype for parameter in attachment.named_parameters().values()} == {torch.float32}
    forests.engine_loss(model, forests.rows(2)).backward()
    forests.shake(attachment.named_parameters().values())
    assert not torch.equal(forests.logits(model, IDS), before)


@pytest.mark.parametrize(
    ("ids", "words"),
    [((5, VOCABULARY), "has no row: the model has 128"), ((-1,), "has no row"), ((5, 7, 5), "named twice"),
     (("<|end|>",), "named by its text")],
)  # fmt: skip
def test_tokens_without_a_row_of_their_own_are_refused(ids: tuple[int | str, ...], words: str) -> None:
    """Breaks when an id counts from the end, or an embedding would be made larger for it."""
    sites = forests.language_model("llama").sites
    with pytest.raises(RecipeError, match=words):
        token_rows(sites, ids, EVERYWHERE, file_key="rows", repeat_tied=False)


def test_places_are_roles_or_names_and_a_tied_head_is_never_alone() -> None:
    """Breaks when a table of positions is taken for the embedding, or a shared matrix would be torn apart."""
    untied, tied = forests.language_model("llama").sites, forests.language_model("gpt2").sites
    assert [site.name for site in row_sites(untied, ("head", "embed"))] == ["model.embed_tokens", "lm_head"]
    assert [site.name for site in row_sites(untied, ("lm_head",))] == ["lm_head"]
    assert [site.name for site in row_sites(tied, ("wte",))] == ["transformer.wte", "lm_head"]
    with pytest.raises(RecipeError, match="shares its weight"):
        row_sites(tied, ("head",))
    with pytest.raises(RecipeError, match="no rows of tokens at 'wpe'"):
        row_sites(tied, ("wpe",))


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    """Breaks when rows would be added beside a table whose output is no multiple of them."""
    model = forests.language_model("llama")
    (embed,) = model.sites.role("embed")
    plain = embed.module.forward
    embed.module.forward = lambda ids: plain(ids).square()  # type: ignore[method-assign]
    with pytest.raises(RecipeError, match="does more than look rows up"):
        token_rows(model.sites, TOKENS, EVERYWHERE, file_key="rows", repeat_tied=False)


def test_one_adapter_changes_a_head_in_one_way_only() -> None:
    """Breaks when rows and a low-rank update of one head take each other's place without a word."""
    model = forests.language_model("llama")
    with pytest.raises(RecipeError, match="lm_head in two ways"):
        model.attach(LoRA(targets=("q", "head"), trainable_tokens=(5,)).attach(model.sites))
    apart = LoRA(targets=("q", "head"), trainable_tokens=(5,), trainable_token_targets=("embed",))
    model.attach(apart.attach(model.sites))
    model.detach()
    assert model.attach(TrainableTokens(tokens=(5,)).attach(model.sites)).parameter_count == 2 * HIDDEN
