"""A run goes to an engine that runs already: to our own server, which speaks as vLLM does, and to stand-ins."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.model.files.adapter_config import CONFIG
from luthier.recipes.exporting import questions
from luthier.recipes.exporting.hand_over import Wanted, texts_of
from luthier.recipes.opening.opened import open_named
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from tests.adapters_of import rescaled
from tests.cli.commands import luthier
from tests.engines import Foreign, foreign
from tests.server.fakes import TOKEN, Running, running


@pytest.fixture(scope="module")
def server(llama: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(token=TOKEN, port=0, adapters=finished, state=tmp_path_factory.mktemp("state"))
    own = open_named(str(llama), precision="float32")
    with running(serve_opened(own, settings, base="base", tokens=4096)) as listening:
        yield listening


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("LUTHIER_ENGINE_TOKEN", TOKEN)
    if "rows_of_the_run" not in request.node.name:
        monkeypatch.setattr(questions, "PROMPTS", 2)


def names(server: Running) -> list[str]:
    with server.client() as client:
        return [each["id"] for each in client.get("/v1/models").json()["data"]]


def test_our_own_server_takes_it_and_is_proved(server: Running, finished: Path) -> None:
    command = ("serve", finished, "--engine", "vllm", "--url", server.url)
    told = luthier(*command, "--json").must(0).json
    assert told["model"] == "finished" and told["loaded"] and told["request"] == {"model": "finished"}
    sync = told["sync"]
    assert sync["fine"] and sync["apart"]["worst"] < 1e-3 and sync["share"] == pytest.approx(1, abs=0.01)
    assert sync["tokens"] > 40 and names(server) == ["base", "finished"]
    again = luthier(*command).must(0)
    assert "was there already" in again.out and TOKEN not in again.out + again.err
    # The line that was told works as it is.
    line = next(line for line in again.out.splitlines() if line.startswith("curl "))
    line = line.replace("curl", "curl -s", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"] == "finished"


def test_a_name_and_a_path_of_its_own(server: Running, finished: Path) -> None:
    command = ("serve", finished, "--engine", "vllm", "--url", server.url + "/v1", "--as", "mine", "--path", "adapter")
    assert "computes mine as we do" in luthier(*command).must(0).out and "mine" in names(server)
    luthier("serve", finished, "--engine", "vllm", "--url", server.url, "--as", "x", "--path", "nowhere").must(
        69, "nowhere", "--path"
    )


def test_a_model_without_an_adapter_is_probed(server: Running, llama: Path) -> None:
    told = luthier("serve", llama, "--engine", "vllm", "--url", server.url, "--as", "base", "--json").must(0).json
    assert told["model"] == "base" and not told["loaded"] and told["sync"]["share"] is None
    luthier("serve", llama, "--engine", "vllm", "--url", server.url, "--as", "gpt").must(2, "gpt", "--as")


def test_what_lies_under_the_name_already_is_not_taken_on_trust(
    server: Running, finished: Path, tmp_path: Path
) -> None:
    """Breaks when the weights of an earlier run pass for this one's because they have its name."""
    stale = rescaled(finished / "adapter", 0.25, tmp_path / "stale")
    place = finished / "stale"
    shutil.copytree(stale, place)
    try:
        with server.client() as client:
            body = {"lora_name": "taken", "lora_path": "stale"}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        command = ("serve", finished, "--engine", "vllm", "--url", server.url, "--as", "taken", "--path", "adapter")
        luthier(*command).must(78, "lora_alpha")
        assert "taken" in names(server), "what others loaded is left to them"
        assert luthier(*command, "--replace", "--json").must(0).json["loaded"]
    finally:
        shutil.rmtree(place)


def test_a_server_of_another_base_does_not_keep_it(finished: Path, llama: Path, tmp_path: Path) -> None:
    own = open_named(str(llama), precision="float32")
    noise = torch.Generator().manual_seed(3)
    for each in own.model.module.parameters():
        each.data += 0.3 * each.data.std() * torch.randn(each.shape, generator=noise)
    base = {"": own, "finished": own}
    with foreign(Foreign("vllm", base)) as engine:
        luthier("serve", finished, "--engine", "vllm", "--url", engine.url).must(78, "its base is not ours")
        assert not engine.loaded


@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=pytest.mark.slow), "sglang", "llama.cpp"])
def test_each_engine_in_its_dialect(kind: str, finished: Path, llama: Path) -> None:
    models = {"": open_named(str(llama), precision="float32"), "finished": open_named(str(finished))}
    engine = Foreign(kind, models, loaded=["finished"] if kind == "llama.cpp" else [], token=TOKEN)
    with foreign(engine):
        command = ("serve", finished, "--engine", kind, "--url", engine.url)
        told = luthier(*command, "--json").must(0).json
        assert told["engine"] == kind and told["sync"]["fine"] and engine.loaded == ["finished"]
        if kind == "llama.cpp":
            assert told["request"] == {"lora": [{"id": 0, "scale": 1.0}]}
            engine.loaded = []
            luthier(*command).must(69, "--lora finished.gguf")
        else:
            engine.loaded, engine.takes_adapters = [], False
            luthier(*command).must(69, "--enable-lora")


@pytest.mark.slow
def test_an_engine_that_ignores_it_is_told_from_one_that_rounds(finished: Path, llama: Path) -> None:
    base = open_named(str(llama), precision="float32")
    with foreign(Foreign("vllm", {"": base, "finished": base})) as engine:
        luthier("serve", finished, "--engine", "vllm", "--url", engine.url).must(78, "ignores the adapter")
        assert not engine.loaded, "nobody finds the base under the name of the run"


def test_what_the_engine_takes_amiss_is_told_before_anything_is_sent(finished: Path, tmp_path: Path) -> None:
    adapter = rescaled(finished / "adapter", 1.0, tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "use_rslora": True}))
    with foreign(Foreign("sglang", {})) as engine:
        luthier("serve", "base", "--adapter", adapter, "--engine", "sglang", "--url", engine.url).must(78, "scale")
        assert not engine.asked
        luthier("serve", finished, "--engine", "vllm", "--url", engine.url, "--max-rank", "1").must(78, "rank")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--engine", "vllm"], 2, "both or none"), (["--url", "http://127.0.0.1:9"], 2, "both or none"),
        (["--engine", "tgi", "--url", "http://127.0.0.1:9"], 2, "vllm, luthier, sglang, llama.cpp"),
        (["--engine", "vllm", "--url", "127.0.0.1:9"], 2, "http(s)://HOST:PORT"),
        (["--engine", "vllm", "--url", "http://10.9.8.7:8000"], 77, "in the clear"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:9"], 69, "cannot be asked"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:9", "--port", "8000"], 2, "--port goes with"),
        (["--as", "x"], 2, "--as goes with --engine"), (["--max-rank", "8"], 2, "--max-rank goes with --engine"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for(words: list[str], code: int, told: str, finished: Path) -> None:
    said = luthier("serve", finished, *words).must(code, told)
    assert TOKEN not in said.err + said.out


def test_rows_of_the_run_are_compared(finished: Path, llama: Path) -> None:
    opened: Any = open_named(str(finished))
    held = texts_of(Wanted(name=str(finished)), opened, print)
    assert 1 <= len(held) <= 8 and all(len(text) > 4 for text in held)
    plain = texts_of(Wanted(name=str(llama)), open_named(str(llama)), print)
    assert len(plain) == 4 and all(len(text) <= 64 for text in plain)
