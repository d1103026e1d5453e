"""Models as a stream: any rows from any layout, files that transformers reads, and a sentence for what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luthier.core.errors import (
    CorruptError,
    DiskFullError,
    LuthierError,
    MissingError,
    UnsafeArtifactError,
)
from luthier.kernels.floats import BFLOAT16, FLOAT32
from luthier.model.files import shards
from luthier.model.files.array_views import array_of, tensor_of
from luthier.model.files.shards import INDEX, SINGLE, Shards, ShardWriter, Slot, write_arrays, write_shards
from luthier.store.folder import write_folder
from luthier.store.manifest import Entry, verify

TENSORS = {
    "embed": torch.randn(50, 8).bfloat16(),
    "blocks": torch.randn(3, 4, 6),
    "norm": torch.randn(8).half(),
    "flags": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "none": torch.empty(0, 4),
    "quarter": torch.randn(6, 8).to(torch.float8_e4m3fn),
}


ARRAYS = {name: array_of(tensor) for name, tensor in TENSORS.items()}


def slots() -> dict[str, Slot]:
    return {name: Slot(array.dtype, array.shape) for name, array in ARRAYS.items()}


def beside(folder: Path) -> Path:
    (folder / "beside").mkdir()
    return folder / "beside"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


@pytest.mark.parametrize("limit", [shards.SHARD_BYTES, 300, 1])
def test_what_is_written_is_what_safetensors_and_we_read(tmp_path: Path, limit: int) -> None:
    """Breaks when an offset, an index entry or a digest is wrong for any dtype, any shape or any number of files."""
    entries = write_shards(tmp_path, slots(), ARRAYS.items(), shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {shards.SHARD_BYTES: 1, 300: 3, 1: 7}[limit]
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == TENSORS.keys() and all(same(found[name], TENSORS[name]) for name in TENSORS)
    assert entries == {path.name: Entry(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
                       for path in files}  # fmt: skip
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with Shards(tmp_path) as ours:
        assert ours.slots.keys() == TENSORS.keys() and ours.bytes == sum(slot.bytes for slot in slots().values())
        assert all(same(tensor_of(array), TENSORS[name]) for name, array in ours.each())
        with ShardWriter(beside(tmp_path), slots(), shard_bytes=limit) as writer:
            assert list(writer.order) == list(ours.slots)
            for name, array in ARRAYS.items():
                writer.write(name, array)


def test_one_file_of_tensors_is_what_safetensors_reads(tmp_path: Path) -> None:
    """Breaks when a tensor that does not lie in order, has no shape or no numbers is written as another."""
    tensors = {**TENSORS, "turned": torch.randn(4, 6).T, "every other": torch.arange(10)[::2]}
    tensors["one"] = torch.tensor([7])
    # What is contiguous may have a stride of 0 where there is one number.
    odd = {**tensors, "one": torch.tensor(7).expand(1)}
    entry = write_arrays(tmp_path / "x", {name: array_of(tensor) for name, tensor in odd.items()})
    found, data = load_file(tmp_path / "x"), (tmp_path / "x").read_bytes()
    assert found.keys() == tensors.keys() and all(same(found[name], tensors[name]) for name in tensors)
    assert entry == Entry(len(data), hashlib.sha256(data).hexdigest())


def test_the_order_in_which_tensors_come_does_not_change_the_file(tmp_path: Path) -> None:
    """Breaks when a run that was killed and went on has other files than one that was not: it made its state anew."""
    assert write_arrays(tmp_path / "x", ARRAYS) == write_arrays(tmp_path / "y", dict(reversed(ARRAYS.items())))


def test_rows_are_read_alone_and_into_a_buffer(tmp_path: Path) -> None:
    """Breaks when rows of a tensor of three axes are counted along the first, or a buffer is not used."""
    write_shards(tmp_path, slots(), ARRAYS.items())
    with Shards(tmp_path) as ours:
        assert ours.slots["blocks"].rows == 12 and ours.slots["norm"].rows == 1
        assert same(tensor_of(ours.read("blocks", 5, 9)), TENSORS["blocks"].view(12, 6)[5:9])
        buffer = np.zeros((7, 8), BFLOAT16)
        assert ours.read("embed", 43, 50, out=buffer) is buffer and same(tensor_of(buffer), TENSORS["embed"][43:])
        with pytest.raises(IndexError, match="rows 49 to 51 of 50"):
            ours.read("embed", 49, 51)


def test_rows_in_any_order_from_threads_are_the_same_file(tmp_path: Path) -> None:
    """Breaks when a digest is of the bytes as they came and not as they lie."""
    for name in "ab":
        (tmp_path / name).mkdir()
    one = write_shards(tmp_path / "a", slots(), ARRAYS.items())
    writer = ShardWriter(tmp_path / "b", slots())
    with writer:
        parts = [(name, array, 0) for name, array in ARRAYS.items() if name != "embed"]
        parts += [("embed", ARRAYS["embed"][first : first + 7], first) for first in reversed(range(0, 50, 7))]
        threads = [threading.Thread(target=writer.write, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert writer.entries == one and (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


def test_the_digest_of_what_was_written_is_the_manifests(tmp_path: Path) -> None:
    """Breaks when the manifest takes a writer's word and the file on the disk is another."""
    place = tmp_path / "model"
    manifest = write_folder(place, lambda folder: write_shards(folder, slots(), ARRAYS.items()), {})
    assert verify(place) == manifest and set(manifest.files) == {SINGLE}

    def lying(folder: Path) -> dict[str, Entry]:
        entries = write_shards(folder, slots(), ARRAYS.items())
        with (folder / SINGLE).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        return entries

    with pytest.raises(CorruptError, match="does not match its manifest"):
        write_folder(tmp_path / "other", lying, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write_folder(tmp_path / "trusted", lying, {}, trust=True)
    with pytest.raises(CorruptError, match="does not match its manifest"):
        verify(tmp_path / "trusted")


def test_what_is_not_whole_is_not_finished(tmp_path: Path) -> None:
    """Breaks when a tensor that nobody wrote is left as zeros."""
    with pytest.raises(ValueError, match="1 tensors are not whole, blocks among them"):
        write_shards(tmp_path, slots(), [(name, array) for name, array in ARRAYS.items() if name != "blocks"])
    (tmp_path / SINGLE).unlink()
    with ShardWriter(tmp_path, {"a": Slot(FLOAT32, (2, 2))}) as w:
        with pytest.raises(TypeError, match="laid out"):
            w.write("a", np.zeros((2, 2), np.float16))
        with pytest.raises(IndexError):
            w.write("a", np.zeros((1, 2), np.float32), first=2)
        w.write("a", np.zeros((2, 2), np.float32))


def broken(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = folder / INDEX
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda where: where.update(embed="../other.safetensors"), UnsafeArtifactError, "names the file '../other"),
        (lambda where: where.update(embed="/etc/x.safetensors"), UnsafeArtifactError, "names the file '/etc/x"),
        (lambda where: where.update(embed="model.bin"), UnsafeArtifactError, "model.bin"),
        (lambda where: where.update(embed="gone.safetensors"), MissingError, "gone.safetensors, which is not there"),
        (lambda where: where.update(more=where["embed"]), CorruptError, "holds 'more', and it does not"),
        (lambda where: where.update(embed=where["norm"]), CorruptError, "holds 'embed', and it does not"),
        (lambda where: where.pop("norm"), CorruptError, "holds 'norm', which model.safetensors.index.json does not"),
        (lambda where: where.clear(), CorruptError, "has no weight_map"),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_a_sentence(
    tmp_path: Path, change: Callable[[dict[str, str]], None], kind: type[LuthierError], said: str
) -> None:
    """Breaks when a path leads out of the folder, or tensors and index may disagree."""
    write_shards(tmp_path, slots(), ARRAYS.items(), shard_bytes=300)
    broken(tmp_path, change)
    with pytest.raises(kind) as failure:
        Shards(tmp_path)
    assert said.replace("'", "") in str(failure.value).replace("'", "").replace('"', "")


def test_a_link_out_a_shard_twice_and_a_short_file_are_told(tmp_path: Path) -> None:
    """Breaks when a link leads out, one name stands in two files, or a file is cut while it is read."""
    save_file({"a": torch.zeros(3)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / SINGLE).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UnsafeArtifactError, match="link"):
        Shards(folder)
    (folder / SINGLE).unlink()
    for name in ("x", "y"):
        save_file({"a": torch.zeros(3)}, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(CorruptError, match="stands in two files"):
        Shards(folder)
    (folder / INDEX).unlink()
    write_shards(folder, slots(), ARRAYS.items())
    with Shards(folder) as ours:
        os.truncate(folder / SINGLE, 900)
        with pytest.raises(CorruptError, match="the file ends inside"):
            list(ours.each())


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_an_error_of_its_own_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Breaks when room that is not there is found out as another error, or half a folder stays."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFullError, match="No space left"):
        write_folder(tmp_path / "model", lambda folder: write_shards(folder, slots(), ARRAYS.items()), {})
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
