"""The machine's rates are measured once and remembered, and decide in which precision a CPU computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luthier.core.paths import cache_folder
from luthier.model import load, machine
from luthier.model.load import choose_precision
from luthier.model.machine import FILE, Rates, rates

CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Rates]:
    """What the machine will say when it is measured, in turn; with a cache of its own."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    says = [Rates(2e9, 3e9), Rates(1e9, 4e9), Rates(5e9, 1e9)]
    monkeypatch.setattr(machine, "measure", lambda *_, **__: says.pop(0))
    return says


def test_a_rate_is_measured_once_and_only_ever_gets_better(told: list[Rates]) -> None:
    """Breaks when each run measures anew, or a busy moment lowers the limit."""
    assert rates(CPU, torch.float32, inputs=8, outputs=9) == Rates(2e9, 3e9)
    assert rates(CPU, torch.float32, inputs=8, outputs=9) == Rates(2e9, 3e9) and len(told) == 2
    assert rates(CPU, torch.float32, inputs=8, outputs=9, anew=True) == Rates(2e9, 4e9)
    # Another precision or shape is another limit.
    assert rates(CPU, torch.bfloat16, inputs=8, outputs=9) == Rates(5e9, 1e9)


def test_what_was_measured_beside_other_work_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, told: list[Rates]
) -> None:
    """Breaks when a busy moment decides for ever, or a machine that is always busy is measured by each run."""
    told[:] = [Rates(1e9, 1e9, 1), Rates(3e9, 1e9, 1), Rates(2e9, 2e9), Rates(9e9, 9e9)]
    of = {"inputs": 8, "outputs": 9}
    assert [rates(CPU, torch.float32, **of) for _ in range(4)] == [
        Rates(1e9, 1e9, 1), Rates(3e9, 1e9, 2), Rates(3e9, 2e9), Rates(3e9, 2e9)]  # fmt: skip
    told[:] = [Rates(1e9, 1e9, 1)] * 20
    for _ in range(20):
        rates(CPU, torch.bfloat16, **of)
    assert len(told) == 20 - machine.MOST_BUSY


def test_other_work_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when time that others had counts as ours."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert machine.measure(CPU, torch.float32, inputs=64, outputs=64, seconds=0.01).busy == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1e-9)
    assert machine.measure(CPU, torch.float32, inputs=64, outputs=64, seconds=0.01).busy == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"KEY": {"flops": "fast", "bytes": -1.0}}'])
def test_a_damaged_memory_is_measured_again(content: str, told: list[Rates]) -> None:
    """Breaks when a cache that can be made again ends a run."""
    rates(CPU, torch.float32, inputs=8, outputs=9)
    path = cache_folder() / FILE
    key = next(iter(json.loads(path.read_text("utf-8"))))
    path.write_text(content.replace("KEY", key), encoding="utf-8")
    assert rates(CPU, torch.float32, inputs=8, outputs=9) == Rates(1e9, 4e9)


def test_a_cache_that_cannot_be_written_stops_nobody(told: list[Rates], tmp_path: Path) -> None:
    """Breaks when a run needs a place for a number that it has."""
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert rates(CPU, torch.float32, inputs=8, outputs=9) == Rates(2e9, 3e9)


def test_a_measurement_is_a_rate() -> None:
    """Breaks when bytes are taken for numbers, or the first, cold call counts."""
    found = machine.measure(CPU, torch.float32, inputs=256, outputs=256, seconds=0.02)
    assert 1e8 < found.flops < 1e14 and 1e8 < found.bytes < 1e13


@pytest.mark.parametrize(
    ("half", "full", "chosen"),
    [(4e11, 2e11, torch.bfloat16), (2.1e11, 2e11, torch.float32), (5e8, 1e11, torch.float32)],
)
def test_half_precision_has_to_be_worth_it(
    half: float, full: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a CPU that has the instructions, and is slower with them, computes in bfloat16."""
    seen: list[tuple[torch.dtype, int, int]] = []

    def said(_device: torch.device, dtype: torch.dtype, *, inputs: int, outputs: int) -> Rates:
        seen.append((dtype, inputs, outputs))
        return Rates(half if dtype == torch.bfloat16 else full, 1e10)

    monkeypatch.setattr(load, "rates", said)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    dtype, why = choose_precision("auto", (512, 1408), CPU)
    assert dtype == chosen and "512 x 1408" in why and "FLOP/s" in why
    assert seen == [(torch.bfloat16, 512, 1408), (torch.float32, 512, 1408)]


def test_a_cpu_without_the_instructions_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a run begins with minutes of products that a CPU can only imitate."""
    monkeypatch.setattr(load, "rates", None)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert choose_precision("auto", (512, 1408), CPU)[0] == torch.float32
    assert choose_precision("bfloat16", (512, 1408), CPU) == (torch.bfloat16, "bfloat16, as asked")
    assert choose_precision("auto", (512, 1408), torch.device("cuda"))[0] == torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "timed"),
    [
        ((512, 1408), (512, 1408)),
        ((8192, 28672), (8192, 16384)),
        ((28672, 8192), (16384, 8192)),
        ((131_072, 524_288), (11_585, 11_585)),
    ],
)
def test_a_matrix_that_is_timed_fits_into_memory(sizes: tuple[int, int], timed: tuple[int, int]) -> None:
    """Breaks when the plan of a model that nobody could load here makes a matrix of it."""
    assert machine._timed_sizes(*sizes) == timed and timed[0] * timed[1] <= machine.MOST_NUMBERS
