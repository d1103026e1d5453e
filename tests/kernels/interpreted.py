"""What test_triton.py runs in a process of its own, in which Triton's interpreter stands in for a GPU.

First the tests that every backend passes, then what a kernel can do wrong that others cannot: read beside a tensor,
leave a place of its result unwritten, or write beside it. Grids are tiny, because a program takes milliseconds here.
The interpreter truncates to bfloat16 instead of rounding: where roundings belong is told by float16, which it rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from luthier.kernels import triton_backend
from luthier.kernels.backend import Backend
from luthier.kernels.torch_backend import TorchBackend
from luthier.kernels.triton_backend import Tile, TritonBackend
from luthier.model.language_model import LanguageModel
from tests import forests
from tests.kernels.flash_stand_in import stand_in

# The tests themselves are taken over: they get the fixture `backend` of this file.
from tests.kernels.test_backends import (  # noqa: F401
    close,
    draw,
    test_gates,
    test_label_slopes,
    test_norms,
    test_products_of_codes,
    test_rotations,
    test_what_is_not_finite_stays_so,
)

TWIN = TorchBackend()
NAN = float("nan")
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def backend() -> Backend:
    return TritonBackend.build(torch.device("cpu"), torch.float32)


@pytest.fixture
def islands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """Puts a tensor into a sea of NaN, and every result that the backend allocates; at the end the sea is looked at."""
    seas: list[tuple[Tensor, Tensor]] = []

    def island(tensor: Tensor) -> Tensor:
        rows, width = tensor.shape[0], tensor[0].numel()
        sea = torch.full((rows + 2, width + 24), NAN, dtype=tensor.dtype)
        land = torch.zeros_like(sea, dtype=torch.bool)
        land[1:-1, 8:-16] = True
        seas.append((sea, land))
        place = sea[1:-1, 8:-16]
        place.copy_(tensor.reshape(rows, width))
        return place.unflatten(1, tensor.shape[1:]) if tensor.ndim > 1 else place[:, 0]

    def result(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        sea = torch.full((count + 64,), NAN, dtype=like.dtype if dtype is None else dtype)
        land = torch.zeros_like(sea, dtype=torch.bool)
        land[32:-32] = True
        seas.append((sea, land))
        return sea[32:-32].view(shape)

    monkeypatch.setattr(triton_backend, "_new", result)
    yield island
    for sea, land in seas:
        assert sea[~land].isnan().all(), "written beside a tensor"


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As the twin, in its own precision: nearly all to the bit, where the interpreter rounds."""
    assert found.isfinite().all()
    close(found, expected, dtype, slack=1.0 if dtype == torch.bfloat16 else 0.1)
    if dtype == torch.float16:
        assert (found == expected).float().mean() > 0.97


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("n", "d"), [(3, 40), (5, 300)])
def test_norms_keep_to_their_tensors(
    backend: Backend, islands: Callable[[Tensor], Tensor], dtype: torch.dtype, n: int, d: int
) -> None:
    """Breaks when a mask is forgotten, a stride is taken for a width, or a rounding is at another place."""
    x, grad, added = (draw(n, d, dtype=dtype, seed=s) for s in range(3))
    weight = draw(d, dtype=dtype, seed=3)
    h, inverse = backend.norm(islands(x), islands(weight[None])[0], 1e-5)
    expected, expected_inverse = TWIN.norm(x, weight, 1e-5)
    near(h, expected, dtype)
    near(inverse, expected_inverse, torch.float32)
    assert torch.equal(backend.normed(islands(x), weight, inverse), h)
    for more in (None, added):
        given = None if more is None else islands(more)
        found = backend.norm_backward(islands(grad), islands(x), weight, inverse, given)
        exact = TWIN.norm_backward(*(each.double() for each in (grad, x, weight, inverse)), more)
        near(found, exact.to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("n", "f"), [(3, 40), (2, 1500)])
def test_gates_keep_to_their_tensors(
    backend: Backend, islands: Callable[[Tensor], Tensor], dtype: torch.dtype, n: int, f: int
) -> None:
    """Breaks when the last part of a row is written over the next, or the slope is put where it is still to be read."""
    gate, up, grad = (draw(n, f, dtype=dtype, seed=s, spread=3.0) for s in range(3))
    near(backend.gated(islands(gate), islands(up)), TWIN.gated(gate, up), dtype)
    found = backend.gated_backward(islands(grad), islands(gate), islands(up))
    exact = TWIN.gated_backward(*(each.double() for each in (grad, gate, up)))
    for one, other in zip(found, exact, strict=True):
        near(one, other.to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rotations_keep_to_their_tensors(
    backend: Backend, islands: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Breaks when heads that lie in a wider product are taken for a tensor of their own."""
    x, angles = draw(7, 5, 12, dtype=dtype), draw(7, 6, dtype=torch.float32, seed=1)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = backend.rotated(islands(x), islands(cosines), islands(sines))
    near(turned, TWIN.rotated(x, cosines, sines), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("slopes", [False, True])
def test_labels_keep_to_their_tensors(
    backend: Backend, islands: Callable[[Tensor], Tensor], dtype: torch.dtype, slopes: bool
) -> None:
    """Breaks when the second part of a row counts what lies behind it, or logits change that were only to be read."""
    logits = draw(3, 8200, dtype=dtype, spread=4.0)
    logits[1, :8192] = -float("inf")
    labels = torch.tensor([0, 8199, 8191])
    given = islands(logits)
    log_probs, found = backend.label_slopes(given, labels, slopes=slopes)
    exact, exact_slopes = TWIN.label_slopes(logits.double(), labels, slopes=True)
    torch.testing.assert_close(log_probs, exact.float(), rtol=1e-5, atol=1e-5)
    if slopes:
        assert found is not None and exact_slopes is not None
        close(found, exact_slopes.to(dtype), dtype)
    else:
        assert found is None and torch.equal(given, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("numbers", "block"), [(5000, 64), (2049, 7)])
def test_unpacked_numbers_keep_to_their_tensor(
    backend: Backend, islands: Callable[[Tensor], Tensor], dtype: torch.dtype, numbers: int, block: int
) -> None:
    """Breaks when the last program writes behind the matrix, or reads the scale of a block that is not there."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (-(-numbers // 2),), generator=generator, dtype=torch.uint8)
    levels, scales = draw(16, dtype=torch.float32), draw(1, -(-numbers // block), dtype=torch.float32, seed=1).abs()
    found = backend.unpacked(codes, islands(scales)[0], levels, block, numbers, dtype)
    assert torch.equal(found, TWIN.unpacked(codes, scales[0], levels, block, numbers, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(3, 40), (2, 1500)])
def test_unpacked_rows_keep_to_their_tensor(
    backend: Backend, islands: Callable[[Tensor], Tensor], dtype: torch.dtype, n: int, d: int
) -> None:
    """Breaks when the last part of a row is written over the next, or has its scale."""
    codes = torch.randint(-127, 128, (n, d), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = draw(1, n, dtype=torch.float32, seed=1)
    found = backend.unpacked_rows(codes, islands(scales)[0], dtype)
    assert torch.equal(found, TWIN.unpacked_rows(codes, scales[0], dtype))


def test_no_rows_are_no_launch(backend: Backend) -> None:
    """Breaks when a batch without predictions is an invalid grid."""
    none = torch.empty(0, 16)
    h, inverse = backend.norm(none, torch.ones(16), 1e-5)
    assert h.shape == (0, 16) and inverse.shape == (0, 1) and backend.gated(none, none).shape == (0, 16)


@pytest.mark.parametrize("width", [1, 2, 64, 65, 896, 4096, 151_936])
def test_tiles(width: int) -> None:
    """Breaks when a tile leaves a row unfinished, or gives a thread more numbers than it has registers."""
    tile = Tile.of_rows(width)
    assert tile.width >= width and tile.width < 2 * width
    assert tile.rows * tile.width >= 2048 and 4 <= tile.warps <= 32
    part = Tile.of_rows(width, longest=1024)
    assert part.width <= 1024 and part.rows * part.width == 2048 and part.warps == 4


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_runs_by_these_kernels(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the operations do not fit together: the loss of a forest and every gradient, beside plain torch."""
    stand_in(monkeypatch)
    trees = [forests.branching(), *forests.rows(2)]
    found = []
    for kernels in ("triton", "torch"):
        model = LanguageModel(forests.zoo(architecture), source="tiny", digest="", kernels=kernels)
        parameters = forests.trainable(model)
        loss = forests.engine_loss(model, trees)
        found.append((loss.item(), forests.gradients(loss, parameters), model.executor))
    assert found[0][2].blocks is not None and found[0][2].backend.name == "triton"
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-6)
    forests.assert_same_gradients(found[0][1], found[1][1], tolerance=1e-4)
