"""GaLore: the authors' package as oracle, and the arithmetic of its card."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from luthier.optimizers.galore import GaLore, strongest
from tests.contracts.resumption import Setup, assert_resumes

SHAPES = {"attn.tall": (24, 10), "mlp.wide": (10, 24), "attn.square": (12, 12), "attn.bias": (12,), "embed": (30, 8)}
KNOBS = {"learning_rate": 0.01, "rank": 4, "update_every": 7}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


def train(optimizer: torch.optim.Optimizer, weights: dict[str, torch.Tensor], steps: int) -> None:
    """Gradients of a cubic at the start, with noise of their own.

    They do not follow the weights: where singular values lie close together, the last bit of a gradient decides which
    way their vectors turn, and two right answers drift apart.
    """
    generator = torch.Generator().manual_seed(1)
    start = [tensor.detach() ** 3 for tensor in weights.values()]
    for _ in range(steps):
        for tensor, pull in zip(weights.values(), start, strict=True):
            tensor.grad = pull + 0.1 * torch.randn(tensor.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_fifty_steps_are_those_of_the_authors(side: Literal["std", "reverse_std", "left", "right"]) -> None:
    """Breaks when the wrong side is projected, the subspace is renewed at another step, or moments turn with it."""
    theirs = pytest.importorskip("galore_torch", reason="galore-torch is the oracle")
    ours, expected = tensors(), {name: torch.nn.Parameter(tensor) for name, tensor in tensors().items()}
    projected = [p for name, p in expected.items() if p.ndim == 2 and name != "embed"]
    others = [p for name, p in expected.items() if p.ndim == 1 or name == "embed"]
    settings = {"rank": 4, "update_proj_gap": 7, "scale": 0.25, "proj_type": side}
    groups = [{"params": projected, **settings}, {"params": others}]
    oracle = theirs.GaLoreAdamW(groups, lr=0.01, weight_decay=0.0, no_deprecation_warning=True)
    train(GaLore(**KNOBS, side=side).build(ours), ours, 50)
    with torch.no_grad():
        train(oracle, expected, 50)  # type: ignore[arg-type]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 32])
def test_the_state_is_as_large_as_the_card_says(bits: Literal[8, 32]) -> None:
    """Breaks when the basis is not counted, or the longer side is kept."""
    shapes = {"attn.q": (300, 200), "mlp.up": (200, 900), "norm": (200,), "head": (90, 60)}
    weights = {name: torch.randn(*shape) for name, shape in shapes.items()}
    method = GaLore(rank=64, bits=bits)
    optimizer = method.build(weights)
    train(optimizer, weights, 1)
    kept = [value for name in weights.values() for value in optimizer.state[name].values()]
    assert sum(value.nbytes for value in kept if isinstance(value, torch.Tensor)) == method.state_bytes(shapes)
    if bits == 32:
        bases, moments = 4 * 2 * 64 * 200, 8 * 64 * (300 + 900)
        assert method.state_bytes(shapes) == bases + moments + 8 * (200 + 5400)


def test_eight_bits_stay_near() -> None:
    """Breaks when codes of the projected moments are mixed up."""
    found = []
    for bits in (8, 32):
        weights = {"attn.q": torch.randn(300, 200, generator=torch.Generator().manual_seed(0))}
        start = weights["attn.q"].clone()
        train(GaLore(rank=64, bits=bits, learning_rate=0.05).build(weights), weights, 20)
        found.append(weights["attn.q"] - start)
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


def test_a_step_lies_in_the_subspace() -> None:
    """Breaks when the step of one matrix is projected by the basis of another."""
    weight = {"attn.q": torch.randn(30, 20)}
    before = weight["attn.q"].clone()
    train(GaLore(rank=3, weight_decay=0.0).build(weight), weight, 3)
    assert torch.linalg.matrix_rank(weight["attn.q"] - before, rtol=1e-4) == 3


def test_the_basis_is_orthonormal_and_the_strongest() -> None:
    """Breaks when rows and columns are mixed up."""
    gradient = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    for right, shape in ((True, (4, 12)), (False, (20, 4))):
        basis = strongest(gradient, 4, right=right)
        assert basis.shape == shape
        gram = basis @ basis.t() if right else basis.t() @ basis
        torch.testing.assert_close(gram, torch.eye(4), rtol=1e-5, atol=1e-5)
        seen = gradient @ basis.t() if right else basis.t() @ gradient
        values = torch.linalg.svdvals(gradient)
        torch.testing.assert_close(seen.norm() ** 2, values[:4].square().sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_projected_run_goes_on_bit_for_bit(bits: int, tmp_path: Path) -> None:
    """Breaks when the basis or the count of steps is not in the checkpoint."""
    knobs = {"method": "galore", "rank": 3, "update_every": 2, "bits": bits}
    assert_resumes(Setup(optimizer=knobs, adapter="full"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_steps_in_the_backward_pass_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Breaks when a step that was made in part is not saved as it was made, or a rate is remembered elsewhere."""
    knobs = {"method": "galore", "rank": 3, "update_every": 2, "per_layer": True}
    assert_resumes(Setup(optimizer=knobs, adapter="full", dtype=dtype, at_once=True), tmp_path)


def test_the_work_of_an_update_is_what_the_plan_is_told() -> None:
    """Breaks when a decomposition takes more than is planned beside activations."""
    method = GaLore(rank=8, targets=("attn",), per_layer=True)
    for shape in ((96, 512), (512, 96), (256, 256)):
        least, most = sorted(shape)
        assert method.update_bytes({"attn.q": shape}) == 4 * (2 * least * most + 5 * least * least)
    assert method.update_bytes({"mlp.up": (96, 512)}) == 8 * 96 * 512
    assert method.steps_in_backward and not GaLore().steps_in_backward


def test_names_are_met_whatever_their_capitals() -> None:
    """Breaks when T5's SelfAttention gets plain Adam without a word, as no part of its name is written so."""
    shapes = {"encoder.block.0.layer/0/SelfAttention/q/weight": (64, 64), "encoder.block.0.layer/0/norm": (64, 64)}
    method = GaLore(rank=4)
    projected = [method.state_bytes({name: shape}) < 8 * 64 * 64 for name, shape in shapes.items()]
    assert projected == [True, False]
