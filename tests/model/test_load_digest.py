"""The digest of a base model: of its files, computed beside the loading, and given up when nobody wants it any more."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from luthier.core.errors import LuthierError
from luthier.model import load
from luthier.model.files import weight_files
from luthier.model.files.weight_files import folder_digest
from luthier.model.load import load_model
from tests.tiny import tiny_folder


def test_it_is_that_of_names_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_PIECE", 3)
    (tmp_path / "b.safetensors").write_bytes(b"four")
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "other.bin").write_bytes(b"no weights")
    wanted = hashlib.sha256()
    for name, content in (("a.safetensors", b""), ("b.safetensors", b"four")):
        wanted.update(name.encode() + hashlib.sha256(content).digest())
    assert folder_digest(tmp_path) == wanted.hexdigest()
    assert folder_digest(tmp_path, wanted=lambda: False) == ""


def test_a_model_has_the_digest_of_its_files(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    assert load_model(str(folder)).digest == folder_digest(folder)


def test_a_model_that_cannot_be_loaded_waits_for_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    given_up: list[bool] = []

    def slow(folder: Path, *, wanted) -> str:
        while wanted():
            threading.Event().wait(0.01)
        given_up.append(True)
        return ""

    monkeypatch.setattr(load, "folder_digest", slow)
    with pytest.raises(LuthierError):
        load_model(str(folder))
    assert given_up == [True]
