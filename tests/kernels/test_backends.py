"""Every backend against the twin in plain torch: values, gradients, and what is neither even nor finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import halves, many, native_backend
from luthier.kernels.backend import Backend, BlockScales, Paged, PairCodes, Seen
from luthier.kernels.native_backend import NativeBackend
from luthier.kernels.torch_backend import TorchBackend
from luthier.kernels.triton_backend import TritonBackend
from tests.kernels.on_device import OnDevice

TWIN = TorchBackend()
PRECISIONS = [torch.float32, torch.bfloat16]


def triton_on_a_gpu() -> Backend:
    """Only where there is one; without, test_triton.py runs these in Triton's interpreter."""
    device = torch.device("cuda")
    return OnDevice(TritonBackend.build(device, torch.bfloat16), device)


@pytest.fixture(scope="module", params=[NativeBackend.build, *[triton_on_a_gpu] * torch.cuda.is_available()])
def backend(request: pytest.FixtureRequest) -> Backend:
    built: Backend = request.param()
    return built


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, *, slack: float = 1.0) -> None:
    """Equal up to rounding: one part in a hundred thousand, or of a hundred in bfloat16, of the largest number."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    most = float(expected.abs().max())
    share = slack * (1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(found.double(), expected.double(), rtol=share, atol=share * most)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def require_attention(backend: Backend, query: Tensor) -> None:
    """End the test here when `query` is of a kind that this backend may leave to the general path."""
    if backend.name == "triton" and not backend.attends(query, None):
        pytest.skip("such heads go the general way")


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("n", "d"), [(1, 2), (3, 7), (5, 64), (130, 513)])
def test_norms(backend: Backend, dtype: torch.dtype, n: int, d: int) -> None:
    """Breaks when the last numbers of a row that is no whole number of vectors are left out."""
    x, weight, grad, added = (draw(n, d, dtype=dtype, seed=s) for s in range(4))
    weight = weight[0]
    h, inverse = backend.norm(x, weight, 1e-5)
    expected, expected_inverse = TWIN.norm(*exact(x, weight), 1e-5)
    close(h, expected.to(dtype), dtype)
    close(inverse, expected_inverse.float(), torch.float32)
    assert torch.equal(backend.normed(x, weight, inverse), h)
    for more in (None, added):
        found = backend.norm_backward(grad, x, weight, inverse, more)
        wide = None if more is None else more.double()
        close(found, TWIN.norm_backward(*exact(grad, x, weight), expected_inverse, wide).to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 17), (64, 100)])
def test_gates(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Breaks when gate and up are exchanged, or a large number overflows in the sigmoid."""
    gate, up, grad = (draw(*shape, dtype=dtype, seed=s, spread=8.0) for s in range(3))
    gate[0, 0] = -200.0
    close(backend.gated(gate, up), TWIN.gated(*exact(gate, up)).to(dtype), dtype)
    expected = [each.to(dtype) for each in TWIN.gated_backward(*exact(grad, gate, up))]
    for found, right in zip(backend.gated_backward(grad.clone(), gate, up), expected, strict=True):
        close(found, right, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rotations(backend: Backend, dtype: torch.dtype) -> None:
    """Breaks when neighbours are turned instead of halves, or turning back is no inverse."""
    x, angles = draw(9, 3, 20, dtype=dtype), draw(9, 10, dtype=torch.float32, seed=1)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = backend.rotated(x, cosines, sines)
    close(turned, TWIN.rotated(*exact(x, cosines, sines)).to(dtype), dtype)
    close(backend.rotated(turned, cosines, -sines), x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("numbers", "block"), [(64, 64), (1000, 64), (77, 32), (1, 64), (4096, 128), (35, 7)])
def test_unpacked(backend: Backend, dtype: torch.dtype, numbers: int, block: int) -> None:
    """Breaks when halves of a byte are exchanged, or the end of a matrix that is no whole block is read past."""
    generator = torch.Generator().manual_seed(numbers)
    codes = torch.randint(0, 256, (-(-numbers // 2),), generator=generator, dtype=torch.uint8)
    levels = draw(16, dtype=torch.float32).sort().values
    scales = draw(-(-numbers // block), dtype=torch.float32, seed=1).abs()
    places = torch.stack([codes >> 4, codes & 15], 1).view(-1)[:numbers]
    expected = levels[places.int()] * scales[torch.arange(numbers) // block]
    assert torch.equal(backend.unpacked(codes, scales, levels, block, numbers, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_label_slopes(backend: Backend, dtype: torch.dtype, size: int) -> None:
    """Breaks when the label's own slope is that of the others."""
    logits, labels = draw(7, size, dtype=dtype, spread=6.0), torch.arange(7) * 3 % size
    expected = TWIN.label_slopes(logits.double(), labels, slopes=True)
    log_probs, none = backend.label_slopes(logits.clone(), labels, slopes=False)
    assert none is None
    torch.testing.assert_close(log_probs, expected[0].float(), rtol=1e-5, atol=1e-5)
    log_probs, slopes = backend.label_slopes(logits.clone(), labels, slopes=True)
    torch.testing.assert_close(log_probs, expected[0].float(), rtol=1e-5, atol=1e-5)
    assert slopes is not None and expected[1] is not None
    close(slopes, expected[1].to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", [1, 5, 40_000])
def test_the_best_of_each_row(backend: Backend, dtype: torch.dtype, size: int) -> None:
    """Breaks when not the first of equal ones is taken, or what is not finite goes unseen."""
    logits = draw(6, size, dtype=dtype, spread=6.0)
    logits[3] = 2.0
    places, normalisers = backend.best(logits)
    assert torch.equal(logits.gather(1, places[:, None])[:, 0], logits.amax(-1)) and int(places[3]) == 0
    torch.testing.assert_close(normalisers, logits.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-5)
    logits[1, -1], logits[2, -1] = float("nan"), float("inf")
    if size > 1:
        logits[4, 0] = float("-inf")
    assert torch.isfinite(backend.best(logits)[1]).tolist() == [True, False, False, True, True, True]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("size", "outs"), [(1, 1), (31, 3), (33, 6), (64, 4), (96, 130), (513, 41)])
def test_products_of_few_rows(backend: Backend, dtype: torch.dtype, size: int, outs: int) -> None:
    """Breaks when the end of a row that is no whole vector is left out, or rows of the weight beyond the last block."""
    weight, bias = draw(outs, size, dtype=dtype, seed=1), draw(outs, dtype=dtype, seed=2)
    for n in (0, 1, 2, 3, 4, 5, 7, 16, 32, 33, 128, 129):
        x = draw(n, size, dtype=dtype)
        for added in (None, bias):
            found = backend.product(x, weight, added)
            if n == 0:
                assert found.shape == (0, outs)
                continue
            wide = None if added is None else added.double()
            close(found, TWIN.product(*exact(x, weight), wide).to(dtype), dtype)


@pytest.mark.parametrize("biased", [False, True])
def test_products_of_many_rows_without_instructions_for_them(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a piece of the weight is left out, or a sum is rounded before its end."""
    monkeypatch.setattr(halves, "_PIECE", 300)
    for module in (halves, native_backend):
        monkeypatch.setattr(module, "multiplies_halves", lambda: False)
    monkeypatch.setattr(many, "multiplies_many", lambda: False)
    monkeypatch.setattr(many, "multiplies_whole", lambda: False)
    x, weight = draw(40, 70, dtype=torch.bfloat16), draw(30, 70, dtype=torch.bfloat16, seed=1)
    bias = draw(30, dtype=torch.bfloat16, seed=2) if biased else None
    wanted = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()
    found = NativeBackend.build().product(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    codes, scales = torch.randint(-127, 128, (30, 70), dtype=torch.int8), draw(30, dtype=torch.float32, seed=3)
    packed = NativeBackend.build().product_of_bytes(x, codes, scales)
    wanted = F.linear(x.float(), codes.float() * scales[:, None]).bfloat16()
    torch.testing.assert_close(packed, wanted, rtol=2**-7, atol=2**-7)


def test_what_others_multiply_without_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a module of the zoo has its bfloat16 products imitated, or has ours beside a backward pass."""
    monkeypatch.setattr(halves, "multiplies_halves", lambda: False)
    seen: list[int] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(x))
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    layer, x = torch.nn.Linear(24, 5).bfloat16().requires_grad_(False), draw(2, 3, 24, dtype=torch.bfloat16)
    with torch.no_grad(), halves.our_products(x, product):
        found = layer(x)
        layer.float()(x.float())
    assert seen == [6] and found.shape == (2, 3, 5)
    close(found, F.linear(x.double(), layer.weight.double(), layer.bias.double()).bfloat16(), torch.bfloat16)
    with halves.our_products(x, product):
        layer.bfloat16()(x)
    monkeypatch.setattr(halves, "multiplies_halves", lambda: True)
    with torch.no_grad(), halves.our_products(x, product):
        layer(x)
    assert seen == [6]


@pytest.mark.parametrize("imitated", [True, False])
def test_low_rank_terms_are_added_where_they_lie(imitated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a term is rounded twice, or its rows are a copy of those it belongs to."""
    monkeypatch.setattr(halves, "multiplies_halves", lambda: not imitated)
    y, low, up = (draw(*shape, dtype=torch.bfloat16, seed=seed) for seed, shape in enumerate([(9, 7), (4, 3), (3, 7)]))
    wanted = (y[2:6].double() + low.double() @ up.double()).bfloat16()
    others = y[6:].clone()
    halves.add_low_rank(y[2:6], low, up)
    close(y[2:6], wanted, torch.bfloat16)
    assert torch.equal(y[6:], others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "outs", "block"), [(70, 30, 64), (64, 33, 64), (10, 200, 32), (2, 5, 4096)])
def test_products_of_many_rows_with_codes_without_instructions_for_them(
    size: int, outs: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a piece of the weight begins inside a block of codes, or the last one is left out."""
    monkeypatch.setattr(halves, "_PIECE", 300)
    monkeypatch.setattr(native_backend, "multiplies_halves", lambda: False)
    monkeypatch.setattr(many, "multiplies_many", lambda: False)
    native, blocks = NativeBackend.build(), -(-outs * size // block)
    assert native.multiplies_packed(40, dtype)
    codes, levels = whole(-(-outs * size // 2), most=255, seed=1), draw(16, dtype=torch.float32).sort().values
    scales = BlockScales(draw(blocks, dtype=torch.float32, seed=2).abs() + 0.1)
    weight = TWIN.unpacked(codes, scales.each(), levels, block, outs * size, torch.float32).view(outs, size)
    x = draw(40, size, dtype=dtype)
    found = native.product_of_codes(x, PairCodes(codes, scales, levels, block, (outs, size)))
    close(found, (x.double() @ weight.double().t()).to(dtype), dtype)
    x[3, 1] = float("nan")
    found = native.product_of_codes(x, PairCodes(codes, scales, levels, block, (outs, size)))
    assert found[3].isnan().all() and not found[:3].isnan().any()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_products_of_what_lies_elsewhere(backend: Backend, dtype: torch.dtype) -> None:
    """Breaks when rows are taken to lie end to end."""
    x, weight = draw(3, 80, dtype=dtype)[:, ::2], draw(40, 20, dtype=dtype, seed=1).t()
    close(backend.product(x, weight, None), TWIN.product(*exact(x, weight), None).to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("size", "outs"), [(70, 30), (512, 45), (896, 128), (3008, 13)])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype: torch.dtype, size: int, outs: int) -> None:
    """Breaks when sums are made in another order for another number of rows: a text would depend on its neighbours."""
    backend = NativeBackend.build()
    x, weight = draw(32, size, dtype=dtype), draw(outs, size, dtype=dtype, seed=1)
    bias = draw(outs, dtype=dtype, seed=2)
    alone = torch.cat([backend.product(row[None], weight, bias) for row in x])
    for n in range(1, 33):
        assert torch.equal(backend.product(x[:n], weight, bias), alone[:n])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_product_does_not_depend_on_the_layers_beside_it(dtype: torch.dtype) -> None:
    """Breaks when one layer that the C++ does not take sends the others of its input to the library."""
    backend = NativeBackend.build()
    x, weight, bias = draw(3, 70, dtype=dtype), draw(30, 70, dtype=dtype, seed=1), draw(30, dtype=dtype, seed=2)
    other = draw(70, 20, dtype=dtype, seed=3).t()
    alone = backend.product(x, weight, bias)
    for beside in ([other], [weight] * 3, [weight, other]):
        found = backend.products(x, [(weight, bias), *((each, None) for each in beside)])
        assert len(found) == 1 + len(beside) and torch.equal(found[0], alone)
        for one, own in zip(found[1:], beside, strict=True):
            close(one, TWIN.product(*exact(x, own), None).to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 8), (4, 2, 16), (3, 1, 6), (2, 1, 128)])
def test_attention(backend: Backend, dtype: torch.dtype, heads: int, groups: int, size: int) -> None:
    """Breaks when a text sees its neighbour, a block of queries the one after it, or a key head the wrong queries."""
    require_attention(backend, torch.empty(1, heads, size, dtype=dtype))
    runs = [(2, 5), (1, 1), (1, 49), (3, 2), (1, 130)]
    total = sum(count * length for count, length in runs)
    query, grad = (draw(total, heads, size, dtype=dtype, seed=s) for s in range(2))
    key, value = (draw(total, groups, size, dtype=dtype, seed=s) for s in range(2, 4))
    out, kept = backend.attend(query, key, value, runs, 0.3, None)
    wide = exact(query, key, value)
    expected, expected_kept = TWIN.attend(*wide, runs, 0.3, None)
    close(out, expected.to(dtype), dtype)
    found = backend.attend_backward(grad, query, key, value, out, kept, runs, 0.3, None)
    right = TWIN.attend_backward(grad.double(), *wide, expected, expected_kept, runs, 0.3, None)
    for one, other in zip(found, right, strict=True):
        close(one, other.to(dtype), dtype, slack=2.0)


def dense(query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]], scale: float, seen: Seen) -> Tensor:
    """Attention with a mask over all pairs of rows: what a text sees, and of its own tokens those up to each one."""
    lengths = [length for count, length in runs for _ in range(count)]
    mask = torch.zeros(len(query), len(key), dtype=torch.bool)
    start = 0
    for length, ranges in zip(lengths, seen.ranges, strict=True):
        for first, count in ranges:
            mask[start : start + length, first : first + count] = True
        own = slice(seen.outside + start, seen.outside + start + length)
        mask[start : start + length, own] = torch.ones(length, length).tril().bool()
        start += length
    sides = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    found = F.scaled_dot_product_attention(*sides, attn_mask=mask, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("outside", "size"), [(0, 10), (3, 16)])
def test_attention_after_what_is_seen(backend: Backend, dtype: torch.dtype, outside: int, size: int) -> None:
    """Breaks when a key that several texts see gets the gradient of one of them, or ranges change their order."""
    common = ((0, outside),) if outside else ()
    # Two trees: a root with two branches, one of which branches again; and a text alone.
    places = [(0, 7), (7, 50), (57, 1), (58, 20), (78, 60)]
    above: list[list[int]] = [[], [0], [0], [0, 2], []]
    ranges = tuple((*common, *((outside + places[a][0], places[a][1]) for a in own)) for own in above)
    seen, runs = Seen(ranges, outside), [(1, length) for _, length in places]
    query, grad = (draw(138, 4, size, dtype=dtype, seed=s) for s in range(2))
    key, value = (draw(138 + outside, 2, size, dtype=dtype, seed=s) for s in range(2, 4))
    if not backend.attends(query, seen):
        pytest.skip(f"{backend.name} leaves this to the zoo")
    wide = [tensor.requires_grad_() for tensor in exact(query, key, value)]
    expected = dense(*wide, runs, 0.3, seen)
    out, kept = backend.attend(query, key, value, runs, 0.3, seen)
    close(out, expected.detach().to(dtype), dtype)
    right = torch.autograd.grad(expected, wide, grad.double())
    found = backend.attend_backward(grad, query, key, value, out, kept, runs, 0.3, seen)
    for one, other in zip(found, right, strict=True):
        close(one, other.to(dtype), dtype, slack=2.0)


def whole(*shape: int, most: int, seed: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    least = -most if dtype == torch.int8 else 0
    return torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("size", "outs"), [(1, 1), (31, 3), (64, 6), (100, 9), (896, 130)])
def test_products_of_bytes(backend: Backend, dtype: torch.dtype, size: int, outs: int) -> None:
    """Breaks when a sign is lost, a scale belongs to another row, or the end of a row is left out."""
    codes, scales = whole(outs, size, most=127, seed=1, dtype=torch.int8), draw(outs, dtype=torch.float32, seed=2).abs()
    x = draw(300, size, dtype=dtype)
    for n in (1, 2, 3, 4, 5, 9, 16, 17, 32, 33, 128, 300):
        expected = TWIN.product_of_bytes(x[:n].double(), codes, scales.double())
        close(backend.product_of_bytes(x[:n], codes, scales), expected.to(dtype), dtype)


@pytest.mark.parametrize("size", [64, 896, 1000, 4864])
def test_products_of_bytes_at_their_largest(backend: Backend, size: int) -> None:
    """Breaks when sums of the largest numbers there are do not fit, or a byte loses its sign."""
    codes = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, size).contiguous()
    x = torch.tensor([[255 / 128], [-255 / 128], [1.0], [-(2.0**100)], [0.0]]).expand(5, size).bfloat16()
    found = backend.product_of_bytes(x, codes, torch.ones(2))
    wanted = TWIN.product_of_bytes(x.double(), codes, torch.ones(2)).bfloat16()
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=0)


def activations(kind: str, size: int) -> Tensor:
    """Rows of numbers in float64, as hidden states have them: alike, with outliers, or of every magnitude."""
    x = draw(6, size, dtype=torch.float64, seed=3)
    if kind == "one outlier":
        x[torch.arange(6), torch.arange(6) * size // 7] *= 1000
    elif kind == "outliers":
        x[:, 5 :: size // 9] *= 1000
    elif kind == "every magnitude":
        x *= 10.0 ** draw(6, size, dtype=torch.float64, seed=4)
    return x


@pytest.mark.parametrize("kind", ["alike", "one outlier", "outliers", "every magnitude"])
@pytest.mark.parametrize("size", [896, 1000, 4864])
def test_products_of_bytes_keep_activations_better_than_they_were_rounded(kind: str, size: int) -> None:
    """Breaks when activations that become whole numbers lose more than they lost when they became bfloat16: where one
    step serves too much of a row, where a byte is cut off instead of rounded, or a row has the step of another."""
    native, exact_x = NativeBackend.build(), activations(kind, size)
    x = exact_x.bfloat16()
    # A row of the weight that is 1 in one place says what is kept of the number there, in no more than eight bits.
    kept = native.product_of_bytes(x, torch.eye(size, dtype=torch.int8), torch.ones(size)).double()
    lanes = torch.arange(size) % 64 // 4
    largest = torch.stack([x[:, lanes == lane].abs().amax(1) for lane in range(16)], 1).double()[:, lanes]
    assert bool(((kept - x).abs() <= largest * 2.0**-15).all())
    assert torch.equal(kept[x.abs() >= largest / 2**7], x.double()[x.abs() >= largest / 2**7])
    codes = whole(400, size, most=127, seed=1, dtype=torch.int8).double()
    added, rounded = ((error @ codes.t()).square().mean(1).sqrt() for error in (kept - x, x - exact_x))
    assert bool((added <= rounded).all())


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("size", "outs"), [(70, 30), (896, 130)])
def test_a_row_of_a_product_of_bytes_does_not_depend_on_the_others(dtype: torch.dtype, size: int, outs: int) -> None:
    """Breaks when rows share a step, or sums are made in another order for another number of rows."""
    backend = NativeBackend.build()
    codes, scales = whole(outs, size, most=127, seed=1, dtype=torch.int8), draw(outs, dtype=torch.float32, seed=2)
    x = draw(32, size, dtype=dtype) * torch.logspace(-3, 3, 32, dtype=dtype)[:, None]
    x[7, 3], x[9, 5] = float("nan"), float("inf")
    alone = torch.cat([backend.product_of_bytes(row[None], codes, scales) for row in x])
    assert alone.isfinite().all(1).tolist() == [row not in (7, 9) for row in range(32)]
    for n in range(1, 33):
        found = backend.product_of_bytes(x[:n], codes, scales)
        assert torch.equal(found.nan_to_num(0.5), alone[:n].nan_to_num(0.5))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("size", "outs", "block"), [(66, 31, 64), (896, 41, 64), (384, 45, 32), (256, 8, 128), (96, 9, 64)]
)
def test_a_row_of_a_product_of_codes_does_not_depend_on_the_others(
    dtype: torch.dtype, size: int, outs: int, block: int
) -> None:
    """Breaks when numbers that are made vector by vector, for few rows, have another block's scale, or are summed in
    another order."""
    backend, blocks = NativeBackend.build(), -(-outs * size // block)
    codes, levels = whole(outs * size // 2, most=255, seed=1), draw(16, dtype=torch.float32).sort().values
    own = (whole(blocks, most=255, seed=3), draw(256, dtype=torch.float32, seed=4), torch.tensor(2.0), 3)
    scales = BlockScales(draw(-(-blocks // 3), dtype=torch.float32, seed=2), *own)
    weight = PairCodes(codes, scales, levels, block, (outs, size))
    x = draw(33, size, dtype=dtype)
    alone = torch.cat([backend.product_of_codes(row[None], weight) for row in x])
    plain = backend.unpacked(codes, weight.scales.each(), levels, block, outs * size, dtype).view(outs, size)
    close(alone, (x.double() @ plain.double().t()).to(dtype), dtype)
    for n in range(1, 33):
        assert torch.equal(backend.product_of_codes(x[:n], weight), alone[:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(3, 40), (2, 1500), (1, 1)])
def test_unpacked_rows(backend: Backend, dtype: torch.dtype, n: int, d: int) -> None:
    """Breaks when a whole number has the scale of another row, or is rounded twice."""
    codes, scales = whole(n, d, most=127, seed=1, dtype=torch.int8), draw(n, dtype=torch.float32, seed=2)
    expected = torch.stack([row.double() * scale.double() for row, scale in zip(codes, scales, strict=True)])
    # Seven bits times 24: float64 holds the product exactly, float32 rounds it as one more number.
    assert torch.equal(backend.unpacked_rows(codes, scales, dtype), expected.float().to(dtype))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("size", "outs", "block"), [(64, 3, 64), (6, 5, 32), (96, 9, 64), (7, 3, 64), (256, 130, 32)])
def test_products_of_codes(
    backend: Backend, dtype: torch.dtype, double: bool, size: int, outs: int, block: int
) -> None:
    """Breaks when a block that begins in the middle of a row has the scale of the one before it."""
    blocks = -(-outs * size // block)
    codes, levels = whole(-(-outs * size // 2), most=255, seed=1), draw(16, dtype=torch.float32).sort().values
    scales = BlockScales(draw(blocks, dtype=torch.float32, seed=2).abs() + 0.1)
    if double:
        own = (whole(blocks, most=255, seed=3), draw(256, dtype=torch.float32, seed=4), torch.tensor(2.0), 3)
        scales = BlockScales(scales.numbers[: -(-blocks // 3)], *own)
    weight = backend.unpacked(codes, scales.each(), levels, block, outs * size, dtype).view(outs, size)
    for n in (1, 2, 9, 33, 300):
        x = draw(n, size, dtype=dtype)
        found = backend.product_of_codes(x, PairCodes(codes, scales, levels, block, (outs, size)))
        close(found, (x.double() @ weight.double().t()).to(dtype), dtype)


def in_pages(texts: list[tuple[int, int]], size: int, *, seed: int = 0) -> tuple[Paged, int]:
    """Texts (keys, new tokens) in shuffled pages, and how many pages there are; behind the used ones stands junk."""
    needed = [-(-count // size) for count, _ in texts]
    free = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(texts), max(needed) + 2), 10**6)
    for index, own in enumerate(needed):
        table[index, :own] = torch.tensor([free.pop() for _ in range(own)])
    starts = torch.tensor([0, *(new for _, new in texts)]).cumsum(0)
    counts = torch.tensor([count for count, _ in texts])
    return Paged(table, counts, starts, size, all(new == 1 for _, new in texts)), sum(needed) + 3


TEXTS = {
    "speaking": [(1, 1), (17, 1), (600, 1), (16, 1), (255, 1), (257, 1)],
    "prompts": [(50, 50), (9, 9), (300, 203), (97, 49)],
    "both": [(5, 1), (70, 60), (300, 3), (1, 1), (520, 400), (33, 8)],
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("texts", list(TEXTS))
@pytest.mark.parametrize(
    ("heads", "groups", "size", "page"), [(4, 4, 8, 16), (9, 1, 32, 5), (4, 2, 64, 1), (6, 3, 20, 64)]
)
def test_attention_over_pages(
    backend: Backend, dtype: torch.dtype, window: int | None, texts: str, heads: int, groups: int, size: int, page: int
) -> None:
    """Breaks when a page is taken for another, a text's last page is read to its end, or a window is off by one."""
    places, pages = in_pages(TEXTS[texts], page)
    query = draw(int(places.starts[-1]), heads, size, dtype=dtype)
    keys, values = (draw(pages * page, groups, size, dtype=dtype, seed=s) for s in range(1, 3))
    found = backend.attend_pages(query, keys, values, places, 0.3, window)
    expected = TWIN.attend_pages(*exact(query, keys, values), places, 0.3, window)
    close(found, expected.to(dtype), dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_text_in_pages_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Breaks when runs of keys, or what is done with them, follow from what else there is to do, or from threads."""
    backend = NativeBackend.build()
    texts = TEXTS["both"]
    places, pages = in_pages(texts, 16)
    query = draw(int(places.starts[-1]), 6, 64, dtype=dtype)
    keys, values = (draw(pages * 16, 2, 64, dtype=dtype, seed=s) for s in range(1, 3))
    together = backend.attend_pages(query, keys, values, places, 0.3, None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for index, (_, new) in enumerate(texts):
            start = int(places.starts[index])
            own, row = slice(start, start + new), slice(index, index + 1)
            alone = Paged(places.pages[row], places.counts[row], torch.tensor([0, new]), 16, new == 1)
            assert torch.equal(backend.attend_pages(query[own], keys, values, alone, 0.3, None), together[own])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(backend: Backend, dtype: torch.dtype, bad: float) -> None:
    """Breaks when a maximum, a clamp or a rounding turns a bad number into a good one."""
    x = draw(6, 40, dtype=dtype)
    x[2, 17] = bad
    good = draw(6, 40, dtype=dtype, seed=1)
    h, inverse = backend.norm(x, good[0], 1e-5)
    found = [
        h, backend.norm_backward(good, x, good[0], inverse, None), backend.gated(good, x),
        backend.gated_backward(x.clone(), good, good)[1],
        backend.label_slopes(x.clone(), torch.zeros(6).long(), slopes=True)[1],
    ]  # fmt: skip
    if bad != bad:
        found += [backend.gated(x, good), backend.gated_backward(good.clone(), x, good)[0]]
    for each in found:
        assert each is not None and not torch.isfinite(each[2]).all()
        assert torch.isfinite(each[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_text(backend: Backend, dtype: torch.dtype, bad: float) -> None:
    """Breaks when a block reaches over the end of a text; the text with the bad number may be bad throughout."""
    heads = draw(6, 2, 24, dtype=dtype)
    heads[2, 1, 5] = bad
    require_attention(backend, heads)
    out, _ = backend.attend(heads, heads, heads, [(1, 2), (1, 4)], 1.0, None)
    assert torch.isfinite(out[:2]).all() and not torch.isfinite(out[2:]).all()
    places, pages = in_pages([(40, 1), (300, 1), (60, 30)], 16)
    keys, values = (draw(pages * 16, 2, 24, dtype=dtype, seed=s) for s in range(1, 3))
    last = int(places.pages[1, -(-300 // 16) - 1]) * 16
    keys[last] = bad
    out = backend.attend_pages(draw(32, 2, 24, dtype=dtype), keys, values, places, 1.0, None)
    assert torch.isfinite(out[[0, *range(2, 32)]]).all() and not torch.isfinite(out[1]).any()


def test_the_number_of_threads_changes_no_bit(backend: Backend) -> None:
    """Breaks when a sum is split by threads."""
    require_attention(backend, torch.empty(1, 4, 16, dtype=torch.bfloat16))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            q, g = (draw(200, 4, 16, dtype=torch.bfloat16, seed=s) for s in range(2))
            k, v = (draw(200, 2, 16, dtype=torch.bfloat16, seed=s) for s in range(2, 4))
            out, kept = backend.attend(q, k, v, [(1, 150), (2, 25)], 0.5, None)
            grads = backend.attend_backward(g, q, k, v, out, kept, [(1, 150), (2, 25)], 0.5, None)
            few = backend.product(draw(9, 700, dtype=torch.bfloat16), draw(350, 700, dtype=torch.bfloat16), None)
            logits = draw(200, 300, dtype=torch.float32)
            log_probs, slopes = backend.label_slopes(logits, torch.arange(200), slopes=True)
            results.append([out, *grads, few, log_probs, slopes])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
