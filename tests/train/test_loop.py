"""The loop: the order in which things happen, why it ends, and what it does with a bad number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import NumericError, StorageError
from luthier.data.forest import Floats, Note, Segment, Tree
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.schedules.linear import Linear
from luthier.train.loop import Cadence, Loop
from luthier.train.pass_report import PassReport
from luthier.train.signals import StopRequest
from luthier.train.source import DataSource
from luthier.train.state import LoopState
from luthier.train.stepper import StepReport
from luthier.train.watch import Watch
from tests import forests
from tests.forests import Diary

VIEWS = forests.views(8, seed=1)


@dataclass
class Script:
    """A stepper that does nothing and says what it is told to: losses, norms and held-out losses in turn."""

    losses: Sequence[float] = (2.0,)
    norms: Sequence[float] = (1.0,)
    held_out: Sequence[float] = (3.0,)
    method: AdamW = field(default_factory=lambda: AdamW(learning_rate=0.5))
    done: list[str] = field(default_factory=list)

    def set_rate(self, factor: float) -> None:
        """What steps in the backward pass would want to know."""

    def forward_backward(self, trees: Sequence[Tree]) -> PassReport:
        loss = self._next(self.losses, "forward_backward")
        return PassReport(2 * loss, 2.0, 10, 2, {tree.row: (loss, 1.0) for tree in trees})

    def optim_step(self, *, factor: float = 1.0) -> StepReport:
        norm = self._next(self.norms, "optim_step")
        return StepReport(norm, math.isfinite(norm))

    def evaluate(self, trees: Sequence[Tree]) -> PassReport:
        loss = self._next(self.held_out, "evaluate")
        return PassReport(2 * loss, 2.0, 10, 2, {tree.row: (loss, 1.0) for tree in trees})

    def zero_grad(self) -> None:
        self.done.append("zero_grad")

    def _next(self, values: Sequence[float], what: str) -> float:
        index = self.done.count(what)
        self.done.append(what)
        return values[min(index, len(values) - 1)]


def run(
    script: Script,
    *,
    total: int = 6,
    cadence: Cadence | None = None,
    stop: StopRequest | None = None,
    diary: Diary | None = None,
    state: LoopState | None = None,
    evaluates: bool = True,
) -> tuple[str, LoopState, Diary]:
    """One run of the loop over a scripted stepper."""
    diary, state = diary or Diary(), state or LoopState(total_steps=total)
    trees = [tree for view in VIEWS[:2] for tree in SFT().trees(view)] if evaluates else []
    loop = Loop(
        source=DataSource(VIEWS, SFT(), lengths=forests.lengths(VIEWS), seed=0, rows=2),
        stepper=script,  # type: ignore[arg-type]
        schedule=Linear(warmup=0.0),
        cadence=cadence or Cadence(),
        recorder=diary,
        keeper=diary,
        stop=StopRequest() if stop is None else stop,
        eval_trees=trees,
        sample=lambda step: diary.record(forests.Event("sample", {}, step=step)),
    )
    return loop.run(state), state, diary


def test_things_happen_in_their_order() -> None:
    """Breaks when the untrained model is not evaluated first, or a checkpoint is written before what it should hold."""
    cadence = Cadence(evaluate_every=2, save_every=3, sample_every=2)
    status, state, diary = run(Script(held_out=(3.0, 2.0, 2.5, 2.4)), total=5, cadence=cadence)
    assert status == "finished" and state.step == 5
    assert diary.kinds() == [
        ("evaluation", 0), ("sample", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("sample", 2),
        ("checkpoint", 2), ("step", 3), ("checkpoint", 3), ("step", 4), ("evaluation", 4), ("sample", 4), ("step", 5),
        ("evaluation", 5), ("sample", 5), ("checkpoint", 5),
    ]  # fmt: skip
    assert diary.saves == [(2, True), (3, False), (5, False)]


def test_where_no_next_step_is_to_be_had_those_before_it_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when steps are lost because somebody who was asked for the next one is away."""
    plain, left = DataSource.next_step, iter(range(2))

    def dies(self: DataSource) -> list[Tree]:
        if next(left, None) is None:
            raise StorageError("nobody answers")
        return plain(self)

    monkeypatch.setattr(DataSource, "next_step", dies)
    diary = Diary()
    with pytest.raises(StorageError, match="nobody answers"):
        run(Script(), total=5, diary=diary)
    assert diary.saves == [(2, False)] and diary.abandoned is False
    nothing = Diary()
    with pytest.raises(StorageError):
        run(Script(), total=5, diary=nothing)
    assert not nothing.saves, "before the first step there is nothing to lose"


def test_an_evaluation_that_could_not_be_made_is_made_by_whoever_goes_on() -> None:
    """Breaks when steps are lost because a judge was away when held-out answers were to be scored, or when the run
    goes on as if they had been."""
    cadence = Cadence(evaluate_every=2)
    whole = run(Script(held_out=(3.0, 2.0, 2.5, 2.4)), total=5, cadence=cadence)
    for dies_at, step in ((1, 2), (3, 5)):
        diary, state = Diary(), LoopState(total_steps=5)
        script = Script(held_out=(3.0, 2.0, 2.5, 2.4))
        plain, left = script.evaluate, iter(range(dies_at))

        def dies(trees: Sequence[Tree], plain: Any = plain, left: Any = left) -> PassReport:
            if next(left, None) is None:
                raise StorageError("the judge is away")
            return plain(trees)  # type: ignore[no-any-return]

        script.evaluate = dies  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="the judge is away"):
            run(script, cadence=cadence, diary=diary, state=state)
        assert diary.saves[-1] == (step, False) and state.step == step and state.unseen
        script.evaluate = plain  # type: ignore[method-assign]
        status, state, _ = run(script, cadence=cadence, diary=diary, state=state)
        assert status == "finished" and not state.unseen
        kinds = [each for each in diary.kinds() if each[0] != "checkpoint"]
        assert kinds == [each for each in whole[2].kinds() if each[0] != "checkpoint"]
        assert state.best_step == 2 and (2, True) in diary.saves


def test_what_is_counted_and_logged() -> None:
    """Breaks when a mean is summed, the rate is not the schedule's, or the row table forgets a row."""
    _, state, diary = run(Script(losses=(2.0, 1.0, 4.0)), total=4)
    assert diary.values("step", "loss") == [2.0, 1.0, 4.0, 4.0]
    assert diary.values("step", "learning_rate") == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert (state.first_loss, state.last_loss, state.tokens, state.trained_tokens) == (2.0, 4.0, 40, 8)
    assert set(diary.row_excess) == set(range(8)) and (state.epoch, state.used) == (0, 8)
    assert diary.events[0].values["worst_rows"][0]["loss"] == 3.0


def test_the_time_that_a_step_waits_for_its_rows_is_told(monkeypatch) -> None:
    """Breaks when a slow source passes for slow training, or the other way round."""
    clock = [0.0]
    rows, work = DataSource.next_step, Script.forward_backward

    def slow_rows(source: DataSource) -> list[Tree]:
        clock[0] += 0.25
        return rows(source)

    def slow_work(script: Script, trees: Sequence[Tree]) -> PassReport:
        clock[0] += 0.5
        return work(script, trees)

    monkeypatch.setattr("luthier.train.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(DataSource, "next_step", slow_rows)
    monkeypatch.setattr(Script, "forward_backward", slow_work)
    _, _, diary = run(Script(), total=2)
    assert diary.values("step", "source_seconds") == [0.25, 0.25]
    assert diary.values("step", "seconds") == [0.75, 0.75]


def test_the_best_is_the_lowest_held_out_loss_after_the_start() -> None:
    """Breaks when the untrained model counts as the best, or a tie moves it."""
    script = Script(held_out=(1.0, 3.0, 2.0, 2.0, 2.5, 1.5))
    _, state, diary = run(script, total=5, cadence=Cadence(evaluate_every=1))
    assert (state.best_eval_loss, state.best_step, state.first_eval_loss, state.eval_loss) == (1.5, 5, 1.0, 1.5)
    assert [step for step, best in diary.saves if best] == [1, 2, 5]


def test_patience_counts_evaluations_without_gain_in_a_row() -> None:
    """Breaks when a gain does not start the count anew."""
    script = Script(held_out=(9.0, 3.0, 3.5, 2.0, 2.5, 2.1, 2.2))
    status, state, diary = run(script, total=20, cadence=Cadence(evaluate_every=1, patience=2))
    assert (status, state.step, state.best_step) == ("early-stopped", 5, 3)
    assert diary.saves[-1] == (5, False)


def test_a_request_to_stop_ends_after_the_step_with_a_checkpoint() -> None:
    """Breaks when a stop loses the step, or is taken for the end."""
    stop = StopRequest()
    diary = Diary()
    script = Script()
    original = script.optim_step

    def optim_step(*, factor: float = 1.0) -> StepReport:
        if script.done.count("optim_step") == 2:
            stop.ask("SIGTERM")
        return original(factor=factor)

    script.optim_step = optim_step  # type: ignore[method-assign]
    status, state, diary = run(script, stop=stop, diary=diary)
    assert (status, state.step, diary.saves) == ("stopped", 3, [(3, False)])
    assert diary.kinds()[-1] == ("checkpoint", 3)


def test_a_request_in_the_last_step_finishes() -> None:
    """Breaks when a run that is done says it must be resumed."""
    stop = StopRequest()
    stop.ask("SIGINT")
    assert run(Script(), total=1, stop=stop)[0] == "finished"


def test_out_of_time_evaluates_once_and_keeps_the_best() -> None:
    """Breaks when the last evaluation is not counted among the best, or is made twice."""
    script = Script(held_out=(3.0, 2.0))
    status, state, diary = run(script, cadence=Cadence(evaluate_every=1, minutes=1e-9))
    assert (status, state.step, state.best_step) == ("out-of-time", 1, 1)
    assert script.done.count("evaluate") == 2 and diary.saves == [(1, True)]
    status, state, diary = run(Script(held_out=(3.0, 2.0)), cadence=Cadence(minutes=1e-9))
    assert (status, state.best_step, diary.saves) == ("out-of-time", 1, [(1, True)])


def test_time_used_before_a_resume_counts() -> None:
    """Breaks when the clock starts anew with every life of a run."""
    state = LoopState(total_steps=9, step=3, used=6, train_seconds=120.0)
    assert run(Script(), state=state, cadence=Cadence(minutes=1))[:2] == ("out-of-time", state) and state.step == 4


@pytest.mark.parametrize(("losses", "norms"), [((math.nan,), (1.0,)), ((math.inf,), (1.0,)), ((1.0,), (math.nan,))])
def test_bad_steps_in_a_row_end_the_run_and_nothing_is_applied(losses: list[float], norms: list[float]) -> None:
    """Breaks when a loss that is not finite is stepped on, or a run goes on forever without a step."""
    script, diary = Script(losses=losses, norms=norms), Diary()
    with pytest.raises(NumericError, match="the update was not applied; 3 of 3 bad steps in a row"):
        run(script, diary=diary, cadence=Cadence(max_bad_steps=3, save_every=10))
    assert [event.values["what"] for event in diary.events if event.kind == "bad_step"] == [
        "gradient" if math.isfinite(losses[0]) else "loss"
    ] * 3
    assert all(event.values["rows"] for event in diary.events if event.kind == "bad_step")
    assert math.isfinite(losses[0]) or ("optim_step" not in script.done and script.done.count("zero_grad") == 3)
    assert diary.saves == []


@pytest.mark.parametrize(
    ("advantages", "cause"), [((0.0, 0.0), "alike"), ((0.0, 0.5), "no-gradient"), ((), "no-gradient")]
)
def test_a_gradient_of_zero_is_told_with_its_cause(advantages: tuple[float, ...], cause: str) -> None:
    """Breaks when answers that were worth more and less than others are called alike, or rows of a file are."""
    tokens, weights = np.zeros(2, np.int32), np.ones(2, np.float32)
    told: list[dict[Note, Floats]] = [{"advantage": np.full(2, each, np.float32)} for each in advantages]
    prompt = Segment(tokens, np.zeros(2, np.float32))
    trees = [Tree((prompt, Segment(tokens, weights, 0, notes=notes))) for notes in told or [{}]]
    watch = Watch(diary := Diary(), lambda: "", max_bad_steps=3, diagnose=None)
    for _ in range(2):
        watch.applied(LoopState(), StepReport(0.0, True), trees)
    watch.applied(LoopState(), StepReport(1.0, True), trees)
    assert [event.values["cause"] for event in diary.events] == [cause]


def test_a_single_bad_step_is_noted_and_the_count_starts_anew() -> None:
    """Breaks when bad steps far apart add up, or a bad loss is logged as a number."""
    nan = math.nan
    script, diary = Script(losses=(1.0, nan, nan, 1.0, nan, nan, 1.0)), Diary()
    _, state, _ = run(script, total=7, diary=diary, cadence=Cadence(max_bad_steps=3))
    assert state.bad_steps == 0 and state.skipped_steps == 4
    assert [kind for kind, _ in diary.kinds()].count("bad_step") == 4
    assert script.done.count("optim_step") == 3
    logged = diary.values("step", "loss")
    assert [math.isnan(loss) for loss in logged] == [False, True, True, False, True, True, False]


def test_without_held_out_rows_nothing_is_evaluated_and_the_end_is_saved() -> None:
    """Breaks when a checkpoint is best of nothing."""
    script = Script()
    status, state, diary = run(script, evaluates=False, cadence=Cadence(evaluate_every=1))
    assert status == "finished" and "evaluate" not in script.done and state.best_step is None
    assert diary.saves == [(6, False)]
