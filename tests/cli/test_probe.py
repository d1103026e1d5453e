"""`luthier probe`: a run, two folders, an adapter; what it writes, and that mitigation is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.model.load import load_model, state_digest
from luthier.recipes.opening.opened import open_named
from luthier.recipes.probing.mitigate import Scaling, mitigate
from luthier.recipes.probing.probed import probed_folders
from luthier.recipes.progress import Silent
from tests.adapters_of import adapter_folder
from tests.cli.commands import luthier, tree
from tests.tiny import tiny_model, tiny_tokenizer

FACTORS = (1.0, 0.5, 0.0)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "old.txt"
    path.write_text("the rain in spain stays mainly in the plain. " * 12, "utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is strong enough to have intruders."""
    return adapter_folder(llama, tmp_path_factory.mktemp("adapters") / "strong", std=0.4)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model whose weights are not the base's."""
    folder, model = tmp_path_factory.mktemp("models") / "tuned", tiny_model("llama")
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    model.save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def test_a_run_is_looked_at_with_what_costs_little(finished: Path, kept: Path, tmp_path: Path) -> None:
    """Breaks when a probe is left out without a word, the JSON differs from the files, the run is changed, or what may
    be lost is not told first."""
    before = tree(finished)
    found = luthier("probe", finished, "--keep", kept, "--report", tmp_path / "told", "--json").must(0).json
    assert tree(finished) == before
    assert set(found["probes"]) | set(found["left_out"]) == set(catalog.names("probes"))
    assert set(found["left_out"]) == {"attention", "gradient_noise"}
    assert list(found["probes"]) == [
        "forgetting", "intruder_dimensions", "drift", "effective_rank", "spectrum", "alpha_rank"
    ]  # fmt: skip
    for name, report in found["probes"].items():
        held = json.loads((tmp_path / "told" / f"{name}.json").read_text())
        assert held == {"before": found["before"], "after": found["after"], **report} and report["measured"]
    losses = found["probes"]["forgetting"]["numbers"]
    told = luthier("eval", finished, "--json").must(0).json
    assert losses["held-out rows_before"] == pytest.approx(told["base"]["loss"], rel=1e-4)
    assert losses["held-out rows_after"] == pytest.approx(told["tuned"]["loss"], rel=1e-4)
    assert losses["old.txt_before"] > 0
    assert "What tuning did" in (tmp_path / "told" / "probes.html").read_text()


def test_costly_ones_are_made_by_name_and_join_the_page(finished: Path, tmp_path: Path) -> None:
    """Breaks when a probe cannot be asked for, its knobs are not heard, or the page forgets earlier ones."""
    folder = tmp_path / "told"
    said = luthier("probe", finished, "--probe", "drift", "--report", folder).must(0)
    assert said.out.startswith("drift\n  Matrices moved")
    some = ("--probe", "attention", "--probe", "gradient_noise", "--set", "gradient_noise.micro_batches=6")
    found = luthier("probe", finished, *some, "--report", folder, "--json").must(0).json
    assert found["probes"]["gradient_noise"]["numbers"]["micro_batches"] == 6
    assert found["probes"]["attention"]["measured"]
    # A report of a probe that is gone, such as one of a package that was taken away, stays on the page, at its end.
    gone = json.loads((folder / "drift.json").read_text()) | {"probe": "aura", "verdict": ["It glows."]}
    (folder / "aura.json").write_text(json.dumps(gone))
    luthier("probe", finished, "--probe", "drift", "--report", folder).must(0)
    page = (folder / "probes.html").read_text()
    # In the order of all probes, whichever was made first.
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Attention", "Drift", "Gradient noise", "Aura"]


def test_two_folders_and_an_adapter_are_pairs_too(llama: Path, tuned: Path, adapter: Path, tmp_path: Path) -> None:
    """Breaks when what is compared is not what was named."""
    one = ("--before", llama, "--report", tmp_path / "a", "--probe", "drift", "--json")
    whole = luthier("probe", "--after", tuned, *one).must(0).json["probes"]["drift"]
    base, other = load_model(str(llama), precision="float32"), load_model(str(tuned), precision="float32")
    moved = {site.name: float((there.weight() - site.weight()).norm() / site.weight().norm())
             for site, there in zip(base.sites, other.sites, strict=True) if site.is_linear}  # fmt: skip
    assert whole["numbers"]["largest_relative_change"] == pytest.approx(max(moved.values()), rel=1e-4)
    low = luthier("probe", "--after", adapter, *one[:3], tmp_path / "b", *one[4:]).must(0).json["probes"]["drift"]
    assert low["numbers"]["changed_matrices"] == 14
    same = luthier("probe", "--after", llama, *one[:3], tmp_path / "c", *one[4:]).must(0).json["probes"]["drift"]
    assert "No weight differs" in same["verdict"][0]


@pytest.mark.parametrize("kind", ["adapter", "tuned"])
def test_mitigation_is_measured_beside_a_control_and_leaves_the_model(
    kind: str, llama: Path, kept: Path, request: pytest.FixtureRequest
) -> None:
    """Breaks when lambda 1 changes anything, the control has another norm, or a weight is not put back."""
    probed = probed_folders(str(llama), str(request.getfixturevalue(kind)), [str(kept)], recorder=Silent())
    with probed.pair.after() as model:
        digest, loss = state_digest(model.module), probed.pair.texts[0].loss(model)
    report = mitigate(probed, Scaling(factors=FACTORS, epsilon=0.7))
    assert state_digest(probed.opened.model.module) == digest and report.numbers["intruders"]
    rows = {(row[0], row[1]): row[2:] for row in report.tables[0].rows}
    for what in ("intruders scaled", "whole change scaled"):
        assert rows[what, 1.0] == [pytest.approx(1.0, abs=1e-4), pytest.approx(loss, abs=1e-4)]
    assert rows["intruders scaled", 0.0][1] != pytest.approx(loss, abs=1e-4)
    assert rows["intruders scaled", 0.5][0] == rows["whole change scaled", 0.5][0]
    assert rows["before tuning", None][2 - 1] == pytest.approx(
        open_and_ask(str(llama), probed.pair.texts[0].loss), abs=1e-4
    )


def open_and_ask(name: str, loss: object) -> float:
    return loss(open_named(name, precision="float32").model)  # type: ignore[operator, no-any-return]


def test_the_written_adapter_is_the_mitigated_one(llama: Path, adapter: Path, kept: Path, tmp_path: Path) -> None:
    """Breaks when the file holds another lambda, a scale is applied twice, or the change is no longer exact."""
    out = tmp_path / "less"
    common = ("--before", llama, "--keep", kept, "--report", tmp_path / "told", "--json")
    found = luthier("probe", "--after", adapter, *common, "--mitigate", "0.25", "--out", out).must(0).json
    report = found["probes"]["mitigation"]
    assert found["out"] == str(out) and report["numbers"]["intruders"] > 0
    row = next(row for row in report["tables"][0]["rows"] if row[0] == "intruders scaled")
    after = luthier("probe", "--after", out, *common, "--probe", "forgetting").must(0).json["probes"]["forgetting"]
    assert after["numbers"]["old.txt_after"] == pytest.approx(row[3], abs=1e-3)
    assert max(each.shape[0] for name, each in load_file(out / "adapter_model.safetensors").items()
               if "lora_A" in name) > 4  # fmt: skip
    luthier("probe", "--after", adapter, *common, "--mitigate", "0.25", "--out", out).must(77, "is there already")


def test_what_counts_as_an_intruder_can_be_said(llama: Path, adapter: Path, kept: Path, tmp_path: Path) -> None:
    """Breaks when a knob of the sweep is not heard."""
    pair = ("--before", llama, "--after", adapter, "--keep", kept)
    common = (*pair, "--report", tmp_path, "--json", "--mitigate", "0,1")
    counts = []
    for k, epsilon in ((1, 0.9), (4, 0.9), (4, 0.2)):
        sets = ("--set", f"mitigation.k={k}", "--set", f"mitigation.epsilon={epsilon}")
        report = luthier("probe", *common, *sets).must(0).json["probes"]["mitigation"]
        assert report["knobs"] == {"factors": [0.0, 1.0], "k": k, "epsilon": epsilon}
        counts.append(report["numbers"]["intruders"])
    assert 14 == counts[0] < counts[1] and counts[2] < counts[1]
    said = luthier("probe", *(word for word in common if word != "--json")).must(0).out
    assert "decomposed matrices of bases, " in said and " of at most 8.6 GB, in " in said


def test_a_dry_run_writes_nothing(finished: Path, tmp_path: Path) -> None:
    """Breaks when looking at the plan makes a folder."""
    said = luthier("probe", finished, "--dry-run", "--report", tmp_path / "told").must(0)
    assert "intruder_dimensions" in said.out and "left out   attention" in said.out
    assert not (tmp_path / "told").exists()


def test_what_cannot_be_looked_at_is_a_sentence(llama: Path, tuned: Path, finished: Path, tmp_path: Path) -> None:
    """Breaks when a mistyped name or number ends in a traceback."""
    gpt = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(str(gpt))
    tiny_tokenizer().save_pretrained(str(gpt))
    pair = ("--before", llama, "--after", tuned, "--report", tmp_path / "x")
    luthier("probe").must(2, "what to look at is not clear")
    luthier("probe", finished, "--before", llama).must(2, "a run, or both")
    luthier("probe", finished, "--probe", "drft").must(2, "no probe 'drft'", "drift")
    luthier("probe", finished, "--probe", "drift", "--probe", "drift").must(2, "each probe once")
    luthier("probe", finished, "--set", "drift.rows=0").must(2, "rows")
    luthier("probe", finished, "--set", "rows=3").must(2, "PROBE.KNOB=VALUE")
    luthier("probe", finished, "--probe", "drift", "--set", "spectrum.count=3").must(2, "not made")
    luthier("probe", finished, "--keep", tmp_path / "none.txt").must(65, "there is no file")
    luthier("probe", finished, "--mitigate", "half").must(2, "numbers from 0 to 10")
    luthier("probe", finished, "--mitigate", "").must(2, "numbers from 0 to 10")
    luthier("probe", finished, "--mitigate", "0,12").must(2, "factors.1: 12.0 is not allowed")
    luthier("probe", finished, "--mitigate", "nan").must(2, "factors.0: nan is not allowed")
    luthier("probe", finished, "--mitigate", "1,0.5,1").must(2, "each lambda once")
    luthier("probe", finished, "--mitigate", "0", "--set", "mitigation.k=0").must(2, "k: 0 is not allowed")
    luthier("probe", finished, "--mitigate", "0", "--set", "mitigation.epsilon=1.5").must(2, "epsilon: 1.5 is not")
    luthier("probe", finished, "--mitigate", "0", "--set", "mitigation.kay=5").must(2, "did you mean k")
    luthier("probe", finished, "--mitigate", "0", "--probe", "drift").must(2, "one of the two at a time")
    luthier("probe", finished, "--set", "mitigation.k=5").must(2, "without --mitigate")
    luthier("probe", finished, "--out", tmp_path / "y").must(2, "without --mitigate")
    luthier("probe", *pair, "--mitigate", "0.5").must(2, "no text is known")
    luthier("probe", "--before", llama, "--after", gpt, "--probe", "drift").must(2, "one architecture")
    luthier("probe", "--before", llama, "--after", finished).must(2, "luthier probe RUN")
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_only_low_rank_adapters_are_written(llama: Path, tuned: Path, kept: Path, tmp_path: Path) -> None:
    """Breaks when a whole model is told to be an adapter, or several lambdas become one file."""
    probed = probed_folders(str(llama), str(tuned), [str(kept)], recorder=Silent())
    with pytest.raises(RecipeError, match="no low-rank adapter"):
        mitigate(probed, Scaling(factors=(0.5,)), out=tmp_path / "z")
    with pytest.raises(RecipeError, match="2 lambdas"):
        mitigate(probed, Scaling(factors=(0.5, 1.0)), out=tmp_path / "z")
