"""The state of a run: saved, loaded and gone on with, bit for bit; damaged files are named."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.adapters import Adapter
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import CorruptError
from luthier.objectives.sft import SFT
from luthier.optimizers import Optimizer, set_rate
from luthier.schedules.cosine import Cosine
from luthier.store.manifest import Entry
from luthier.train.loop import Cadence, Loop
from luthier.train.signals import StopRequest
from luthier.train.source import DataSource
from luthier.train.state import NUMBERS, TENSORS, LoopState, load_parameters, load_state, take_snapshot
from luthier.train.stepper import Stepper
from tests import forests
from tests.contracts.crossed import case
from tests.forests import Diary

ADAPTERS: list[Any] = [
    {"method": "lora", "dropout": 0.3} if name == "lora" else name for name in catalog.names("adapters")
]
VIEWS = forests.views(9, seed=2)
LOGGED = ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "trained_tokens")


class Run:
    """A whole run over a tiny llama: made anew for every life of it."""

    def __init__(
        self, *, adapter: Any = "lora", optimizer: str = "adamw", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        model = forests.language_model("llama", dtype=dtype)
        torch.manual_seed(seed)
        attachment = model.attach(choose("adapters", Adapter, adapter).attach(model.sites))
        method = choose("optimizers", Optimizer, {"method": optimizer, "learning_rate": 1e-2})
        self.stepper = Stepper(model, attachment, SFT(), method, micro_tokens=20)
        self.source = DataSource(VIEWS, SFT(), lengths=forests.lengths(VIEWS), seed=3, rows=2)
        self.diary = Diary()
        self.stop = StopRequest()

    def go(self, state: LoopState, *, until: int | None = None, cadence: Cadence | None = None) -> str:
        """Run the loop; `until` asks for a stop once that step is saved."""
        if until is not None:
            self.diary.on_save = lambda saved: self.stop.ask("test") if saved.step == until else None
        held_out = [tree for view in VIEWS[:2] for tree in SFT().trees(view)]
        loop = Loop(
            source=self.source, stepper=self.stepper, schedule=Cosine(), recorder=self.diary, keeper=self.diary,
            cadence=cadence or Cadence(evaluate_every=2, save_every=1), stop=self.stop, eval_trees=held_out,
        )  # fmt: skip
        return loop.run(state)

    def bits(self) -> dict[str, bytes]:
        """Everything a next step depends on."""
        found = {f"master/{name}": tensor for name, tensor in self.stepper.masters.items()}
        found.update({f"parameter/{name}": tensor for name, tensor in self.stepper.parameters.items()})
        for name, master in self.stepper.masters.items():
            for key, value in self.stepper.optimizer.state[master].items():
                found[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        found["random"] = torch.get_rng_state()
        return {
            name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for name, tensor in found.items()
        }

    def logged(self) -> list[tuple[Any, ...]]:
        """The numbers of all steps and evaluations."""
        steps = [tuple(event.values[key] for key in LOGGED) for event in self.diary.events if event.kind == "step"]
        return [*steps, *((loss,) for loss in self.diary.values("evaluation", "loss"))]


OPTIMIZERS = catalog.names("optimizers")
EACH = [
    # Every adapter with two of the optimizers in each test run, in turn.
    *(case(adapter, optimizer, torch.float32, quick=(one - two) % len(OPTIMIZERS) in (0, 3))
      for (one, adapter), (two, optimizer) in product(enumerate(ADAPTERS), enumerate(OPTIMIZERS))),
    case("full", "adamw", torch.bfloat16, quick=True),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "optimizer", "dtype"), EACH)
def test_save_load_and_go_on_equals_the_unbroken_run_bit_for_bit(
    adapter: Any, optimizer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Breaks when anything that one step hands to the next is not saved: moments, counters, dropout, data order."""
    unbroken = Run(adapter=adapter, optimizer=optimizer, dtype=dtype)
    assert unbroken.go(LoopState(total_steps=12)) == "finished"
    first = Run(adapter=adapter, optimizer=optimizer, dtype=dtype)
    state = LoopState(total_steps=12)
    assert first.go(state, until=6) == "stopped" and state.step == 6
    take_snapshot(state, first.stepper, first.diary.row_excess).write(tmp_path)
    # Another seed: what the resumed run draws at its start must not matter.
    second = Run(adapter=adapter, optimizer=optimizer, dtype=dtype, seed=99)
    resumed, second.diary.row_excess = load_state(tmp_path, second.stepper)
    assert resumed == state and second.diary.row_excess == first.diary.row_excess
    assert second.bits() == {**first.bits(), "random": second.bits()["random"]}
    assert second.go(resumed) == "finished"
    whole = unbroken.logged()
    steps = first.logged()[:6] + second.logged()[:6]
    assert steps == whole[:12]
    assert second.diary.row_excess == unbroken.diary.row_excess
    found, expected = second.bits(), unbroken.bits()
    assert {name for name in expected if found[name] != expected[name]} == set()
    assert set(found) == set(expected)


def test_the_dropout_of_a_resumed_run_is_not_that_of_its_start(tmp_path: Path) -> None:
    """Guards the test above: with the generator not restored, the numbers do differ."""
    first = Run(adapter={"method": "lora", "dropout": 0.3})
    state = LoopState(total_steps=4)
    first.go(state, until=2)
    take_snapshot(state, first.stepper, {}).write(tmp_path)
    losses = []
    for restore in (True, False):
        run = Run(adapter={"method": "lora", "dropout": 0.3}, seed=99)
        resumed, _ = load_state(tmp_path, run.stepper)
        if not restore:
            torch.manual_seed(1)
        run.go(resumed)
        losses.append(run.diary.values("step", "loss"))
    assert losses[0] != losses[1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a state after two steps."""
    run = Run()
    state = LoopState(total_steps=2)
    run.go(state)
    take_snapshot(state, run.stepper, {3: 0.5}).write(tmp_path)
    return tmp_path


def test_the_digest_that_is_told_is_that_of_the_tensors_file(tmp_path: Path) -> None:
    run = Run()
    told = take_snapshot(LoopState(), run.stepper, {}).write(tmp_path)
    data = (tmp_path / TENSORS).read_bytes()
    assert told == {TENSORS: Entry(len(data), hashlib.sha256(data).hexdigest())}


def change_tensors(folder: Path, *, drop: str = "", add: bool = False, cut: str = "") -> None:
    """Rewrite the tensor file with one tensor less, more, or shorter."""
    tensors = load_file(folder / TENSORS)
    key = next((name for name in sorted(tensors) if drop and name.startswith(drop)), "")
    tensors.pop(key, None)
    if add:
        tensors["optimizer/nobody/exp_avg"] = torch.zeros(2)
    short = next((name for name in sorted(tensors) if cut and name.startswith(cut)), "")
    if short:
        tensors[short] = tensors[short][:1].clone()
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize(
    "change", [{"drop": "master/"}, {"drop": "optimizer/"}, {"add": True}, {"cut": "master/"}, {"cut": "optimizer/"}]
)
def test_a_tensor_too_few_too_many_or_too_short_is_corrupt_and_nothing_is_loaded(
    saved: Path, change: dict[str, Any]
) -> None:
    """Breaks when a run goes on with fresh moments, or with a part of its parameters."""
    change_tensors(saved, **change)
    run = Run(seed=5)
    before = run.bits()
    with pytest.raises(CorruptError, match=TENSORS):
        load_state(saved, run.stepper)
    assert run.bits() == before


@pytest.mark.parametrize("name", [TENSORS, NUMBERS])
def test_a_file_cut_short_or_gone_is_corrupt(saved: Path, name: str) -> None:
    """Breaks when the error of a library reaches the user."""
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptError, match=name):
        load_state(saved, Run().stepper)
    (saved / name).unlink()
    with pytest.raises(CorruptError, match=name):
        load_state(saved, Run().stepper)


@pytest.mark.parametrize("part", ["loop", "tensors", "optimizer", "random", "row_excess"])
def test_numbers_with_a_part_missing_are_corrupt(saved: Path, part: str) -> None:
    """Breaks when a default stands in for what was lost."""
    content = json.loads((saved / NUMBERS).read_text("utf-8"))
    del content[part]
    (saved / NUMBERS).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CorruptError, match=part):
        load_state(saved, Run().stepper)


def test_another_adapter_cannot_go_on_from_it(saved: Path) -> None:
    """Breaks when shapes that happen to fit are enough."""
    with pytest.raises(CorruptError, match="differs from the run's"):
        load_state(saved, Run(adapter={"method": "lora", "rank": 3}).stepper)
    with pytest.raises(CorruptError, match="the recipe's adapter|that nothing expects"):
        load_state(saved, Run(adapter={"method": "lora", "targets": ["q"]}).stepper)


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path: Path) -> None:
    def refused(name: str) -> float:
        raise ValueError(name)

    state = LoopState(first_loss=math.nan, last_loss=-math.inf, best_eval_loss=math.inf, step=3)
    take_snapshot(state, Run().stepper, {4: math.nan, 5: 0.5}).write(tmp_path)
    json.loads((tmp_path / NUMBERS).read_text("utf-8"), parse_constant=refused)
    found, losses = load_state(tmp_path, Run().stepper)
    assert math.isnan(found.first_loss or 0.0) and math.isnan(losses[4]) and losses[5] == 0.5
    assert (found.last_loss, found.best_eval_loss, found.step) == (-math.inf, math.inf, 3)


def test_parameters_alone_can_be_loaded(saved: Path) -> None:
    """Breaks when the best checkpoint cannot be had without its moments."""
    run, whole = Run(seed=5), Run(seed=6)
    left = load_parameters(saved, run.stepper)
    load_state(saved, whole.stepper)
    assert all(torch.equal(value, whole.stepper.masters[name]) for name, value in run.stepper.masters.items())
    assert not run.stepper.optimizer.state and all(name.startswith("optimizer/") for name in left)


def test_a_factor_of_the_learning_rate_is_the_recipe_s(tmp_path: Path) -> None:
    """Breaks when a changed factor, accepted as a drift, comes back from the checkpoint, or groups are mixed up."""
    before = Run(adapter={"method": "lora", "plus_ratio": 4.0})
    take_snapshot(LoopState(step=0), before.stepper, {}).write(tmp_path)
    after = Run(adapter={"method": "lora", "plus_ratio": 2.0})
    load_state(tmp_path, after.stepper)
    set_rate(after.stepper.optimizer, 3.0)
    rates = {name: group["lr"] for name, master in after.stepper.masters.items()
             for group in after.stepper.optimizer.param_groups if any(master is each for each in group["params"])}
    assert {rate for name, rate in rates.items() if name.endswith("up")} == {6.0}
    assert {rate for name, rate in rates.items() if name.endswith("down")} == {3.0} and len(rates) % 2 == 0
    with pytest.raises(CorruptError, match="2 groups of parameters"):
        load_state(tmp_path, Run().stepper)


@pytest.mark.parametrize("adapter", [{"method": "lora", "init": "pissa"}, {"method": "sparse", "choice": "random"}])
def test_what_was_found_at_the_start_comes_back(adapter: Any, tmp_path: Path) -> None:
    """Breaks when a resumed run takes what its own attaching has found, on another machine or with another seed."""
    before = Run(adapter=adapter)
    for tensor in before.stepper.constants.values():
        tensor.add_(1) if tensor.is_floating_point() else tensor.copy_(tensor.flip(0))
    take_snapshot(LoopState(step=0), before.stepper, {}).write(tmp_path)
    after = Run(adapter=adapter, seed=5)
    names = sorted(before.stepper.constants)
    assert names and not any(torch.equal(before.stepper.constants[n], after.stepper.constants[n]) for n in names)
    load_state(tmp_path, after.stepper)
    assert all(torch.equal(before.stepper.constants[n], after.stepper.constants[n]) for n in names)
    assert sorted(after.stepper.constants) == names
    change_tensors(tmp_path, drop=f"constant/{names[0]}")
    with pytest.raises(CorruptError, match="does not hold the tensors"):
        load_state(tmp_path, after.stepper)


def test_what_the_recipe_now_sets_otherwise_is_not_taken_from_the_checkpoint(tmp_path: Path) -> None:
    """Breaks when a changed knob of the optimizer, accepted as a drift, is silently without effect."""
    before = Run()
    before.go(LoopState(total_steps=2))
    before.stepper.optimizer.param_groups[0]["kept_by_the_optimizer"] = 7
    take_snapshot(LoopState(step=2), before.stepper, {}).write(tmp_path)
    after = Run()
    for groups in (after.stepper.optimizer.param_groups, after.stepper.first_groups):
        groups[0]["weight_decay"] = 0.25
    load_state(tmp_path, after.stepper)
    [group] = after.stepper.optimizer.param_groups
    assert group["weight_decay"] == 0.25 and group["kept_by_the_optimizer"] == 7
    assert group["betas"] == before.stepper.optimizer.param_groups[0]["betas"]
