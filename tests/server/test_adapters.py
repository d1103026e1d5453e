"""Adapters at run time: from declared folders only, in both dialects, mixed in one batch, each as if alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import Opened, open_named, put_on
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from tests.server.fakes import TOKEN, Running, running, save_adapters

NAMES = ("french", "formal", "code")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of the seedling, and things that must not be read."""
    base = tmp_path_factory.mktemp("adapters")
    made = base / "open"
    made.mkdir()
    save_adapters(made, NAMES)
    (base / "secret").mkdir()
    for path in (made / "french").iterdir():
        (base / "secret" / path.name).write_bytes(path.read_bytes())
    (made / "way-out").symlink_to(base / "secret")
    (made / "empty").mkdir()
    return made


@pytest.fixture(scope="module")
def serving(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    own = open_named("seedling", precision="float32")
    state = tmp_path_factory.mktemp("state")
    settings = Settings(token=TOKEN, port=0, adapters=folder, state=state)
    with running(serve_opened(own, settings, base="seedling", tokens=8192)) as listening:
        yield listening


@pytest.fixture
def loaded(serving: Running) -> Iterator[Running]:
    with serving.client() as client:
        for name in NAMES:
            answer = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
            assert answer.status_code == 200, answer.text
        yield serving
        for name in NAMES:
            if name in [each["id"] for each in client.get("/v1/models").json()["data"]]:
                assert client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200


def text(running_: Running, model: str, **more: Any) -> str:
    body = {"model": model, "prompt": "The ship left", "temperature": 0, "max_tokens": 16, **more}
    with running_.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def alone(folder: Path, *names: str) -> str:
    """What the base says with these adapters on it, and nothing else in the batch."""
    opened = open_named("seedling", precision="float32")
    for name in names:
        put_on(opened.model, folder / name, name=name)
    prompt = opened.prompt("The ship left", raw=True)
    [answer] = opened.engine.speak([prompt], Sampling(max_new_tokens=16, stop_ids=opened.stop_ids))
    return opened.text(answer.tokens)


def test_each_says_what_it_says_alone(loaded: Running, folder: Path) -> None:
    said = {name: text(loaded, name) for name in NAMES}
    assert said == {name: alone(folder, name) for name in NAMES}
    assert text(loaded, "seedling") == alone(folder)
    assert len({*said.values(), text(loaded, "seedling")}) == 4
    assert text(loaded, "seedling:french") == said["french"]
    with loaded.client() as client:
        models = client.get("/v1/models").json()["data"]
        limit = client.post("/tokenize", json={"prompt": "a"}).json()["max_model_len"]
    assert limit and {each["max_model_len"] for each in models} == {limit}
    cards = {each["id"]: each["parent"] for each in models}
    assert cards == {"seedling": None, **dict.fromkeys(NAMES, "seedling")}


def test_weights_of_llama_cpp(loaded: Running) -> None:
    with loaded.client() as client:
        listed = client.get("/lora-adapters").json()
        assert [each["path"] for each in listed] == list(NAMES) and not any(each["scale"] for each in listed)
        base, one = text(loaded, "seedling"), text(loaded, "formal")
        set_ = client.post("/lora-adapters", json=[{"id": 1, "scale": 1.0}])
        assert [each["scale"] for each in set_.json()] == [0, 1, 0]
        assert text(loaded, "seedling") == one
        assert text(loaded, "seedling", lora=[]) == base
        client.post("/lora-adapters", json=[])
        assert text(loaded, "seedling") == base
        half = text(loaded, "formal@0.5")
        assert text(loaded, "seedling", lora=[{"id": 1, "scale": 0.5}]) == half
        both = text(loaded, "french@0.5+code@0.5")
        assert text(loaded, "seedling", lora=[{"id": 0, "scale": 0.5}, {"id": 2, "scale": 0.5}]) == both
        assert client.post("/lora-adapters", json=[{"id": 9, "scale": 1}]).status_code == 404
        for twice in ({"model": "french@0.5+french"}, {"lora": [{"id": 0, "scale": 0.5}, {"id": 0, "scale": 1}]}):
            answer = client.post("/v1/completions", json={"model": "seedling", "prompt": "a", **twice})
            assert answer.status_code == 400 and "add its weights up" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    ["../secret", "way-out", "/etc", "open/../../secret", ".", "..", "", "empty", "french/adapter_config.json",
     "nothing", "french\0", "./french", "french/..", "x" * 2000],
)  # fmt: skip
def test_no_path_leads_out_of_the_declared_folder(serving: Running, folder: Path, path: str) -> None:
    path = str(folder.parent / "secret") if path == "/etc" else path
    with serving.client() as client:
        answer = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert answer.status_code in (400, 403), answer.text
        # Nobody learns where our folders are, nor is told of options of the command.
        assert str(folder) not in answer.text and "--help" not in answer.text
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["seedling"]


def test_an_absolute_path_below_the_folder_is_one_of_its_names(serving: Running, folder: Path) -> None:
    with serving.client() as client:
        body = {"lora_name": "there", "lora_path": str(folder / "french")}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "there"}).status_code == 200


def test_without_a_declared_folder_none_is_read(opened: Opened, folder: Path, tmp_path: Path) -> None:
    settings = Settings(token=TOKEN, port=0, state=tmp_path)
    with running(serve_opened(opened, settings, base="seedling", tokens=2048)) as closed, closed.client() as client:
        answer = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(folder / "french")})
        assert answer.status_code == 403 and "--adapters" in answer.json()["error"]["message"]


def test_names_are_kept_apart(loaded: Running) -> None:
    with loaded.client() as client:
        for name, path in (("french", "code"), ("seedling", "code")):
            body = {"lora_name": name, "lora_path": path}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 400
        before, other = text(loaded, "french"), text(loaded, "code")
        body = {"lora_name": "french", "lora_path": "empty", "load_inplace": True}
        failed = client.post("/v1/load_lora_adapter", json=body)
        assert failed.status_code == 400 and text(loaded, "french") == before, "what was served still is"
        body = {"lora_name": "seedling:code", "lora_path": "code"}
        assert "call it 'code'" in client.post("/v1/load_lora_adapter", json=body).json()["error"]["message"]
        body = {"lora_name": "french", "lora_path": "code", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert text(loaded, "french") == other != before
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "no"}).status_code == 404
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "french"}).status_code == 200
        gone = client.post("/v1/completions", json={"model": "french", "prompt": "x"})
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "not-served"


def test_a_damaged_adapter_is_told_and_harms_nobody(serving: Running, folder: Path) -> None:
    bad = folder / "bad"
    bad.mkdir(exist_ok=True)
    (bad / "adapter_config.json").write_text((folder / "french" / "adapter_config.json").read_text())
    (bad / "adapter_model.safetensors").write_bytes(os.urandom(64))
    with serving.client() as client:
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": "bad"}).status_code == 200
        answer = client.post("/v1/completions", json={"model": "bad", "prompt": "x"})
        assert answer.status_code == 400 and json.loads(answer.text)["error"]["code"] == "corrupt"
        assert str(folder) not in answer.text
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "bad"}).status_code == 200
    assert text(serving, "seedling")
