"""A run of several adapters: each as it would have come out alone, each proved, and bit for bit after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from luthier.core.errors import GateError, RecipeError
from luthier.recipes.schemas.several import load_several_recipe, names_several, several_of
from luthier.recipes.several import several
from tests.cli.commands import colour_rows, events, forked, luthier, step_events, wait_for_step

NAMES = ("french", "scaled", "prefix")
STEPS = {"french": 8, "scaled": 5, "prefix": 8}
RESULT = "adapter/adapter_model.safetensors"


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    made = {name: colour_rows(folder / f"{name}.jsonl") for name in NAMES}
    for number, path in enumerate(made.values()):
        lines = path.read_text("utf-8").splitlines()
        path.write_text("\n".join(lines[number:]) + "\n", "utf-8")
    return made


@pytest.fixture(scope="module")
def values(tiny_path: Callable[[str], Path], data: dict[str, Path]) -> dict[str, Any]:
    """Three unlike methods, of unlike length and rate."""
    return {
        "recipe": "several",
        "model": str(tiny_path("llama")),
        "adapters": {
            "french": {"data": {"train": str(data["french"])}, "adapter": {"method": "lora", "rank": 4}},
            "scaled": {"data": {"train": str(data["scaled"])}, "adapter": "ia3", "budget": {"steps": STEPS["scaled"]}},
            "prefix": {
                "data": {"train": str(data["prefix"])},
                "adapter": {"method": "prefix_tuning", "prefix_tokens": 3},
                "optimizer": {"learning_rate": 0.05},
            },
        },
        "optimizer": {"learning_rate": 0.01},
        "batch": {"rows": 4},
        "budget": {"steps": 8},
        "evaluation": {"fraction": 0.2, "every": 3, "prompts": 1, "max_new_tokens": 4},
        "checkpoint": {"every": 2},
        "precision": "float32",
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> Path:
    return written(tmp_path_factory.mktemp("recipe") / "several.yaml", values)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A finished, unbroken run. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "together"
    line = luthier("train", recipe, "--run", folder, "--json").must(0).json
    assert line["status"] == "finished" and line["steps"] == 8 and set(line["adapters"]) == set(NAMES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_adapter_comes_out_as_from_a_run_of_its_own(name: str, tmp_path: Path, together: Path) -> None:
    """Breaks when a step, a rate, a batch, a best checkpoint or a loss is that of another adapter, or of all."""
    own = yaml.safe_load((together / name / "recipe.yaml").read_text("utf-8"))
    alone = tmp_path / "alone"
    luthier("train", written(tmp_path / "alone.yaml", own | {"run": str(alone)}), "--json").must(0)
    found, expected = load_file(together / name / RESULT), load_file(alone / RESULT)
    assert found.keys() == expected.keys()
    off = torch.stack([(found[key] - tensor).norm() for key, tensor in expected.items()]).norm()
    size = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    assert float(off / size) <= 1e-6
    for key in ("steps", "tokens", "status", "trainable_parameters"):
        summaries = [json.loads((run / "summary.json").read_text("utf-8")) for run in (together / name, alone)]
        assert summaries[0][key] == summaries[1][key], key
    for key in ("first", "last", "eval", "eval_first", "best"):
        assert summaries[0]["loss"][key] == pytest.approx(summaries[1]["loss"][key], rel=1e-5), key
    assert summaries[0]["loss"]["best_step"] == summaries[1]["loss"]["best_step"]
    pairs = zip(step_events(together / name), step_events(alone), strict=True)
    for one, other in pairs:
        for key in ("step", "tokens", "trained_tokens", "learning_rate", "epoch"):
            assert one[key] == other[key]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_each_has_a_folder_a_proof_a_report_and_answers(together: Path) -> None:
    """Breaks when an adapter is left out of what a single run has."""
    for name in NAMES:
        own = together / name
        summary = json.loads((own / "summary.json").read_text("utf-8"))
        assert summary["steps"] == STEPS[name] and summary["proof"]["differs_from_start"]
        assert (own / "report.html").is_file() and (own / "adapter" / "adapter_config.json").is_file()
        told = luthier("eval", own, "--json").must(0).json
        assert told["tuned"]["loss"] == pytest.approx(summary["loss"]["eval"], rel=1e-5)
        luthier("eval", own, "--verify", "--json").must(0)
        luthier("generate", own, "--prompt", "the colour of 3 is", "--json").must(0)


def test_the_run_tells_of_all_and_of_each(together: Path) -> None:
    """Breaks when the losses of adapters are mixed, or the run of all cannot be listed, shown and asked about."""
    steps = step_events(together)
    assert [step["step"] for step in steps] == list(range(1, 9))
    for step in steps:
        going = {name for name in NAMES if step["step"] <= STEPS[name]}
        assert set(step["losses"]) == going
        own = {name: step_events(together / name)[step["step"] - 1] for name in going}
        assert step["losses"] == {name: each["loss"] for name, each in own.items()}
        assert step["tokens"] == sum(each["tokens"] for each in own.values())
    told = [event for event in events(together) if event["kind"] == "evaluation"]
    assert {event["adapter"] for event in told} == set(NAMES)
    assert luthier("run", "show", together, "--json").must(0).json["adapters"].keys() == set(NAMES)
    luthier("run", "show", together).must(0)
    (row,) = luthier("run", "list", together.parent, "--json").json["runs"]
    assert row["state"] == "finished"
    for command in (("eval", together), ("generate", together, "--prompt", "x")):
        luthier(*command).must(2, "is a run of several adapters", str(together / "french"))
    assert luthier("resume", together, "--json").must(0).json["status"] == "finished"
    memory = json.loads((together / "plan.json").read_text("utf-8"))
    alone = [plan["memory"] for plan in memory["adapters"].values()]
    assert max(one["total"] for one in alone) < memory["memory"]["total"] < sum(one["total"] for one in alone)


def same_run(folder: Path, unbroken: Path) -> None:
    """Results, states and losses are those of a run that never stopped."""
    for name in NAMES:
        for file in (RESULT, f"checkpoints/step-{STEPS[name]:06d}/state.safetensors", "samples.jsonl"):
            assert (folder / name / file).read_bytes() == (unbroken / name / file).read_bytes(), (name, file)
        assert step_events(folder / name) == step_events(unbroken / name)


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_killed_run_goes_on_bit_for_bit(at: int, tmp_path: Path, recipe: Path, together: Path) -> None:
    """Breaks when adapters go on from different steps: micro-batches would be cut otherwise, and round otherwise."""
    folder = tmp_path / "run"
    with forked("train", recipe, "--run", folder, out=tmp_path / "said", pause=0.05) as child:
        wait_for_step(folder / "french", at, child)
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    # By the same command, as by `luthier resume`.
    luthier("train", recipe, "--run", folder, "--json").must(0)
    same_run(folder, together)


def test_a_stopped_run_says_so_and_goes_on_bit_for_bit(tmp_path: Path, recipe: Path, together: Path) -> None:
    """Breaks when one adapter stops a step before another."""
    folder = tmp_path / "run"
    with forked("train", recipe, "--run", folder, "--json", out=tmp_path / "said", pause=0.1) as child:
        wait_for_step(folder / "french", 3, child)
        child.send_signal(signal.SIGINT)
        said = child.communicate()
    assert child.returncode == 75, said
    assert f"luthier resume {folder}" in said
    states = {name: luthier("run", "show", folder / name, "--json").json["state"] for name in NAMES}
    assert set(states.values()) == {"stopped"}
    assert len({step_events(folder / name)[-1]["step"] for name in NAMES}) == 1
    luthier("resume", folder, "--json").must(0)
    same_run(folder, together)


def test_adapters_whose_newest_checkpoints_differ_go_on_from_one_that_all_have(
    tmp_path: Path, recipe: Path, together: Path
) -> None:
    """Breaks when a kill between the saves of two adapters, or a damaged file, leaves them at different steps."""
    folder = tmp_path / "run"
    with forked("train", recipe, "--run", folder, out=tmp_path / "said", pause=0.1) as child:
        wait_for_step(folder / "french", 5, child)
        child.kill()
        child.communicate()
    steps = sorted((folder / "prefix" / "checkpoints").glob("step-*"))
    (steps[-1] / "state.safetensors").write_bytes(b"damaged")
    luthier("resume", folder, "--json").must(0)
    same_run(folder, together)


def test_one_of_several_is_not_gone_on_with_alone(tmp_path: Path, recipe: Path) -> None:
    """Breaks when an adapter's run is resumed without the others, so that its micro-batches are cut otherwise."""
    folder = tmp_path / "run"
    with forked("train", recipe, "--run", folder, out=tmp_path / "said", pause=0.1) as child:
        wait_for_step(folder / "french", 4, child)
        child.kill()
        child.communicate()
    luthier("resume", folder / "french").must(77, "together:")


def test_an_adapter_that_cannot_be_a_result_keeps_none_from_it(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when the first failure at the end leaves the other adapters unsaved or unproved."""
    real = several.save

    def failing(ending: Any) -> None:
        if ending.bench.attachment.name == "french":
            raise GateError("no result", do="look")
        real(ending)

    monkeypatch.setattr(several, "save", failing)
    folder = tmp_path / "run"
    luthier("train", recipe, "--run", folder).must(GateError.exit_code, "french: no result")
    states = {name: luthier("run", "show", folder / name, "--json").json["state"] for name in NAMES}
    assert states == {"french": "failed", "scaled": "finished", "prefix": "finished"}
    monkeypatch.undo()
    luthier("resume", folder, "--json").must(0)
    assert luthier("run", "show", folder / "french", "--json").json["state"] == "finished"


def test_a_dry_run_shows_every_adapter_and_makes_nothing(tmp_path: Path, recipe: Path) -> None:
    plan = luthier("train", recipe, "--run", tmp_path / "run", "--dry-run", "--json").must(0).json
    assert set(plan["plan"]) == set(NAMES) and plan["recipe"]["adapters"]["scaled"]["adapter"]["method"] == "ia3"
    luthier("train", recipe, "--run", tmp_path / "run", "--dry-run").must(0)
    assert not (tmp_path / "run").exists()


def test_what_is_for_all_is_what_an_adapter_does_not_have_otherwise(tmp_path: Path, values: dict[str, Any]) -> None:
    """Breaks when a shared key is lost, or the knobs of a shared method reach an adapter of another method."""
    shared = values | {"adapter": {"method": "lora", "rank": 7}}
    shared["adapters"] = {**values["adapters"], "plain": {"data": "rows.jsonl"}}
    path = written(tmp_path / "recipe.yaml", shared)
    assert names_several(path)
    found = load_several_recipe(path, overrides=["adapters.plain.seed=5", "optimizer.weight_decay=0.2"]).adapters
    assert found["plain"].adapter.as_recipe()["rank"] == 7 and found["french"].adapter.as_recipe()["rank"] == 4
    assert found["scaled"].adapter.method_name() == "ia3" and found["plain"].data.train == "rows.jsonl"
    assert (found["plain"].seed, found["french"].seed) == (5, 0)
    assert [each.optimizer.peak_learning_rate for each in found.values()] == [0.01, 0.01, 0.05, 0.01]
    assert all(each.optimizer.as_recipe()["weight_decay"] == 0.2 for each in found.values())
    whole = load_several_recipe(path)
    assert several_of(whole.as_written()) == whole


ERRORS = {
    "a method that trains the base": ({"whole": {"data": "a", "adapter": "full"}}, "trains the model's own weights"),
    "a name that is no folder": ({"A/B": {"data": "a"}}, "cannot name an adapter"),
    "a name that the run has itself": ({"checkpoints": {"data": "a"}}, "cannot name an adapter"),
    "a key that is for all": ({"two": {"data": "a", "model": "b"}}, "write model beside adapters"),
    "a key that nobody knows": ({"two": {"data": "a", "dota": "b"}}, "adapters.two.dota is unknown"),
    "no data": ({"two": {}}, "data is missing"),
    "no mapping": ({"two": "lora"}, "keys such as data and adapter"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_adapter_and_the_place(name: str, tmp_path: Path, values: dict[str, Any]) -> None:
    more, said = ERRORS[name]
    path = written(tmp_path / "recipe.yaml", values | {"adapters": {**values["adapters"], **more}})
    with pytest.raises(RecipeError) as caught:
        load_several_recipe(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_other_errors_of_a_recipe(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="names, and below each"):
        several_of(values | {"adapters": {}})
    with pytest.raises(RecipeError, match="at least 2 for several"):
        several_of(values | {"checkpoint": {"keep": 1}})
    with pytest.raises(RecipeError, match="beside adapters"):
        several_of(values | {"recipe": "finetune"})
    text = yaml.safe_dump(values).replace("  scaled:", "  french:")
    (tmp_path / "twice.yaml").write_text(text, "utf-8")
    with pytest.raises(RecipeError, match="french"):
        load_several_recipe(tmp_path / "twice.yaml")
