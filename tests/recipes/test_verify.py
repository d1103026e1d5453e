"""The proof of a finished run: each promise is broken on purpose, and the proof must see it, say it, and fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

from luthier.core.errors import (
    CorruptError,
    DataError,
    DriftError,
    GateError,
    LuthierError,
    NumericError,
    RecipeError,
    StoppedError,
)
from luthier.recipes.proving import verify
from luthier.recipes.proving.verify import verify_apart, verify_run
from luthier.store.manifest import NAME, read_manifest, write_manifest
from luthier.store.runs import RunDirectory
from luthier.train.result import Claims, save_result
from luthier.train.stepper import Stepper, StepReport
from tests import forests
from tests.cli.commands import STEPS, colour_rows, environ, events, luthier, recipe_text, step_events, tree
from tests.tiny import VOCABULARY, tiny_tokenizer

PROOF = {"tensors", "differs_from_start", "eval_loss", "reloaded_loss", "process", "seconds"}


@pytest.fixture(scope="module", params=["lora", "full"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_path: Callable[[str], Path]
) -> Path:
    """A folder with a base, a file, and a finished run of them that names both by relative paths."""
    folder = tmp_path_factory.mktemp(f"proof-{request.param}")
    shutil.copytree(tiny_path("qwen2"), folder / "base")
    colour_rows(folder / "rows.jsonl")
    adapter = "{method: lora, rank: 4, alpha: 8.0}" if request.param == "lora" else "full"
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text(Path("base"), Path("rows.jsonl"), adapter=adapter), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        luthier("train", recipe, "--run", "run", "--quiet").must(0)
    return folder


@pytest.fixture
def spoilt(place: Path) -> Iterator[Path]:
    """The same, as a test may spoil it: every file comes back afterwards."""
    before = tree(place)
    yield place
    shutil.rmtree(place / "run")
    for name, data in before.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if data:
            (place / name).write_bytes(data)


def result(folder: Path) -> Path:
    return next(folder / "run" / name for name in ("adapter", "model") if (folder / "run" / name).is_dir())


def proved(folder: Path) -> dict[str, Any]:
    return verify_run(RunDirectory.open(folder / "run"))


def remade(folder: Path, **facts: Any) -> None:
    """Let the manifest agree with the files as they are now, as somebody with intent would."""
    old = read_manifest(folder).facts
    (folder / NAME).unlink()
    write_manifest(folder, {**old, **facts})


def tensors_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The weight file with a change, under a manifest that agrees with it."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    remade(folder)


def last(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(name for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name)[-1]


def test_a_sound_run_is_proved_with_its_figures(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the loss of the files is not that of the run to the last bit, or the proof needs a certain place."""
    summary = json.loads((place / "run/summary.json").read_text("utf-8"))
    assert set(summary["proof"]) == PROOF and summary["proof"]["differs_from_start"] is True
    assert summary["proof"]["reloaded_loss"] == summary["proof"]["eval_loss"] == summary["loss"]["eval"]
    shutil.copytree(place / "run", tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path)
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    found = luthier("eval", "copy", "--verify", "--json").must(0).json
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), drawn)
    assert found["reloaded_loss"] == found["eval_loss"] == summary["loss"]["eval"]
    assert found["held_out_rows"] == 8 and found["held_out_tokens"] > 8 and found["notices"] == []
    said = luthier("eval", place / "run", "--verify").must(0).out
    for part in (f"loss {found['eval_loss']:.6f}, recorded {found['eval_loss']:.6f}", f"tensors    {found['tensors']},",
                 found["base_digest"][:12], "8 rows", "each as its manifest says"):  # fmt: skip
        assert part in said
    assert said.splitlines()[-1] == "verified"
    luthier("eval", place / "run", "--verify", "--data", "x").must(2, "--verify and --data")


def test_a_flipped_bit_in_any_file_is_named_and_nothing_uses_the_result(spoilt: Path) -> None:
    """Breaks when a file of the result is not covered by the manifest, or the result is used unverified."""
    folder = result(spoilt)
    names = sorted(path.name for path in folder.iterdir())
    assert {NAME, "tokenizer.json", "luthier.json"} < set(names)
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
        with pytest.raises(CorruptError, match=name):
            proved(spoilt)
        said = luthier("generate", spoilt / "run", "--prompt", "x").must(74, "error[corrupt]", name, "train again")
        assert said.out == ""
        luthier("eval", spoilt / "run").must(74, name)
        (folder / name).write_bytes(data)
    (folder / "more.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptError, match=r"more\.json is not in the manifest"):
        proved(spoilt)
    (folder / "more.json").unlink()
    assert proved(spoilt)["files"] == len(names) - 1


def test_a_result_without_a_manifest_is_not_taken_for_one(spoilt: Path) -> None:
    """Breaks when a folder that nothing vouches for is loaded as the result of a run."""
    (result(spoilt) / NAME).unlink()
    for command in (("eval", "--verify"), ("generate", "--prompt", "x")):
        luthier(command[0], spoilt / "run", *command[1:]).must(74, f"has no {NAME}", "train again")


def _nudge(tensors: dict[str, torch.Tensor]) -> None:
    tensors[last(tensors)] += 0.05


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[last(tensors)][0, 0] = torch.nan


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[last(tensors)]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors[last(tensors) + ".more"] = torch.zeros(2)


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[last(tensors)] = tensors[last(tensors)][1:].contiguous()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (_nudge, GateError, "held-out loss of"),
        (_nan, NumericError, "not finite"),
        (_drop, CorruptError, "missing"),
        (_add, CorruptError, "no place"),
        (_cut, CorruptError, "shape"),
    ],
)
def test_tensors_that_are_not_those_of_the_run_are_found_behind_a_manifest_that_agrees(
    change: Callable[[dict[str, torch.Tensor]], None], kind: type[LuthierError], said: str, spoilt: Path
) -> None:
    """Breaks when the proof trusts the manifest: a value, a missing, an extra or a cut tensor would pass."""
    tensors_changed(result(spoilt), change)
    with pytest.raises(kind, match=said) as caught:
        proved(spoilt)
    if kind is GateError:
        recorded = read_manifest(result(spoilt)).facts["eval_loss"]
        assert repr(recorded) in str(caught.value)
    luthier("eval", spoilt / "run", "--verify").must(kind.exit_code, said)


def test_a_result_that_is_its_start_proves_nothing(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when an adapter that was never trained, or the base saved as the result, passes."""
    folder = result(spoilt)
    if folder.name == "model":
        shutil.copy(spoilt / "base/model.safetensors", folder / "model.safetensors")
    else:
        monkeypatch.chdir(spoilt)
        model = forests.language_model("qwen2")
        from luthier.adapters.lora import LoRA

        torch.manual_seed(0)
        start = model.attach(LoRA(rank=4, alpha=8.0).attach(model.sites))
        tensors = {name: tensor.detach().contiguous() for name, tensor in start.named_tensors().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    remade(folder)
    with pytest.raises(GateError, match="exactly"):
        proved(spoilt)


def test_a_base_that_has_changed_is_named(spoilt: Path) -> None:
    """Breaks when the loss of an adapter on other weights would be compared, or believed."""
    tensors = load_file(spoilt / "base/model.safetensors")
    tensors[last(tensors)][0, 0] += 1.0
    save_file(tensors, spoilt / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DriftError, match=r"trained on base weights [0-9a-f]{12}\.\.\., .*base has"):
        proved(spoilt)
    shutil.rmtree(spoilt / "base")
    with pytest.raises(LuthierError) as caught:
        proved(spoilt)
    assert caught.value.exit_code == 69


def test_data_that_have_changed_are_told_instead_of_a_wrong_number(spoilt: Path) -> None:
    """Breaks when another loss is reported as a failure of the result, or other rows are not noticed."""
    path = spoilt / "rows.jsonl"
    text = path.read_text("utf-8")
    path.write_text(text + text.splitlines(keepends=True)[0], encoding="utf-8")
    with pytest.raises(DriftError, match=r"rows\.jsonl had 40 rows in [\d,]+ bytes and has 41 rows"):
        proved(spoilt)
    path.write_text(text.replace("red", "dry"), encoding="utf-8")
    with pytest.raises(DriftError, match=r"rows\.jsonl has other rows of the same number and size"):
        proved(spoilt)
    held = _held_out_numbers(spoilt)
    kept = next(number for number in range(40) if number not in held)
    lines = text.splitlines(keepends=True)
    lines[kept] = lines[kept].replace("colour", "COLOUR")
    path.write_text("".join(lines), encoding="utf-8")
    found = proved(spoilt)
    assert found["reloaded_loss"] == found["eval_loss"] and "the held-out rows are the same" in found["notices"][0]
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        proved(spoilt)


def _held_out_numbers(folder: Path) -> set[int]:
    found = [event for event in events(folder / "run") if event["kind"] == "evaluation"]
    return {int(row["row"]) for row in found[0]["worst_rows"]}


def test_a_moved_data_file_is_found_where_the_command_is_typed(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a run can only be proved where it was made."""
    shutil.move(spoilt / "rows.jsonl", tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert proved(spoilt)["notices"] == []
    shutil.move(tmp_path / "rows.jsonl", spoilt / "rows.jsonl")


def test_a_tokenizer_that_cannot_be_read_or_is_another_is_found(spoilt: Path) -> None:
    """Breaks when only the weights are looked at."""
    folder = result(spoilt)
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data[: len(data) // 2])
    remade(folder)
    with pytest.raises(CorruptError, match=r"tokenizer\.json is not valid JSON"):
        proved(spoilt)
    (folder / "tokenizer.json").write_bytes(data.replace(b'"ing"', b'"gni"').replace(b'"in","g"', b'"g","in"'))
    content = json.loads(data)
    token, number = next(iter(sorted(content["model"]["vocab"].items(), key=lambda item: -item[1])))
    content["model"]["vocab"].pop(token)
    content["model"]["vocab"]["Q" * 9] = number
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    remade(folder)
    with pytest.raises(CorruptError, match="is not the base's"):
        proved(spoilt)


def test_an_adapter_of_other_settings_is_found_even_when_nothing_was_held_out(finished: Path, tmp_path: Path) -> None:
    """Breaks when only the loss would tell: without held-out rows there is none."""
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    path = run / "adapter/adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "lora_alpha": 4}), encoding="utf-8")
    remade(run / "adapter", eval_loss=None)
    with pytest.raises(CorruptError, match="lora_alpha = 4; 8, by the recipe"):
        proved(tmp_path)


def test_claims_that_no_run_may_make_are_refused(spoilt: Path) -> None:
    """Breaks when the facts of a manifest are taken as they come."""
    folder = result(spoilt)
    for facts, kind, said in (
        ({"run": "0" * 32}, CorruptError, "is the result of run"),
        ({"trained_tokens": 0}, GateError, "0 trained tokens"),
        ({"last_loss": "NaN"}, NumericError, "last_loss"),
        ({"eval_loss": "Infinity"}, NumericError, "eval_loss"),
        ({"stop_ids": [3]}, CorruptError, "does not stop at"),
        ({"base_digest": "0" * 64}, DriftError, "base weights 000000000000"),
        ({"precision": "int4"}, CorruptError, "precision"),
    ):
        good = read_manifest(folder).facts
        remade(folder, **facts)
        with pytest.raises(kind, match=said):
            proved(spoilt)
        remade(folder, **good)
    (folder / NAME).unlink()
    write_manifest(folder, {key: value for key, value in good.items() if key not in ("recipe", "steps")})
    with pytest.raises(CorruptError, match="does not say recipe, steps"):
        proved(spoilt)


def test_a_recipe_that_was_edited_is_another_run(spoilt: Path) -> None:
    """Breaks when the seed or a knob may change after the fact."""
    path = spoilt / "run/recipe.yaml"
    path.write_text(path.read_text("utf-8").replace("seed: 0", "seed: 1"), encoding="utf-8")
    with pytest.raises(DriftError, match=r"recipe\.yaml is not the recipe"):
        proved(spoilt)


def test_without_held_out_rows_everything_but_the_loss_is_proved(tmp_path: Path, recipe: Path) -> None:
    """Breaks when a run without evaluation cannot be proved, or does not say what is missing."""
    luthier("train", recipe, "--run", tmp_path / "run", "--set", "evaluation.fraction=0", "--quiet").must(0)
    told = luthier("eval", tmp_path / "run", "--verify").must(0).out
    assert "nothing was held out" in told and "held out  " not in told and told.endswith("verified\n")
    assert luthier("eval", tmp_path / "run", "--verify", "--json").json["reloaded_loss"] is None


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"last_loss": float("nan")}, NumericError, "training loss"),
        ({"eval_loss": float("inf")}, NumericError, "held-out loss"),
        ({"trained_tokens": 0}, GateError, "0 tokens were trained"),
        ({"start_digest": ""}, GateError, "exactly what they were"),
        ({}, NumericError, "holds numbers that are not finite"),
    ],
)
def test_what_no_run_may_have_as_result_is_refused_before_anything_is_written(
    change: dict[str, Any], kind: type[LuthierError], said: str, tmp_path: Path
) -> None:
    """Breaks when a NaN, an empty run or an untrained adapter reaches the disk."""
    from luthier.adapters.lora import LoRA

    model = forests.language_model("llama")
    attachment = model.attach(LoRA(rank=2).attach(model.sites))
    start = attachment.digest()
    forests.shake(attachment.named_parameters().values())
    sound = {"start_digest": start, "trained_tokens": 9, "steps": 3, "last_loss": 1.0, "eval_loss": None}
    claims = Claims(**{**sound, **change})
    if "start_digest" in change:
        claims = Claims(**{**sound, "start_digest": attachment.digest()})
    if not change:
        with torch.no_grad():
            next(iter(attachment.named_parameters().values()))[0, 0] = torch.inf
    with pytest.raises(kind, match=said):
        save_result(tmp_path, model, attachment, LoRA(rank=2), {}, claims=claims)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_changed_nothing_ends_with_78(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a run whose steps do nothing is called finished."""

    def idle(self: Stepper, *, factor: float = 1.0) -> StepReport:
        self.zero_grad()
        return StepReport(1.0, True)

    monkeypatch.setattr(Stepper, "optim_step", idle)
    luthier("train", recipe, "--run", tmp_path / "run").must(78, "exactly what they were at the start")
    assert RunDirectory.open(tmp_path / "run").status().state == "failed"
    assert not (tmp_path / "run/adapter").exists() and not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize(
    ("failure", "code", "state"),
    [
        (CorruptError("bad bytes"), 78, "failed"),
        (StoppedError("stopped by SIGTERM"), 75, "stopped"),
        (KeyboardInterrupt(), 130, "failed"),
    ],
)
def test_a_run_without_its_proof_is_not_finished_and_resume_only_finishes_it(
    failure: BaseException, code: int, state: str, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a run is finished although its files are not proved, or resume trains again."""
    folder = tmp_path / "run"

    def fails(_: RunDirectory) -> dict[str, Any]:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(verify, "verify_apart", fails)
        assert luthier("train", recipe, "--run", folder).code == code
    assert RunDirectory.open(folder).status().state == state and not (folder / "summary.json").exists()
    assert "finish" not in [event["kind"] for event in events(folder)]
    luthier("generate", folder, "--prompt", "x").must(2, "is not proved yet", f"luthier resume {folder}")
    before = step_events(folder)
    line = luthier("resume", folder, "--json").must(0).json
    assert line["status"] == "finished" and line["steps"] == STEPS and step_events(folder) == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    luthier("generate", folder, "--prompt", "x", "--max-new-tokens", "2").must(0)


def test_weights_that_the_zoo_fuses_in_memory_are_proved_under_their_names_in_the_file(
    tmp_path: Path, rows: Path
) -> None:
    """Breaks when a mixture of experts cannot be proved, or a lost expert is not missed."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=256,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(Path(f"fresh:{tmp_path / 'base'}"), rows, adapter="full"), encoding="utf-8")
    luthier("train", recipe, "--run", tmp_path / "run", "--quiet", "--set", "budget.steps=2").must(0)
    tensors_changed(tmp_path / "run/model", lambda tensors: tensors.pop(next(n for n in tensors if "experts.1" in n)))
    with pytest.raises(CorruptError, match=r"1 expected tensors are missing \(.*experts\.1\."):
        proved(tmp_path)


def test_a_run_without_a_result_has_nothing_to_prove(spoilt: Path) -> None:
    """Breaks when a run that never ended is called verified."""
    shutil.rmtree(result(spoilt))
    with pytest.raises(RecipeError, match="has no result yet"):
        proved(spoilt)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"was killed by SIGKILL \(out of memory\?\)"),
        ("import sys; sys.exit('no room for the weights')", "ended with exit code 1.*no room for the weights"),
        ("print('{\"half')", "ended with exit code 0"),
    ],
)
def test_a_child_that_dies_proves_nothing(
    program: str, said: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when no answer is taken for a good one."""

    def dies(module: str, arguments: list[str], *, stderr: int) -> subprocess.Popen[bytes]:
        assert module == "luthier.recipes.proving.verify" and arguments == [str(finished)]
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)

    monkeypatch.setattr(verify, "start_child", dies)
    with pytest.raises(GateError, match=said) as caught:
        verify_apart(RunDirectory.open(finished))
    assert f"luthier eval {finished} --verify" in caught.value.do


@pytest.mark.fresh_process
def test_a_fresh_process_proves_a_run_and_sends_its_errors_home(tmp_path: Path, recipe: Path) -> None:
    """Breaks when the real proof is not made, differs from the one that the other tests use, or loses an error."""
    folder = tmp_path / "run"
    luthier("train", recipe, "--run", folder, "--quiet").must(0)
    proof = json.loads((folder / "summary.json").read_text("utf-8"))["proof"]
    assert proof["process"] == "fresh" and proof["seconds"] > 0
    here = verify_run(RunDirectory.open(folder))
    assert {key: here[key] for key in PROOF - {"process", "seconds"}} == {
        key: proof[key] for key in PROOF - {"process", "seconds"}
    }
    tensors_changed(folder / "adapter", _nan)
    with pytest.raises(NumericError) as caught:
        verify_apart(RunDirectory.open(folder))
    with pytest.raises(NumericError) as expected:
        verify_run(RunDirectory.open(folder))
    assert caught.value.as_dict() == expected.value.as_dict()


@pytest.mark.fresh_process
def test_the_child_ends_with_its_parent(finished: Path) -> None:
    """Breaks when a proof goes on after the process that asked for it was killed."""
    program = (
        "import sys; from pathlib import Path; from luthier.store.runs import RunDirectory\n"
        "from luthier.recipes.proving.verify import verify_apart; verify_apart(RunDirectory.open(Path(sys.argv[1])))"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(finished)], env=environ()) as parent:
        try:
            child = _child_of(parent.pid)
            time.sleep(0.5)
        finally:
            os.kill(parent.pid, signal.SIGKILL)
    # A process that has ended and was not waited for is a zombie until its new parent looks.
    until = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, f"{child} is still there"
        time.sleep(0.02)


def _child_of(pid: int) -> psutil.Process:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = psutil.Process(pid).children()
        if found and "luthier.recipes.proving.verify" in found[0].cmdline():
            return found[0]
        time.sleep(0.02)
    raise AssertionError("no child was started in a minute")
