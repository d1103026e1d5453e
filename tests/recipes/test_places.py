"""A run begun with relative paths is evaluated, asked and resumed from any folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from luthier.core.knobs import validate
from luthier.recipes.opening.places import located
from luthier.recipes.opening.results import model_from, started_in, template_from
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.store.runs import RunDirectory
from tests.cli.commands import colour_rows, luthier, recipe_text
from tests.store.made import created

TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


@pytest.fixture
def begun(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of relative paths whose last steps are gone, seen from another folder."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    shutil.copytree(llama, home / "models" / "tiny")
    colour_rows(home / "rows-1.jsonl")
    (home / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    text = recipe_text(Path("models/tiny"), Path("rows-*.jsonl")).replace("data:\n", "data:\n  template: own.jinja\n")
    (home / "own.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(home)
    luthier("train", "own.yaml", "--run", "run", "--json").must(0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home / "run"


def test_every_verb_finds_data_model_and_template_from_elsewhere(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ("generate", Path("..", "home", "run"), "--prompt", "the colour of 3 is", "--json")
    said, found = luthier(*prompt).must(0).json, luthier("eval", "../home/run", "--json").must(0).json
    result = {path.name: path.read_bytes() for path in (begun / "adapter").iterdir()}
    assert str(begun.parent).encode() not in b"".join(result.values())
    # The last checkpoint and the result are lost: the run goes on from the one before, to the same files.
    shutil.rmtree(begun / "adapter")
    shutil.rmtree(begun / "checkpoints" / "step-000008")
    RunDirectory.open(begun).write_status("stopped")
    assert "it would go on from" in luthier("resume", begun, "--dry-run").must(0).out
    luthier("resume", begun, "--json").must(0, "going on after step")
    assert {path.name: path.read_bytes() for path in (begun / "adapter").iterdir()} == result
    monkeypatch.chdir(begun.parent)
    assert luthier("generate", "run", *prompt[2:]).json == said
    assert luthier("eval", "run", "--json").json == {**found, "run": "run"}


def test_only_what_is_a_path_there_is_moved(tmp_path: Path) -> None:
    folder = tmp_path / "[a]"
    (folder / "m").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "own.jinja"):
        (folder / name).write_text("x", encoding="utf-8")
    assert model_from("fresh:m", folder) == f"fresh:{folder}/m" and model_from("m", folder) == f"{folder}/m"
    for name in ("seedling", "fresh:seedling", "owner/name", str(folder / "m")):
        assert model_from(name, folder) == name
    assert model_from("m", None) == "m"
    assert template_from("own.jinja", folder) == f"{folder}/own.jinja" and template_from("auto", folder) == "auto"
    values = {"model": "m", "data": ["a.jsonl#5", "*.jsonl", "none.jsonl", str(folder / "b.jsonl")]}
    recipe = validate(FinetuneRecipe, values)
    found = located(recipe, folder)
    assert found.data.train == (
        f"{folder}/a.jsonl#5", f"{tmp_path}/[[]a]/*.jsonl", f"{folder}/none.jsonl", f"{folder}/b.jsonl"
    )  # fmt: skip
    assert located(recipe, None) is recipe and located(recipe, Path.cwd()) is recipe


def test_what_is_only_here_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text("x", encoding="utf-8")
    recipe = validate(FinetuneRecipe, {"model": "x/y", "data": "here.jsonl"})
    (tmp_path / "there").mkdir()
    assert located(recipe, tmp_path / "there").data.train == "here.jsonl"


def test_a_run_that_does_not_say_where_it_began_is_read_from_here(tmp_path: Path) -> None:
    run = created(tmp_path / "run")
    assert started_in(run) is None
    run.write_environment({"folder": str(tmp_path / "gone")})
    assert started_in(run) is None
    run.write_environment({"folder": os.fspath(tmp_path)})
    assert started_in(run) == tmp_path
