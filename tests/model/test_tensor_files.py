"""Reading safetensors: the same tensors as the safetensors library, and one error for everything that is not sound."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import CorruptError, LuthierError, MissingError, UnsafeArtifactError
from luthier.model.files.array_files import DTYPES, load_arrays, tensor_places
from luthier.model.files.array_views import array_of, tensor_type
from luthier.model.files.tensor_files import load_tensors
from luthier.model.files.tensor_headers import tensor_shapes

TWO = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
       "b": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]}}  # fmt: skip


def write(path: Path, header: object, data: bytes = bytes(16), *, count: int | None = None) -> Path:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(body) if count is None else count).to_bytes(8, "little") + body + data)
    return path


@pytest.fixture
def every_dtype(tmp_path: Path) -> Path:
    tensors = {}
    for name, own in DTYPES.items():
        dtype = tensor_type(own)
        for shape in ((), (3,), (0, 4), (2, 3, 5)):
            values = torch.randint(0, 2, shape)
            tensors[f"{name}{list(shape)}"] = torch.complex(values.float(), values.float()) \
                if dtype.is_complex else values.to(dtype)  # fmt: skip
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    return tmp_path / "all.safetensors"


def test_all_types_and_shapes_are_read_as_the_library_reads_them(every_dtype):
    """Breaks when a byte, a type, a shape or a name differs from what the safetensors library gives."""
    ours, theirs, arrays = load_tensors(every_dtype), load_file(every_dtype), load_arrays(every_dtype)
    assert ours.keys() == theirs.keys() == tensor_shapes(every_dtype).keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype == tensor_type(tensor_places(every_dtype)[name].dtype)
        assert tensor.shape == other.shape == tensor_shapes(every_dtype)[name]
        assert array_of(tensor).tobytes() == array_of(other).tobytes() == arrays[name].tobytes()
        assert arrays[name].dtype == array_of(other).dtype and arrays[name].shape == other.shape


def test_half_precision_can_be_widened_exactly(tmp_path):
    """Breaks when widening changes a number, or touches a type that is no half precision."""
    tensors = {"h": torch.randn(9).half(), "b": torch.randn(9).bfloat16(), "d": torch.randn(9).double()}
    save_file(tensors, tmp_path / "x.safetensors")
    wide = load_tensors(tmp_path / "x.safetensors", widen=True)
    assert [wide[name].dtype for name in "hbd"] == [torch.float32, torch.float32, torch.float64]
    assert all(torch.equal(wide[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())


def test_a_file_that_changes_later_changes_nothing(tmp_path):
    """Breaks when tensors are a view of the file: a run would go on with other weights, or be killed."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(9999)}, path)
    ours, theirs = load_tensors(path), load_file(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 9999 * 4)
        file.write(bytes(9999 * 4))
    assert float(ours["a"].sum()) == 9999
    assert float(theirs["a"].sum()) == 0  # the negative control


HUGE = 2**52
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "the header"),
    "seven bytes": (lambda path: path.write_bytes(bytes(7)), "the header"),
    "a header of nothing": (lambda path: write(path, b""), "the header"),
    "a header longer than the file": (lambda path: write(path, TWO, count=10**6), "the header"),
    "a header of 2^63 bytes": (lambda path: write(path, TWO, count=2**63), "100000000"),
    "no JSON": (lambda path: write(path, b"{nonsense}"), "the header"),
    "no object": (lambda path: write(path, b"[1, 2]"), "object"),
    "JSON cut short": (lambda path: write(path, json.dumps(TWO).encode()[:-3]), "the header"),
    "two values": (lambda path: write(path, b"{}{}", b""), "the header"),
    "no UTF-8": (lambda path: write(path, b'{"\xff": 1}'), "UTF-8"),
    "a name twice": (lambda path: write(path, json.dumps(TWO)[:-1].encode() + b',"a":1}'), "second"),
    "deep": (lambda path: write(path, b'{"a":' * 5000 + b"1" + b"}" * 5000), "deep"),
    "NaN": (lambda path: write(path, b'{"a": NaN}'), "NaN"),
    "no entry": (lambda path: write(path, {"a": 1}), "dtype, shape and data_offsets"),
    "a key too many": (lambda path: write(path, {"a": {**TWO["a"], "code": "x"}}), "dtype, shape and data_offsets"),
    "a key too few": (lambda path: write(path, {"a": {"dtype": "F32", "shape": [2]}}), "dtype, shape and"),
    "an unknown type": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "dtype": "F31"}}), '"F31"'),
    "a type that is no text": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "dtype": ["F32"]}}), "dtype"),
    "a negative size": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [-2]}}), "whole numbers"),
    "a size of true": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [True, 2]}}), "whole numbers"),
    "a size of 2.0": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [2.0]}}), "whole numbers"),
    "a size beyond all": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [HUGE, HUGE]}}), "bytes"),
    "sizes that wrap": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [2**32, 2**32, 2]}}), "bytes"),
    "a hundred dimensions": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [1] * 100}}), "shape"),
    "three offsets": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "data_offsets": [0, 4, 8]}}), "two whole"),
    "offsets backwards": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "data_offsets": [8, 0]}}), "-8 bytes"),
    "too few bytes for the shape": (lambda path: write(path, {**TWO, "a": {**TWO["a"], "shape": [3]}}), "12 bytes"),
    "a gap": (lambda path: write(path, {"b": TWO["b"]}), "a gap before it"),
    "an overlap": (lambda path: write(path, {**TWO, "c": {**TWO["b"], "data_offsets": [4, 12]}}), "overlaps"),
    "data cut short": (lambda path: write(path, TWO, bytes(15)), "byte"),
    "data too long": (lambda path: write(path, TWO, bytes(17)), "byte"),
    "a tensor behind the end": (lambda path: write(path, TWO, bytes(8)), "byte"),
    "metadata that is no text": (lambda path: write(path, {**TWO, "__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is no object": (lambda path: write(path, {**TWO, "__metadata__": []}), "__metadata__"),
    "a truth value of 2": (
        lambda path: write(path, {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"), "neither"),
    "a folder": (lambda path: path.mkdir(), "regular|directory"),
    "a named pipe": (lambda path: os.mkfifo(path), "regular"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_sound_is_one_error_with_its_reason(name, tmp_path):
    """Breaks when a damaged file is loaded, or fails in another way than with file, field and reason."""
    make, words = BAD[name]
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CorruptError, match=words) as caught:
        load_tensors(path)
    assert caught.value.where == str(path) and len(str(caught.value)) < 700


def test_what_is_sound_and_odd_is_read(tmp_path):
    """Breaks when the checks refuse what the format allows: spaces behind the header, no tensor, any order."""
    path = tmp_path / "x.safetensors"
    write(path, json.dumps(TWO).encode() + b"     ", bytes(16))
    assert tensor_shapes(path) == {"a": (2,), "b": (1,)} == {k: tuple(v.shape) for k, v in load_file(path).items()}
    write(path, {"b": TWO["b"], "a": TWO["a"], "__metadata__": {"format": "pt"}})
    assert list(load_tensors(path)) == ["b", "a"]
    save_file({}, path)
    assert load_tensors(path) == {}


PICKLES = {
    "x.bin": b"anything", "x.pt": b"", "x.pth": b"", "x.ckpt": b"", "x.pkl": b"", "x.npy": b"", "x.joblib": b"",
    "protocol 4.safetensors": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os",
    "protocol 2.safetensors": b"\x80\x02cposix\n",
    "text.safetensors": b"cos\nsystem\n(S'true'\ntR.", "zip.safetensors": b"PK\x03\x04" + bytes(60),
    "array.safetensors": b"\x93NUMPY\x01\0v\0{'descr': '|O'}", "hdf5.safetensors": b"\x89HDF\r\n\x1a\n" + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_whatever_it_is_called(name, tmp_path):
    """Breaks when a pickle is opened, or called merely damaged."""
    (tmp_path / name).write_bytes(PICKLES[name])
    with pytest.raises(UnsafeArtifactError, match="pickle"):
        load_tensors(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingError):
        load_tensors(tmp_path / "none.safetensors")


def test_no_claim_of_a_header_takes_memory(tmp_path):
    """Breaks when memory is taken for what a header says before that is compared with the file."""
    path = tmp_path / "x.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ([10**15], [10**6, 10**6], [2**40]):
        size = int(np.prod(shape, dtype=object)) * 4
        write(path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
        with pytest.raises(CorruptError):
            load_tensors(path)
    write(path, TWO, count=99_999_999)
    with pytest.raises(CorruptError):
        load_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_mutated_files_are_read_whole_or_refused(tmp_path, every_dtype):
    """Breaks when a mutated file crashes the reader, or is read where its header no longer fits the file."""
    whole = every_dtype.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    path = tmp_path / "mutant.safetensors"
    refused = 0
    for _ in range(400):
        mutant = bytearray(whole[: header + 200])
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(header)
            kind = rng.randrange(3)
            if kind == 0:
                mutant[where] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del mutant[where : where + rng.randint(1, 9)]
            else:
                mutant[where:where] = rng.randbytes(rng.randint(1, 9))
        path.write_bytes(bytes(mutant) + whole[header + 200 :])
        try:
            load_tensors(path)
        except LuthierError as error:
            refused += 1
            assert error.code in ("corrupt", "unsafe-artifact")
    assert refused > 300
