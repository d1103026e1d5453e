"""Comparing methods: processes of their own, examples in the context, answers judged, and what is refused at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.assets.demo_task import demo_rows
from luthier.core import catalog
from luthier.core.child import start_child
from luthier.core.errors import LuthierError, RecipeError
from luthier.core.events import Event
from luthier.core.knobs import validate
from luthier.data.forest import Forest
from luthier.data.prepare import Reading, prepare
from luthier.data.tokenizer import Tokenizer
from luthier.metrics.exact_match import ExactMatch
from luthier.model.load import resolve_source
from luthier.recipes.comparing import compare as comparing
from luthier.recipes.comparing.compare import FOUND, Measures, compare, require_methods
from luthier.recipes.comparing.compared import behind, shots
from luthier.recipes.comparing.rates import grid
from luthier.recipes.progress import Silent
from luthier.recipes.schemas.presets import PRESETS, preset
from tests import forests
from tests.children import forked_child

SETS = ("budget.steps=2", "batch.rows=4", "evaluation.fraction=0.2", "evaluation.prompts=0")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in demo_rows(30, seed=0, held_out=False)), "utf-8")
    return path


def test_each_method_is_trained_and_measured_and_one_that_fails_ends_no_other(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a process is not started, a figure is missing, or an error is swallowed."""
    # The first process is one that users get, the others are forked: their imports took longer than all they do.
    ways = iter((start_child, forked_child, forked_child))
    monkeypatch.setattr(comparing, "start_child", lambda *given, **more: next(ways)(*given, **more))
    folder = tmp_path / "compared"
    told: list[str] = []

    class Notes:
        def record(self, event: Event) -> None:
            told.append(str(event.values.get("what")))

    methods, how = ["bitfit", "in_context", "ia3"], Measures(examples=2)
    found = compare("seedling", str(rows), methods, folder=folder, sets=SETS, measures=how, recorder=Notes())
    failed, shown, trained = found["methods"]
    assert "has no biases" in failed["error"] and (folder / "bitfit.log").is_file()
    assert shown["trained_parameters"] == shown["file_bytes"] == 0 and shown["forgetting"] == 0.0
    assert shown["example_tokens"] > 0 and shown["loss"] != shown["loss_before"]
    keys = ("quality", "trained_parameters", "file_bytes", "peak_memory_bytes", "seconds", "forgetting")
    assert all(trained[key] > 0 for key in keys if key != "forgetting") and math.isfinite(trained["forgetting"])
    assert trained["quality"] == pytest.approx(math.exp(-trained["loss"]))
    assert trained["query_flops"] < shown["query_flops"]
    # The base model is the same for both, on the same rows.
    assert trained["loss_before"] == pytest.approx(shown["loss_before"], rel=2e-2)
    assert json.loads((folder / FOUND).read_text("utf-8"))["methods"][2]["method"] == "ia3"
    assert (folder / "comparison.html").is_file() and (folder / "ia3" / "report.html").is_file()
    assert [line.split(" ")[0] for line in told] == ["bitfit", "in_context", "ia3"]
    with pytest.raises(RecipeError, match="is not empty"):
        compare("seedling", str(rows), ["ia3"], folder=folder, recorder=Silent())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_are_judged_and_rates_are_looked_for_on_other_rows(tmp_path: Path) -> None:
    """Breaks when answers to one prompt are on both sides, a reference is lost, the reported rows choose the rate, a
    try leaves files behind, or the rate that was found is not the one that is trained at."""
    path, folder = tmp_path / "rows.jsonl", tmp_path / "compared"
    made = [{"question": f"What is {n % 12}?", "answer": f"Well.\n#### {n % 12 + n // 12}"} for n in range(36)]
    path.write_text("\n".join(map(json.dumps, made)), "utf-8")
    values = {"metric": "exact_match", "search": 2, "search_share": 0.5, "examples": 2, "max_new_tokens": 9}
    how = validate(Measures, values)
    methods, sets = ["lora", "in_context"], (*SETS, "evaluation.fraction=0.25")
    found = compare("seedling", str(path), methods, folder=folder, sets=sets, measures=how, recorder=Silent())
    trained, shown = found["methods"]
    assert found["measures"]["metric"] == {"method": "exact_match", "marker": "####", "ignore_case": False}
    for one in (trained, shown):
        assert "error" not in one, one
        assert one["questions"] == 3 and one["references"] == one["held_out_rows"] == 9
        written = (folder / f"{one['method']}.answers.jsonl").read_text("utf-8").splitlines()
        said, known = zip(*((row["answer"], row["references"]) for row in map(json.loads, written)), strict=True)
        assert [len(references) for references in known] == [3, 3, 3] and "What is" in written[0]
        assert one["quality"] == ExactMatch().of(said, known)
    search = trained["search"]
    assert search["rates"][:2] == grid(1e-3, 2) and 3 <= len(search["rates"]) <= 4
    assert search["taken"] == search["rates"][int(np.argmin(search["losses"]))]
    assert trained["learning_rate"] == search["taken"] and search["seconds"] > 0 and search["flops"] > 0
    assert "search" not in shown
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["lora", "recipes"]
    log = (folder / "lora.log").read_text("utf-8")
    assert log.count("rows to train") == len(search["rates"]) + 1
    assert "9 rows are reserved" in log and "/1 " in log and "/2 " in log
    page = (folder / "comparison.html").read_text("utf-8")
    assert "exact_match (marker ####" in page and "Question 3" in page and f" of {len(search['rates'])} in " in page


def test_examples_have_different_prompts_and_are_the_same_again(tmp_path: Path) -> None:
    """Breaks when a file that is sorted by prompt gives the same prompt as every example."""
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {n // 5}?", "answer": f"It is {n}."} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    prepared = prepare(path, Tokenizer.load(resolve_source("seedling")), Reading(), cache=tmp_path / "cache")
    root = shots(prepared, [], 4, room=None, seed=0)
    text = prepared.renderer.tokenizer.decode(root.tolist())
    assert all(text.count(f"What is {n}?") == 1 for n in range(4))
    assert np.array_equal(root, shots(prepared, [], 9, room=None, seed=0))
    assert not np.array_equal(root, shots(prepared, [], 4, room=None, seed=1))
    with pytest.raises(RecipeError, match="lower --examples"):
        shots(prepared, [], 4, room=10, seed=0)


def test_what_does_not_hold_together_is_refused_at_once(rows: Path, tmp_path: Path) -> None:
    """Breaks when a wrong name, key or file is found out only after the first method has been trained."""

    def refused(methods: list[str], **more: object) -> str:
        with pytest.raises(RecipeError) as caught:
            compare("seedling", str(rows), methods, folder=tmp_path / "none", recorder=Silent(), **more)  # type: ignore[arg-type]
        return str(caught.value)

    assert "no method 'lorra'" in refused(["ia3", "lorra"])
    assert "named twice" in refused(["ia3", "ia3"])
    assert "no file" in refused(["ia3"], measures=Measures(keep=str(tmp_path / "missing.txt")))
    assert "budget" in refused(["ia3"], sets=("budget.epoch=1",))
    for values, part in (({"metric": "blue"}, "no metric 'blue'"), ({"search": 0}, "search"), ({"keep": 1}, "keep")):
        with pytest.raises(RecipeError, match=part):
            validate(Measures, values)
    assert validate(Measures, {"metric": "likelihood"}).metric is None
    missing = (("./nowhere", rows, "no model folder"), ("seedling", tmp_path / "x.jsonl", "is not there"))
    for model, data, part in missing:
        with pytest.raises(LuthierError, match=part):
            compare(model, str(data), ["ia3"], folder=tmp_path / "none", recorder=Silent())
    # Whoever corrects the command types the same folder again.
    assert not (tmp_path / "none").exists()
    with pytest.raises(RecipeError, match="--methods is"):
        require_methods(" , ")
    assert require_methods("lora, ia3") == ["lora", "ia3"]


def test_every_adapter_can_be_compared_and_every_preset_is_a_recipe() -> None:
    """Breaks when a preset names a knob that is no more, or a new adapter has no way in."""
    assert all(preset(name)["adapter"]["method"] == name for name in catalog.names("adapters"))
    assert PRESETS["qlora"]["quantizer"] == {"method": "nf4"}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_rows_behind_examples_are_rows_after_them(architecture: str) -> None:
    """Breaks when examples carry weight, rows see each other, or the first token of a row is predicted from them."""
    root = np.array([9, 77, 31, 4], np.int32)
    trees = forests.rows(20, seed=3, ones=True)
    (first, *others) = behind(root, trees)
    assert len(others) == 1 and first.segments[0].parent == -1
    model = forests.language_model(architecture)
    found = model.token_outputs(Forest((first, *others))).log_probs
    expected = []
    for tree in trees:
        ids = torch.from_numpy(np.concatenate([root, tree.segments[0].tokens]).astype(np.int64))
        log_probs = torch.log_softmax(forests.zoo(architecture, ours=False)(ids[None]).logits[0], -1)
        expected.append(log_probs[len(root) : -1].gather(1, ids[len(root) + 1 :, None])[:, 0])
    ordered = [each.detach().sort().values for each in (found, torch.cat(expected))]
    torch.testing.assert_close(ordered[0], ordered[1], rtol=1e-4, atol=1e-4)
    assert behind(np.zeros(0, np.int32), trees) == trees
