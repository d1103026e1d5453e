"""GGUF files: what is written is what the format's own package reads, and no forged file costs more than an error."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import CorruptError, DiskFullError, LuthierError, MissingError
from luthier.maths.ggml import FORMATS
from luthier.model.gguf.reading import GgufFile, padded
from luthier.model.gguf.writing import F32, I32, Planned, flag, numbers, real, text, texts, whole, write_gguf

KEYS = {
    "general.architecture": text("llama"),
    "a.count": whole(7),
    "a.number": real(0.5),
    "a.flag": flag(True),
    "a.words": texts(["", "Ġthe", "日本 🙂"]),
    "a.scores": numbers([0.0, -1.5], F32),
    "a.types": numbers([1, 3, -2], I32),
}
PLAN = [
    Planned("norm.weight", (5,), FORMATS["F32"]),
    Planned("blk.0.attn_q.weight", (3, 64), FORMATS["Q8_0"]),
    Planned("blk.0.ffn_down.weight", (2, 256), FORMATS["Q4_K"]),
]


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(each.name, torch.randn(each.shape)) for each in PLAN]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    assert write_gguf(path, KEYS, PLAN, tensors()) == path.stat().st_size
    return path


def test_keys_and_tensors_come_back(written: Path) -> None:
    file = GgufFile.open(written)
    assert file.keys == {key: value.value for key, value in KEYS.items()}
    assert {name: place.shape for name, place in file.places.items()} == {each.name: each.shape for each in PLAN}
    for (name, tensor), (read, values) in zip(tensors(), file.each(), strict=True):
        assert read == name and values.shape == tensor.shape
        assert torch.equal(values, file.tensor(name))
        torch.testing.assert_close(values, tensor, atol=0.3, rtol=0)


def test_the_formats_own_package_reads_the_same(written: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader, file = gguf.GGUFReader(written), GgufFile.open(written)
    assert [each.name for each in reader.tensors] == [each.name for each in PLAN]
    for each in reader.tensors:
        theirs = gguf.dequantize(each.data, each.tensor_type)
        np.testing.assert_array_equal(theirs.reshape(-1), file.tensor(each.name).numpy().reshape(-1))
    assert reader.fields["a.words"].contents() == ["", "Ġthe", "日本 🙂"]
    assert reader.fields["a.types"].contents() == [1, 3, -2]


def test_tensors_that_are_not_the_planned_ones_leave_no_file(tmp_path: Path) -> None:
    for wrong in (tensors()[:-1], tensors()[::-1], [(name, tensor[:1]) for name, tensor in tensors()]):
        with pytest.raises(CorruptError, match="was planned"):
            write_gguf(tmp_path / "x.gguf", KEYS, PLAN, wrong)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the second tensor; and before the first byte, where the space is known to be missing."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def full() -> Any:
        yield tensors()[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match="bytes needed"):
        write_gguf(path, KEYS, PLAN, full())
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskFullError, match="10 free"):
        write_gguf(path, KEYS, PLAN, tensors())
    assert [each.name for each in tmp_path.iterdir()] == ["x.gguf"] and path.read_bytes() == b"old"


def test_a_file_that_is_cut_short_is_told_at_every_length(written: Path, tmp_path: Path) -> None:
    whole_file, path = written.read_bytes(), tmp_path / "cut.gguf"
    for length in {*range(0, len(whole_file), 37), len(whole_file) - 1}:
        path.write_bytes(whole_file[:length])
        with pytest.raises(CorruptError, match="no sound GGUF file"):
            GgufFile.open(path)


def test_forged_files_are_errors_and_take_no_memory(written: Path, tmp_path: Path) -> None:
    """Files with a few bytes changed, a quarter of them to huge counts."""
    forge(written, tmp_path, rounds=250)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_forged_files_are_errors(written: Path, tmp_path: Path) -> None:
    forge(written, tmp_path, rounds=5_000)


def forge(written: Path, tmp_path: Path, *, rounds: int) -> None:
    whole_file, path = written.read_bytes(), tmp_path / "forged.gguf"
    draw = random.Random(0)
    refused = 0
    head = whole_file.index(b"blk.0.ffn_down") + 80
    for round_ in range(rounds):
        held = bytearray(whole_file)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(head)
            if round_ % 4 == 0:
                held[place : place + 8] = struct.pack("<Q", draw.choice([2**63, 2**40, 2**32 - 1, 10**6]))
            else:
                held[place] = draw.randrange(256)
        path.write_bytes(held)
        try:
            for _ in GgufFile.open(path).each():
                pass
        except LuthierError as failure:
            assert isinstance(failure, CorruptError) and str(path) in str(failure)
            refused += 1
    assert refused > rounds // 2


@pytest.mark.parametrize(
    ("at", "bytes_", "said"),
    [
        (0, b"GGML", '"the start" has other bytes'),
        (4, struct.pack("<I", 1), '"the version" has 1'),
        (4, struct.pack(">I", 3), "little-endian"),
        (8, struct.pack("<Q", 2**60), '"the tensors" has'),
        (16, struct.pack("<Q", 2**60), '"the keys" has'),
        (24, struct.pack("<Q", 2**60), '"a key" has'),
    ],
)
def test_each_count_is_compared_with_the_file(
    written: Path, tmp_path: Path, at: int, bytes_: bytes, said: str
) -> None:
    held = bytearray(written.read_bytes())
    held[at : at + len(bytes_)] = bytes_
    (tmp_path / "x.gguf").write_bytes(held)
    with pytest.raises(CorruptError, match=said):
        GgufFile.open(tmp_path / "x.gguf")


def test_more_behind_the_tensors_is_refused(written: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(written.read_bytes() + b"\0" * 64)
    with pytest.raises(CorruptError, match="the end of the tensors"):
        GgufFile.open(tmp_path / "x.gguf")
    with pytest.raises(MissingError):
        GgufFile.open(tmp_path / "nothing.gguf")


def test_padding() -> None:
    assert [padded(number) for number in (0, 1, 32, 33)] == [0, 32, 32, 64]
