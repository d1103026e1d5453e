"""Every snippet of README, CONTRIBUTING and docs/ is run or parsed.

So that this takes seconds, a tiny model with random weights stands in for `seedling` and for every hub model: the
pages are tested for whether they work, not for how good the models get.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from safetensors.torch import load_file, save_file

from luthier.cli.main import run
from luthier.core.errors import SandboxUnavailableError
from luthier.core.knobs import validate
from luthier.model.files import sources
from luthier.recipes.comparing import compare as comparing
from luthier.recipes.domain_adaptation import AdaptationRecipe, stage_recipes
from luthier.recipes.merging.mergekit import translated
from luthier.recipes.merging.recipe import MergeRecipe
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.recipes.schemas.several import several_of
from luthier.server import jobs, opening
from luthier.server.opening import open_serving
from luthier.server.serving import Serving
from tests.children import forked_child
from tests.docs.snippets import (
    BOTH,
    ENCODER,
    HUB,
    NOT_RUN,
    PAGES,
    Command,
    bash,
    commands,
    snippets,
    there,
    with_stand_ins,
)
from tests.task_folders import bert_folder, t5_folder
from tests.tiny import SPECIALS

_SOURCES = sources.__file__
LANGUAGES = {"bash", "python", "yaml", "json", "console", "text"}


@pytest.fixture
def stand_in(tiny_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> Path:
    """A tiny model, which stands for `seedling` while the test runs. As one that was trained it soon ends its texts."""
    package = tmp_path_factory.mktemp("package")
    (package / "assets").mkdir()
    folder = package / "assets" / "seedling"
    shutil.copytree(tiny_path("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    # Random weights would go on to the last token that a page allows. So in a third of all places the end is likeliest.
    tensors["lm_head.weight"][SPECIALS.index("<|end|>")] *= 6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # `seedling` is looked for beside the file that loads models.
    monkeypatch.setattr(sources, "__file__", str(package / "model" / "files" / "sources.py"))
    return folder


@pytest.mark.timeout(600)  # one page trains, in a process of its own
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_works(
    page: Path, stand_in: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> None:
    models = dict.fromkeys(HUB, stand_in)
    if "luthier serve" in page.read_text("utf-8"):
        # A fine-tune is a process of its own, in which nothing stands for the seedling.
        monkeypatch.setattr(sources, "__file__", _SOURCES)
        models["8000"] = _serving(monkeypatch, request)
    if ENCODER in page.read_text("utf-8"):
        parent = tmp_path_factory.mktemp("others")
        models |= {ENCODER: bert_folder(parent / "bert"), BOTH: t5_folder(parent / "t5")}
    # A comparison has a process for each method, in which nothing stands for the seedling either.
    for module in (comparing, jobs):
        monkeypatch.setattr(module, "start_child", forked_child)
    monkeypatch.chdir(tmp_path)
    said = ""
    for snippet in snippets(page):
        where = f"{page.name}:{snippet.line}"
        assert snippet.language in LANGUAGES, f"{where}: a snippet needs one of {', '.join(sorted(LANGUAGES))}"
        text = with_stand_ins(snippet.text, models)
        if snippet.language == "bash":
            for command in commands(text):
                said += _run(command, where, tmp_path, capsys)
        elif snippet.language == "python":
            try:
                exec(compile(text, where, "exec"), {"__name__": "__page__"})
            except SandboxUnavailableError as failure:
                pytest.skip(f"{where}: {failure}")
        elif snippet.language == "yaml":
            _check_recipe(text)
        elif snippet.language == "json":
            json.loads(text)
        elif snippet.language == "console":
            shapes = {_shape(line) for line in said.splitlines()}
            missing = [line for line in text.splitlines() if line not in said and _shape(line) not in shapes]
            assert not missing, f"{where}: nothing printed {missing}; what was printed:\n{said}"


def test_a_snippet_that_fails_is_seen(tmp_path: Path, capsys: Any) -> None:
    [wrong, here] = commands("luthier describe lorra   # exit 0\ncat > a.txt <<'END'\nx\nEND\n")
    with pytest.raises(AssertionError, match="exit code 2"):
        _run(wrong, "page:1", tmp_path, capsys)
    _run(here, "page:2", tmp_path, capsys)
    assert (tmp_path / "a.txt").read_text() == "x\n"


def _run(command: Command, where: str, folder: Path, capsys: Any) -> str:
    if command.words[0] in NOT_RUN:
        there(command)
        return ""
    if command.words[0] != "luthier":
        return bash(command, folder)
    if command.words[1] == "serve" and "--engine" not in command.words:
        return _served(command)
    capsys.readouterr()
    code = run(command.words[1:])
    printed = capsys.readouterr()
    assert code == command.expected, f"{where}: {command.text}\nexit code {code}\n{printed.err}"
    # Lines that a narrow console wrapped are joined, so that pages can show them whole.
    return re.sub(r" *\n", "\n", printed.out + printed.err)


def _serving(monkeypatch: Any, request: pytest.FixtureRequest) -> Path:
    """What `luthier serve` of a page needs: a token, a port that is free, and an end. The port is what is returned."""
    monkeypatch.setenv("LUTHIER_TOKEN", "my-own-token")
    monkeypatch.setenv("LUTHIER_ENGINE_TOKEN", "my-own-token")
    made: list[Serving] = []

    def noted(*arguments: Any, **more: Any) -> Serving:
        made.append(open_serving(*arguments, **more))
        return made[-1]

    def end() -> None:
        for serving in made:
            serving.worker.loop.call_soon_threadsafe(serving.worker.on_end)

    monkeypatch.setattr(opening, "open_serving", noted)
    request.addfinalizer(end)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Path(str(free.getsockname()[1]))


def _served(command: Command) -> str:
    """Let it serve in a thread until the page ends."""
    words = command.words
    port = words[words.index("--port") + 1]
    threading.Thread(target=run, args=(words[1:],), daemon=True).start()
    latest = time.monotonic() + 60
    while time.monotonic() < latest:
        try:
            assert httpx2.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
            return ""
        except httpx2.ConnectError:
            time.sleep(0.1)
    raise AssertionError(f"{command.text} does not answer")


def _shape(line: str) -> str:
    """A line without its figures: the stand-in has others than the model that a page shows."""
    return re.sub(r"\b[0-9a-f]{12}\b|\b\d[\d,.]*( ?[kMGT]?B\b)?", "#", line)


def _check_recipe(text: str) -> None:
    """A recipe, or a part of one, fits the schema."""
    values = yaml.safe_load(text)
    if "merge_method" in values or values.get("recipe") == "merge":
        validate(MergeRecipe, translated(values)[0] if "merge_method" in values else values)
        return
    if values.get("recipe") == "domain_adaptation":
        stage_recipes(validate(AdaptationRecipe, values))
        return
    if "adapters" in values:
        several_of({"model": "seedling", **values})
        return
    validate(kind_of_recipe(values), {"model": "seedling", "data": "rows.jsonl", **values})
