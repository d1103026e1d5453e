"""Sites: every architecture as places with roles, and what targets select."""

from __future__ import annotations

import pytest
import torch
import transformers

from luthier.core.errors import RecipeError
from luthier.model.editing.sites import find_sites
from tests import forests
from tests.forests import ARCHITECTURES
from tests.tiny import HIDDEN, LAYERS, VOCABULARY

SEPARATE = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 1)
FUSED = {"q": 1, "k": 1, "v": 1, "o": 1, "gate": 0, "up": 1, "down": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_has_its_roles_and_the_head_is_no_linear_target(architecture: str) -> None:
    """Breaks when a name is not known as a role, or the fused projection loses one of its three."""
    module = forests.zoo(architecture)
    sites = find_sites(module)
    expected = FUSED if architecture == "gpt2" else SEPARATE
    for layer in range(LAYERS):
        found = {role: sum(1 for site in sites.role(role) if site.layer == layer) for role in expected}
        assert found == expected
    assert (sites.layers, sites.hidden, sites.heads) == (LAYERS, HIDDEN, 4)
    assert sites.head_size * sites.heads >= HIDDEN
    assert len(sites.role("block")) == LAYERS
    assert [site.module for site in sites.role("head")] == [module.get_output_embeddings()]
    assert module.get_input_embeddings() in [site.module for site in sites.role("embed")]
    assert len(sites.role("norm")) >= 2 * LAYERS + 1
    assert all(dict(module.named_modules())[site.name] is site.module for site in sites)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_and_weights_are_out_by_in(architecture: str) -> None:
    """Breaks when a Conv1D hands out its weight as it keeps it."""
    for site in find_sites(forests.zoo(architecture)).select("all-linear"):
        assert site.weight().shape == (site.out_features, site.in_features)
        x = torch.randn(2, site.in_features)
        bias = site.module._parameters.get("bias")
        torch.testing.assert_close(site.module(x), torch.nn.functional.linear(x, site.weight(), bias))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_is_every_projection_but_the_head(architecture: str) -> None:
    """Breaks when the head or an embedding is taken for a projection, or one is left out."""
    module = forests.zoo(architecture)
    names = {site.name for site in find_sites(module).select("all-linear")}
    expected = {
        name
        for name, part in module.named_modules()
        if type(part).__name__ in ("Linear", "Conv1D") and part is not module.get_output_embeddings()
    }
    assert names == expected and len(names) == LAYERS * (4 if architecture == "gpt2" else 7)


@pytest.mark.parametrize(
    ("targets", "endings"),
    [
        (("q", "v"), {"q_proj", "v_proj"}),
        ("o", {"o_proj"}),
        (("q_proj", "down"), {"q_proj", "down_proj"}),
        (("mlp.up_proj",), {"up_proj"}),
        (r".*\.layers\.\d+\.self_attn\.[qk]_proj", {"q_proj", "k_proj"}),
        (("head",), {"lm_head"}),
    ],
)
def test_targets_are_roles_endings_or_a_pattern(targets: str | tuple[str, ...], endings: set[str]) -> None:
    """Breaks when an ending matches in the middle of a word or a pattern only in part."""
    sites = find_sites(forests.zoo("llama")).select(targets)
    assert {site.name.rpartition(".")[2] for site in sites} == endings
    assert len(sites) == (1 if endings == {"lm_head"} else LAYERS * len(endings))


def test_one_layer_can_be_named() -> None:
    """Breaks when `layers.1.` also selects `layers.11.` or every layer."""
    sites = find_sites(forests.zoo("llama")).select(("layers.1.mlp.down_proj",))
    assert [site.name for site in sites] == ["model.layers.1.mlp.down_proj"]


def test_selected_sites_keep_the_order_of_the_model() -> None:
    """Breaks when the order of targets decides about the order of random initialisation."""
    sites = find_sites(forests.zoo("llama"))
    assert sites.select(("v", "q")) == sites.select(("q", "v"))
    assert [site.name for site in sites.select(("v", "q"))] == sorted(
        (site.name for site in sites.select(("v", "q"))), key=[site.name for site in sites].index
    )


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (("q_prj",), "q_proj"),
        (("proj",), "q_proj"),
        (("q", "gat_proj"), "gate_proj"),
        (r".*\.nothing_here", "roles here"),
        ("(", "names here"),
    ],
)
def test_a_target_without_a_match_is_an_error_with_the_nearest(targets: str | tuple[str, ...], advice: str) -> None:
    """Breaks when a target that matches nothing is passed over because another one matches."""
    with pytest.raises(RecipeError, match="no site matches") as caught:
        find_sites(forests.zoo("llama")).select(targets)
    assert advice in str(caught.value)


def test_embeddings_have_sizes_but_are_no_linear_sites() -> None:
    """Breaks when a low-rank update would be put around a table."""
    (embed,) = find_sites(forests.zoo("llama")).role("embed")
    assert (embed.in_features, embed.out_features, embed.is_linear) == (VOCABULARY, HIDDEN, False)


def test_a_recurrent_model_has_sites_and_no_heads() -> None:
    """Breaks when sites need a config to speak of attention heads."""
    sites = find_sites(forests.mamba())
    assert (sites.heads, sites.key_value_heads, sites.head_size, sites.layers) == (0, 0, 0, LAYERS)
    assert sites.select("all-linear")


@pytest.mark.parametrize(("readers", "sayers"), [(2, 2), (3, 3), (2, 4)])
def test_a_list_of_parts_within_a_block_is_no_list_of_blocks(readers: int, sayers: int) -> None:
    """Breaks when the two parts of a block of T5 count as layers, or a decoder of another depth has no blocks."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=48, num_heads=4, num_layers=readers,
        num_decoder_layers=sayers,
    )  # fmt: skip
    sites = find_sites(transformers.T5ForConditionalGeneration(config))
    blocks = [f"encoder.block.{layer}" for layer in range(readers)]
    blocks += [f"decoder.block.{layer}" for layer in range(sayers)]
    assert [site.name for site in sites.role("block")] == blocks
    assert (sites.layers, sites.root_layers) == (readers + sayers, sayers)
