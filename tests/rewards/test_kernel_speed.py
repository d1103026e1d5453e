"""Kernel speed: what is right and really faster is paid, by whatever device times it, and no way to look fast is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import DataError, RecipeError, SandboxUnavailableError
from luthier.data.kernel_programs import Form
from luthier.data.programs import program_in
from luthier.data.sample import Sample
from luthier.rewards import RewardError, Tools
from luthier.rewards.kernel_speed import KernelSpeed
from luthier.sandbox.program import Outcome, Program, Returned, Status
from luthier.train.scoring import Scoring
from tests.rewards.kernels import SOLUTIONS
from tests.rewards.samples import failure, sample, sandbox_tools, score
from tests.rewards.test_compiles import Broken

WORK = {
    "doubled": "row * 2", "silu": "row * torch.sigmoid(row)", "centred": "row - row.mean()", "cubed": "row * row * row",
    "shares": "torch.softmax(row, 0)",
}  # fmt: skip
"""What the slow programs do to each row, one after the other."""
SIZES = [[2048, 96]]
"""Enough rows that a program which hides its work can be seen to do so from outside."""


def slow(name: str, called: str | None = None) -> str:
    return f"import torch\n\ndef {called or name}(x):\n    return torch.stack([{WORK[name]} for row in x])\n"


def asked(name: str, program: str) -> Sample:
    return sample(f"```python\n{program}\n```", function=name, reference=slow(name), timed=SIZES)


KNOBS: dict[str, Any] = {"device": "cpu", "repeats": 3, "least": 1.5, "most": 3.0}
GOOD = asked("doubled", "import torch\n\ndef doubled(x):\n    return x * 2\n")
BAD = asked("doubled", slow("doubled"))
make_tools = sandbox_tools


def test_a_program_that_is_faster_is_paid_and_the_same_one_is_not() -> None:
    """Breaks when the ratio is upside down, the reference is not timed where the answer is, or noise is paid."""
    found = score(KernelSpeed(**KNOBS), GOOD, sandbox_tools())
    assert found.value == 1.0 and found.parts["speedup"] > 3.0 and found.parts["suspicious"] == 1.0, found
    assert found.parts["timed"] == found.parts["correct"] == 1.0 and found.parts["hack/clock"] == 0.0
    assert "times as fast" in found.reason
    assert score(KernelSpeed(**KNOBS), BAD, sandbox_tools()).value == 0.0


# ------------------------------------------------------------------------- the verdict, on times that are made up
ROUNDS, REPEATS = 3, 2


def raced(slow_ms: float, fast_ms: float, **more: Any) -> Broken:
    """A sandbox whose programs answer in these times. `hidden` are milliseconds beside the inner clock."""
    return Timed(slow_ms, fast_ms, **more)


class Timed(Broken):
    """Answers as kernels/race.py does, in times of its own; what a round hides grows with its repetitions."""

    def __init__(
        self, slow_ms: float, fast_ms: float, *, hidden: float = 0.0, busy: float = 0.0, wobble: float = 0.0,
        begun: float = 0.0, value: float = 1.0,
        untouched: Any = True, claims: Any = None, kind: str = "torch.float32",
    ) -> None:  # fmt: skip
        super().__init__([])
        self.times = (slow_ms, fast_ms)
        self.hidden, self.busy, self.wobble, self.claims = hidden, busy, wobble, claims
        self.value, self.untouched, self.kind = value, untouched, kind
        self.begun, self.repeats = begun, REPEATS

    def run(self, program: Program) -> Outcome:
        self.asked.append(program)
        both = len(self.asked) % 2 == 1
        self.cpu = self.begun * 1e-3 if both else 0.0
        entered, laps, returned = 0, 0, []
        for call in program.calls:
            if call.function == "race.enter":
                entered, laps = entered + 1, 0
            last = entered == 2
            laps += call.function == "race.timed"
            if call.function == "race.draw":
                self.repeats = len(call.arguments[0])
            returned.append(self._answer(call.function, laps, answer=both and last, last=last, alone=not both))
        return Outcome(Status.ENDED, returned=tuple(returned), cpu_seconds=self.cpu)

    def _answer(self, function: str, laps: int, *, answer: bool, last: bool, alone: bool) -> Returned:
        if function == "race.values":
            value, kind, untouched = (self.value, self.kind, self.untouched) if answer else (1.0, "torch.float32", True)
            return Returned([[kind, [2], [value, 2.0], untouched]] * 8)
        if function != "race.timed":
            return Returned()
        # A lap that other work got in the way of; and a machine that has become slower.
        each = self.times[answer] * 1e-3 * (9 if laps == 3 else 1) * (1 + self.wobble * alone)
        longer = self.repeats // REPEATS
        beside = (self.hidden * longer if answer else self.busy * (laps == 3) * alone) * 1e-3
        claimed = [each] * self.repeats
        if answer and self.claims is not None:
            claimed = self.claims * longer if isinstance(self.claims, list) else self.claims
        seconds = each * self.repeats + 0.01 + beside
        self.cpu += seconds
        return Returned(claimed, seconds=seconds)


def judged(sandbox: Broken, **knobs: Any) -> Any:
    made = KernelSpeed(device="cpu", rounds=ROUNDS, repeats=REPEATS, **knobs)
    [verdict] = made.score([GOOD], sandbox.tools())
    return verdict


@pytest.mark.parametrize(
    ("times", "value"),
    [((8.0, 1.0), 1.0), ((8.0, 8.0 / 8**0.5), 0.5), ((8.0, 7.9), 0.0), ((8.0, 16.0), 0.0), ((8.0, 0.1), 1.0)],
)  # fmt: skip
def test_what_is_faster_counts_on_a_scale_of_logarithms_up_to_a_bound(times: tuple[float, float], value: float) -> None:
    found = judged(raced(*times))
    assert found.value == pytest.approx(value) and found.parts["speedup"] == pytest.approx(times[0] / times[1])
    assert found.parts["suspicious"] == float(times[0] / times[1] > 8.0)


def test_a_machine_that_takes_as_much_from_the_reference_accuses_nobody() -> None:
    """Breaks when an honest answer is called a cheat because other work came in between."""
    verdict = judged(raced(8.0, 1.0, wobble=-0.5))
    assert isinstance(verdict, RewardError) and verdict.again
    assert judged(raced(8.0, 1.0, busy=20.0)).value == 1.0


def test_who_hid_time_in_one_race_alone_is_not_accused() -> None:
    """Breaks when one disturbance of the machine calls an honest answer a cheat, or a cheat that was lucky is paid."""

    class Once(Timed):
        def run(self, program: Program) -> Outcome:
            self.hidden = 60.0 if len(self.asked) == 0 else 0.0
            return super().run(program)

    sandbox = Once(8.0, 1.0)
    verdict = judged(sandbox)
    assert isinstance(verdict, RewardError) and verdict.again and len(sandbox.asked) == 4
    always = raced(8.0, 1.0, hidden=60.0)
    found = judged(always)
    assert not isinstance(found, RewardError) and found.value == 0.0 and found.parts["hack/clock"] == 1.0
    assert len(always.asked) == 4


def test_what_a_process_takes_once_accuses_nobody() -> None:
    """Breaks when an honest answer is called a cheat because its process took longer to begin, again and again.

    The limit of the race that looks again has to grow with it, or an honest reference that is slow runs out of time.
    """
    sandbox, seconds = raced(8.0, 1.0, begun=300.0), []

    def opened(limits: Any, **ignored: Any) -> Any:
        seconds.append(limits.seconds)
        return sandbox

    made = KernelSpeed(device="cpu", rounds=ROUNDS, repeats=REPEATS, seconds=10.0)
    [verdict] = made.score([GOOD], Tools(sandbox=opened))
    assert isinstance(verdict, RewardError) and verdict.again and len(sandbox.asked) == 4
    assert seconds == [seconds[0], seconds[0] + 30.0]
    assert judged(raced(8.0, 1.0, begun=3000.0)).parts["hack/clock"] == 1.0  # more than such a race can tell apart


def test_time_that_only_our_clock_sees_pays_nothing() -> None:
    """Breaks when the inner clock is believed alone: a patched one, work on a stream that no event sees."""
    assert judged(raced(8.0, 1.0, hidden=6.0)).value == 1.0  # less than half of what was gained
    for sandbox in (raced(8.0, 1.0, hidden=40.0), raced(8.0, 8.0, claims=[1e-3] * REPEATS)):
        found = judged(sandbox)
        assert found.value == 0.0 and found.parts["hack/clock"] == 1.0 and "went elsewhere" in found.reason, found


@pytest.mark.parametrize("claims", [[1e-7] * REPEATS, "0", [-1.0] * REPEATS, [0.0], [float("nan")] * REPEATS])
def test_a_clock_that_tells_no_time_pays_nothing_whatever_ours_says(claims: Any) -> None:
    """Breaks when nonsense is held against our clock alone, and other work makes that one agree."""
    found = judged(raced(8.0, 1.0, claims=claims, wobble=0.3))
    assert found.value == 0.0 and found.parts["hack/clock"] == 1.0 and "no time at all" in found.reason, found


@pytest.mark.parametrize(
    ("more", "told"),
    [({"value": 1.1}, "not that of the reference"), ({"value": float("nan")}, "not that of the reference"),
     ({"untouched": False}, "changed its inputs"), ({"untouched": 1}, "changed its inputs"),
     ({"kind": "torch.float64"}, "torch.float64")],
)  # fmt: skip
def test_what_was_timed_is_looked_at_afterwards(more: dict[str, Any], told: str) -> None:
    """Breaks when a fast answer is paid whose values, kind or inputs are not what they should be."""
    found = judged(raced(8.0, 1.0, **more))
    assert found.value == 0.0 and found.parts["correct"] == 0.0 and told in found.reason


def test_noise_and_a_broken_sandbox_are_no_verdict() -> None:
    verdict = judged(raced(8.0, 1.0, wobble=3.0))
    assert isinstance(verdict, RewardError) and "differ 4.0 times" in str(verdict)
    broken = Broken([Outcome(Status.BROKEN, reason="no zygote")])
    assert failure(KernelSpeed(device="cpu"), GOOD, broken.tools()).again


def test_inputs_and_places_are_drawn_after_the_answer_and_differ_from_those_of_the_reference() -> None:
    """Breaks when seeds are fixed, or a program is timed on what another has left in memory."""

    def seeds(one: Sample, **more: Any) -> list[list[list[int]]]:
        sandbox = raced(8.0, 1.0)
        made = KernelSpeed(device="cpu", rounds=ROUNDS, repeats=REPEATS)
        made.score([one], Tools(sandbox=lambda limits, **ignored: sandbox, **more))  # type: ignore[arg-type,return-value]
        return [[call.arguments[0] for call in program.calls if call.function in ("race.draw", "race.values")]
                for program in sandbox.asked]  # fmt: skip

    both, known = seeds(GOOD)
    assert both == known, "the reference that is compared with has the inputs of the answer"
    flat = [seed for lap in both[:-1] for seed in lap]
    assert len(set(flat)) == len(flat) == 2 * (ROUNDS + 1) * REPEATS
    assert seeds(GOOD) == [both, known] != seeds(GOOD, step=1)
    assert len(known[-1]) == 64 and all(0 <= place < 1 for place in known[-1])


# ------------------------------------------------------------------------------------------------------- ways to cheat
HACKS = dict(re.findall(r"^%% (\S+)\n(.*?)(?=^%% |\Z)", Path(__file__).with_name("kernel_speed_hacks.txt").read_text(),
                        re.MULTILINE | re.DOTALL))  # fmt: skip


def cheating(hack: str, name: str) -> Sample:
    """An answer that has the slow program, under another name, and tries to look faster than it is."""
    return asked(name, slow(name, "original") + "\n" + HACKS[hack].replace("@NAME@", name))


def too_fast(samples: list[Sample]) -> list[str]:
    scored = Scoring(KernelSpeed(**KNOBS), sandbox_tools()).score(samples)
    pairs = zip(samples, scored.scores, strict=True)
    return [f"{one.answer}\n{found.reason}" for one, found in pairs if found is not None and found.value > 0]


def test_no_way_to_look_fast_is_paid() -> None:
    """Breaks when an answer gets more than nothing without being faster. A third of the ways, most of them stopped by
    their form; the slow test tries all of them without it."""
    assert len(HACKS) >= 35
    assert not too_fast([cheating(hack, list(WORK)[at % len(WORK)]) for at, hack in enumerate(HACKS)][::3])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_way_to_look_fast_is_paid_where_no_form_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the language is all that stands between a program and the clock: here anything may be written."""
    monkeypatch.setattr("luthier.rewards.kernel_speed.torch_form",
                        lambda said, name: Form(1.0, "", program_in(said) or ""))  # fmt: skip
    assert not too_fast([cheating(hack, name) for hack in HACKS for name in list(WORK)[:2]])


# ----------------------------------------------------------------------------------------------- devices, or none
def test_without_a_gpu_nothing_is_timed_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when seconds of Triton's interpreter are taken for speed, or the lack of a GPU for slowness."""
    monkeypatch.setattr("luthier.rewards.kernel_speed.gpus_for", lambda device: ())
    kernel = sample(SOLUTIONS["silu"], **GOOD.facts)
    found = score(KernelSpeed(), kernel, Broken([]).tools())
    assert found.value == found.parts["timed"] == 0.0 and "there is no GPU" in found.reason
    with pytest.raises(SandboxUnavailableError, match="GPU"):
        score(KernelSpeed(device="cuda"), kernel, Broken([]).tools())


def test_on_a_gpu_kernels_are_asked_for_and_its_device_files_are_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when programs of PyTorch are timed as kernels, or something else than the GPU is let in."""
    monkeypatch.setattr("luthier.rewards.kernel_speed.gpus_for", lambda device: ("/dev/nvidia0",))
    sandbox, opened = raced(8.0, 1.0), []

    def lend(limits: Any, **more: Any) -> Any:
        opened.append(more)
        return sandbox

    made = KernelSpeed(rounds=ROUNDS, repeats=REPEATS)
    assert score(made, GOOD, Tools(sandbox=lend)).reason.startswith("no function is decorated")
    facts = {**GOOD.facts, "function": "silu"}
    assert score(made, sample(SOLUTIONS["silu"], **facts), Tools(sandbox=lend)).value == 1.0
    assert opened[-1]["devices"] == ("/dev/nvidia0",) and "triton" in opened[-1]["preload"]
    assert "cuda_stopwatch()" in sandbox.asked[-2].source
    enters = [call.arguments[2] for call in sandbox.asked[-2].calls if call.function == "race.enter"]
    assert enters[0] is None and "empty_like" in enters[1] and "sigmoid" not in enters[1]


def test_a_gpu_on_which_no_kernel_runs_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a compiler that is missing behind the walls becomes a reward of 0."""
    monkeypatch.setattr("luthier.rewards.kernel_speed.gpus_for", lambda device: ("/dev/nvidia0",))

    class NoCompiler(Timed):
        def run(self, program: Program) -> Outcome:
            done = super().run(program)
            if len(self.asked) == 2:
                return done
            return Outcome(Status.ENDED, returned=tuple(
                each if at < 9 and len(self.asked) == 1 else Returned(None, "no C compiler", "RuntimeError")
                for at, each in enumerate(done.returned)))  # fmt: skip

    made = KernelSpeed(rounds=ROUNDS, repeats=REPEATS)
    one = sample(SOLUTIONS["silu"], **{**GOOD.facts, "function": "silu"})
    told = failure(made, one, NoCompiler(8.0, 1.0).tools())
    assert "no C compiler" in str(told) and not told.again


@pytest.mark.parametrize(
    ("column", "value", "part"),
    [("timed", [], "timed is"), ("timed", [3], "timed is"), ("timed", "no", "timed is"),
     ("timed", [["a"]], "timed is"), ("reference", "def doubled(x):\n    return y", "fails on timed")],
)  # fmt: skip
def test_a_row_that_cannot_be_raced_is_the_fault_of_the_row(column: str, value: Any, part: str) -> None:
    tools = sandbox_tools() if column == "reference" else Broken([]).tools()
    with pytest.raises(DataError, match=part):
        score(KernelSpeed(**KNOBS), sample(GOOD.answer, **{**GOOD.facts, column: value}), tools)


def test_it_needs_a_sandbox() -> None:
    with pytest.raises(RecipeError, match="sandbox"):
        KernelSpeed(**KNOBS).score([GOOD], Tools())
