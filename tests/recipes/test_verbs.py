"""The calls beside `luthier.finetune`: what they give back is what the commands print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier
from luthier.api import Run
from luthier.core.errors import GateError, LuthierError, RecipeError, StorageError
from luthier.recipes.comparing.compare import Measures
from tests.adapters_of import adapter_folder
from tests.cli.commands import luthier as command
from tests.cli.commands import tree


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return Run(finished, {})


def test_a_run_is_evaluated_and_probed_as_by_the_commands(run: Run, tmp_path: Path) -> None:
    """Breaks when a call computes something else than its command, or does not take what `finetune` gives back."""
    found = luthier.evaluate(run)
    assert found.figures == command("eval", run.path, "--json").must(0).json
    assert found.tuned["loss"] < found.base["loss"]
    drift = luthier.Drift(rows=2)
    told = luthier.probe(run, probes=[drift, "effective_rank"], report=tmp_path / "a", quiet=True)
    words = ("--probe", "drift", "--probe", "effective_rank", "--set", "drift.rows=2", "--json")
    said = command("probe", run.path, *words, "--report", tmp_path / "a").must(0).json
    assert told.figures == said and list(told.reports) == ["drift", "effective_rank"] and told.page.is_file()


def test_intruders_are_scaled_by_a_call(llama: Path, tmp_path: Path) -> None:
    """Breaks when the knobs of the sweep are lost, or the adapter is not written."""
    adapter = adapter_folder(llama, tmp_path / "strong", std=0.4)
    (tmp_path / "old.txt").write_text("the rain in spain stays mainly in the plain. " * 4, "utf-8")
    found = luthier.probe(
        before=llama, after=adapter, keep=[tmp_path / "old.txt"], mitigate={"factors": [0.5], "k": 2},
        out=tmp_path / "less", report=tmp_path / "told", quiet=True,
    )  # fmt: skip
    assert found.reports["mitigation"]["knobs"]["k"] == 2 and (tmp_path / "less" / "adapter_config.json").is_file()
    both = luthier.merge_adapters([adapter, tmp_path / "less"], tmp_path / "both", weights=[0.5, 0.5])
    assert both.folder == tmp_path / "both" and both.figures["rank"] > 4


def test_a_run_is_exported_and_merged_with_its_base(
    run: Run, llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks when a call writes another model than its command, or the gate of a merge is not asked."""
    whole = luthier.export(run, tmp_path / "whole", to=luthier.Merged(precision="float32"))
    assert whole.parity["passed"] and "asking the source ..." in capsys.readouterr().err
    knobs = {"dtype": "float32"}
    merged = luthier.merge_models(
        [whole.folder, llama], tmp_path / "merged", method={"method": "linear"}, weights=[0.75, 0.25], data=rows,
        allow_worse=True, settings=knobs,
    )  # fmt: skip
    words = ("--method", "linear", "--weight", "0.75", "--weight", "0.25", "--set", "dtype=float32", "--quiet")
    command("merge", whole.folder, llama, *words, "--out", tmp_path / "again", "--json").must(0)
    weights = [name for name in tree(tmp_path / "again") if name.endswith(".safetensors")]
    assert weights and all(
        (merged.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in weights
    )
    assert merged.evaluation is not None and merged.evaluation["measure"] == "likelihood"
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(json.dumps({"models": [str(whole.folder), str(llama)], "method": {"method": "slerp", "t": 1.0}}))
    with pytest.raises(GateError, match="its parent"):
        luthier.merge_models(recipe, tmp_path / "worse", data=rows, settings=knobs)
    assert not (tmp_path / "worse").exists()


def test_plans_are_those_of_the_command(llama: Path, recipe: Path) -> None:
    """Breaks when a call plans something else than its command."""
    config, rates = llama / "config.json", {"tflops": 1.0, "bandwidth": 10.0}
    words = ("plan", "--model-config", config, "--tflops", 1, "--bandwidth", 10, "--memory", "1GB", "--json")
    settings = {"sequence": 64, "adapter.rank": 2, "device": "cpu"}
    found = luthier.plan_training(config, method="qlora", settings=settings, memory="1GB", **rates)
    sets = ("--method", "qlora", "--sequence", 64, "--set", "adapter.rank=2", "--device", "cpu")
    assert found.figures == command(*words, *sets).must(0).json and found.fits is True
    answering = luthier.plan_inference(config.parent, clients=3, context=100, memory=1e9, **rates)
    assert answering.figures == command(*words, "--inference", "--clients", 3, "--context", 100).must(0).json
    planned = luthier.plan(recipe, settings={"adapter.rank": 2})
    assert 0 < planned.parameters["trained"] < luthier.plan(recipe).parameters["trained"]


def test_wrong_arguments_are_errors_that_python_knows(run: Run, llama: Path, tmp_path: Path) -> None:
    """Breaks when a call fails with a traceback of ours, or leaves something behind."""
    with pytest.raises(StorageError, match="is no run"):
        luthier.evaluate(tmp_path)
    with pytest.raises(RecipeError, match="not clear"):
        luthier.probe(run, before=llama)
    with pytest.raises(RecipeError, match="drift"):
        luthier.probe(run, probes=["drfit"])
    with pytest.raises(RecipeError, match="factors"):
        luthier.probe(run, mitigate=[11.0])
    with pytest.raises(RecipeError, match="nothing to ask"):
        luthier.merge_models([llama, llama], tmp_path / "out", metric="bleu")
    with pytest.raises(RecipeError, match="1 weights for 2 models"):
        luthier.merge_models([llama, llama], tmp_path / "out", weights=[1.0])
    with pytest.raises(LuthierError, match="merged"):
        luthier.export(run, tmp_path / "out", to="mergd")
    with pytest.raises(RecipeError, match="lorra"):
        luthier.compare(["lorra"], model=llama, data=run.path / "recipe.yaml", run=tmp_path / "out")
    with pytest.raises(RecipeError, match="efficiency 2"):
        luthier.plan_training(llama, efficiency=2.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_methods_are_compared_by_a_call(llama: Path, rows: Path, tmp_path: Path) -> None:
    """Breaks when a method is not trained, or its result is not under its name."""
    few = {"budget.steps": 1, "batch.rows": 4, "evaluation.fraction": 0.2, "evaluation.prompts": 0}
    found = luthier.compare(
        ["lora", "ia3"], model=llama, data=rows, run=tmp_path / "out", settings=few, measures=Measures(), quiet=True
    )
    assert list(found.methods) == ["lora", "ia3"] and not any("error" in each for each in found.methods.values())
