"""What a program did is told as it was: values, errors, output, time, and how it ended."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from luthier.core.errors import RefusedError, SandboxUnavailableError
from luthier.sandbox import sandbox as machine
from luthier.sandbox import tiers
from luthier.sandbox.program import Call, Limits, Outcome, Program, Status
from luthier.sandbox.sandbox import Sandbox, open_sandbox
from luthier.sandbox.tiers import Steps, Tier
from tests.sandbox.conftest import SMALL, WAYS, opened, steps_of, strongest


def called(sandbox: Sandbox, source: str, *arguments: object, function: str = "f") -> Outcome:
    return sandbox.run(Program(source, (Call(function, arguments),)))


def test_a_function_is_called_and_its_value_comes_back(walled: Sandbox) -> None:
    """Breaks when a way to the walls does not lead to a working interpreter."""
    outcome = called(walled, "import math\ndef f(x, *, k=1): return (x, {k: {math.floor(x)}})\nprint('hi')", 2.5)
    assert outcome.status is Status.ENDED and outcome.compiled and outcome.stdout == "hi\n"
    assert outcome.returned[0].value == (2.5, {1: {2}}) and outcome.returned[0].error is None
    assert 0 < outcome.returned[0].seconds < outcome.seconds and outcome.cpu_seconds > 0


def test_calls_are_answered_one_by_one_in_one_process(sandbox: Sandbox) -> None:
    source = "n = 0\ndef f(x):\n    global n\n    n += 1\n    return [n, x / x]\n"
    source += "class C:\n    def g(self): return 7\nc = C()"
    calls = (Call("f", (2,)), Call("f", (0,)), Call("f", (1,)), Call("C().g"), Call("c.g"), Call("none"), Call("f"))
    outcome = sandbox.run(Program(source, calls))
    values = [returned.value for returned in outcome.returned]
    assert outcome.status is Status.ENDED and values == [[1, 1.0], None, [3, 1.0], 7, 7, None, None]
    assert outcome.returned[1].error == "ZeroDivisionError: division by zero"
    assert [returned.raised for returned in outcome.returned[5:]] == ["NameError", "TypeError"]


@pytest.mark.parametrize(("source", "status", "raised"), [
    ("x = 1", Status.ENDED, ""),
    ("raise ValueError('no')", Status.RAISED, "ValueError"),
    ("class E(KeyError): pass\nraise E(1)", Status.RAISED, "KeyError"),
    ("def f(:", Status.RAISED, "SyntaxError"),
    ("import numpy_is_not_there", Status.RAISED, "ModuleNotFoundError"),
    ("import sys\nsys.exit(3)", Status.EXITED, ""),
    ("import sys\nsys.exit(0)", Status.ENDED, ""),
    ("exit()", Status.ENDED, ""),
    ("import os\nos._exit(0)", Status.EXITED, ""),
    ("import ctypes\nctypes.string_at(0)", Status.KILLED, ""),
    ("x = bytearray(1 << 36)", Status.OUT_OF_MEMORY, "MemoryError"),
    ("while True: print('x' * 10000)", Status.KILLED, ""),
])  # fmt: skip
def test_how_a_program_ended_is_told(sandbox: Sandbox, source: str, status: Status, raised: str) -> None:
    outcome = sandbox.run(Program(source))
    assert (outcome.status, outcome.raised) == (status, raised), outcome
    assert outcome.compiled is (source != "def f(:")
    assert bool(outcome.reason) is (status is not Status.ENDED)


@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(60)", "def f():\n    while 1: pass"])
def test_time_ends(source: str) -> None:
    with strongest(Limits(seconds=0.3, cpu_seconds=30)) as short:
        began = time.monotonic()
        outcome = short.run(Program(source, (Call("f"),) if "def" in source else ()))
        assert outcome.status is Status.TIMED_OUT and time.monotonic() - began < 3 and "0.3 s" in outcome.reason


@pytest.mark.parametrize("source", ["while True: pass", "import os\nif os.fork(): os.wait()\nelse:\n    while True: pass"])
def test_processor_time_ends(source: str) -> None:
    """Breaks when it is not counted, or not that of processes that were waited for."""
    with strongest(Limits(seconds=30, cpu_seconds=0.5)) as short:
        if "fork" in source and not short.steps.own_processes:
            pytest.skip("this way allows no new processes")
        outcome = short.run(Program(source))
    assert outcome.status is Status.TIMED_OUT and "processor" in outcome.reason


def test_a_call_that_exits_did_not_answer(sandbox: Sandbox) -> None:
    for leave in ("os._exit(0)", "sys.exit(0)", "exit(0)", "raise SystemExit", "os.abort()", "builtins.quit()",
                  "os.execv('/bin/true', ['true']) if own else os._exit(0)"):  # fmt: skip
        outcome = called(sandbox, f"import os, sys, builtins\nown = {sandbox.steps.own_processes}\ndef f(): {leave}")
        assert outcome.status is not Status.ENDED and not [one for one in outcome.returned if one.error is None], leave


SPEAK = "import json, os\nb = json.dumps({'is': 'answer', 'value': 5}).encode()\nb = len(b).to_bytes(4, 'big') + b\n"


@pytest.mark.parametrize(("source", "answers"), [
    ("os.write(3, b * 2)\ndef f(): return 1", 0),
    ("def f():\n    os.write(3, b * 2)\n    return 1", 1),
    ("def f():\n    os.write(3, b)\n    os._exit(0)", 1),
])  # fmt: skip
def test_who_answers_before_the_question_is_not_heard(sandbox: Sandbox, source: str, answers: int) -> None:
    """Breaks when answers can be written ahead, so that a call seems to take no time."""
    outcome = sandbox.run(Program(SPEAK + source, (Call("f"), Call("f"))))
    assert outcome.status in (Status.KILLED, Status.EXITED) and len(outcome.returned) == answers, outcome


def test_memory_of_several_processes_is_one_limit() -> None:
    """Breaks when each of them may use all of it."""
    source = "import os, time\nfor _ in range(6):\n    if os.fork() == 0: break\nx = bytearray(b'x' * (40 << 20))\ntime.sleep(9)"
    with strongest(Limits(seconds=8.0, memory_bytes=128 << 20)) as small:
        if not small.steps.own_processes or not small.steps.bubblewrap:
            pytest.skip("this way allows no new processes, or has no /proc to look into")
        outcome = small.run(Program(source))
    assert outcome.status is Status.OUT_OF_MEMORY and "together" in outcome.reason and outcome.seconds < 5


def test_a_fork_of_the_host_leaves_the_sandbox_alone(sandbox: Sandbox) -> None:
    """Breaks when a worker that was forked ends or uses the walls of its parent."""
    sandbox.run(Program("x = 1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks where there are threads
        child = os.fork()
    if child == 0:
        try:
            sandbox.run(Program("x = 1"))
        except RefusedError:
            sandbox.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert sandbox.run(Program("x = 1")).status is Status.ENDED


def test_a_script_reads_its_input_and_its_files(sandbox: Sandbox) -> None:
    script = "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin)))\n"
    script += "    print('é', file=sys.stderr)"
    outcome = sandbox.run(Program(script, stdin="1\n2\n3\n"))
    assert (outcome.status, outcome.stdout, outcome.stderr) == (Status.ENDED, "6\n", "é\n")
    files = Program("print(open('a/b.txt').read()); open('c', 'w').write('x')", files={"a/b.txt": "text"})
    outcome = sandbox.run(files)
    if sandbox.steps.own_processes:
        assert (outcome.status, outcome.stdout) == (Status.ENDED, "text\n")
    else:
        assert outcome.status is Status.REFUSED and "namespaces" in outcome.reason


@pytest.mark.parametrize("program", [
    Program("x" * (5 << 20)),
    Program("x = 1", files={"/etc/passwd": ""}),
    Program("x = 1", files={"a/../../b": ""}),
    Program("x = '\ud800'"),
    Program("x = 1", (Call("f", (object(),)),)),
    Program("x = 1", (Call("f; g", ()),)),
    Program("x = 1", (Call("__import__('os').system", ()),)),
])  # fmt: skip
def test_what_does_not_cross_is_refused_and_not_run(sandbox: Sandbox, program: Program) -> None:
    outcome = sandbox.run(program)
    assert outcome.status is Status.REFUSED and outcome.reason and outcome.seconds == 0


def test_a_value_that_is_no_plain_data_is_told_apart_from_an_error(sandbox: Sandbox) -> None:
    [returned] = called(sandbox, "class A: pass\ndef f(): return A()").returned
    assert not returned.crosses and returned.error == "a value of the kind A does not cross; plain data does"


def test_the_same_program_gives_the_same_answer(sandbox: Sandbox) -> None:
    """Breaks when the order of a set depends on the process."""
    source = "def f(): return list({'a', 'b', 'c', 'd', 'e'})"
    assert len({tuple(called(sandbox, source).returned[0].value) for _ in range(5)}) == 1


def test_randomness_differs_between_processes(sandbox: Sandbox) -> None:
    """Breaks when every candidate draws what the zygote would have drawn."""
    assert len({called(sandbox, "import random\nf = random.random").returned[0].value for _ in range(4)}) == 4


def test_many_at_a_time_come_back_in_order() -> None:
    with strongest(workers=3) as several:
        outcomes = several.run_all(Program("def f(x): return x * x", (Call("f", (n,)),)) for n in range(40))
    assert [outcome.returned[0].value for outcome in outcomes] == [n * n for n in range(40)]


def test_modules_of_ours_are_there_when_asked_for() -> None:
    """Breaks when an import of numpy needs what the walls hide."""
    source = "import numpy as np\ndef f(x): return np.array(x).dot(np.array(x)), np.arange(3.0)"
    with strongest(preload=("numpy",)) as sandbox:
        outcome = called(sandbox, source, [1, 2, 3])
    assert outcome.returned[0].value == (14, [0.0, 1.0, 2.0]), outcome


def test_the_environment_is_what_was_asked_for() -> None:
    with strongest(environment={"TRITON_INTERPRET": "1"}) as sandbox:
        assert called(sandbox, "import os\ndef f(): return os.environ['TRITON_INTERPRET']").returned[0].value == "1"


def test_a_closed_sandbox_says_so_and_leaves_nothing() -> None:
    before = psutil.Process().children(recursive=True)
    sandbox = strongest()
    sandbox.run(Program("x = 1"))
    sandbox.close()
    sandbox.close()
    assert psutil.Process().children(recursive=True) == before
    with pytest.raises(RefusedError, match="closed"):
        sandbox.run(Program("x = 1"))


# ------------------------------------------------------------------------------------------------------------- tiers


def test_the_strongest_way_is_tried_first_and_a_weaker_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Steps(Tier.A, bubblewrap="/nowhere/bwrap")
    standing = [steps for steps in tiers.ways(None) if steps.tier is Tier.B]
    monkeypatch.setattr(machine, "ways", lambda tier: iter([broken, *standing]))
    try:
        sandbox = open_sandbox(workers=1)
    except SandboxUnavailableError as failure:
        pytest.skip(str(failure))
    with sandbox:
        assert sandbox.tier is Tier.B and "in bubblewrap" in sandbox.passed_over[0]
        assert any("Landlock" in layer for layer in sandbox.layers)


def test_where_no_walls_stand_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when there is a way to run a program without walls."""
    monkeypatch.setattr(tiers.shutil, "which", lambda _: None)
    monkeypatch.setattr(tiers, "landlock_version", lambda: 0)
    with pytest.raises(SandboxUnavailableError) as told:
        open_sandbox()
    assert told.value.exit_code == 77 and "bubblewrap" in told.value.allowed
    for tier in Tier:
        with pytest.raises(SandboxUnavailableError):
            open_sandbox(tier=tier)


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxUnavailableError, match="riscv64"):
        open_sandbox()


def test_root_of_a_container_is_told_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the interpreter of root's home is tried behind walls where nobody can read it."""
    seen = tiers.View((("/usr", "/usr"), ("/nobody/reads", "/nobody/reads")), {}, (), "/usr/bin/python3")
    monkeypatch.setattr(tiers.Path, "is_dir", lambda self: True)
    mode = lambda path: 0o700 if "nobody" in str(path) else 0o755  # noqa: E731
    monkeypatch.setattr(tiers.Path, "stat", lambda self: SimpleNamespace(st_mode=mode(self)))
    with pytest.raises(tiers.UnreachableError, match="/nobody/reads"):
        tiers.must_be_reachable(seen)


def test_walls_without_landlock_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test's own negative control: breaks when it finds nothing where a guest can read all files."""
    opened("bare").close()  # skips where this way does not exist
    whole = machine._settings
    monkeypatch.setattr(machine, "_settings", lambda *given: {**whole(*given), "landlock": 0})
    with pytest.raises(SandboxUnavailableError, match="read a file of the host"):
        Sandbox(SMALL, steps_of("bare"), 1, (), {}).proved()


@pytest.mark.parametrize("way", ["bubblewrap", "namespaces"])
def test_walls_with_a_view_too_many_are_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(way).close()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        whole = machine._settings

        def holed(*given: Any) -> dict[str, Any]:
            found = whole(*given)
            return {**found, "view": [*found["view"], [folder] * 2], "places": [*found["places"], (folder, 0xD)]}

        monkeypatch.setattr(machine, "_settings", holed)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(SandboxUnavailableError, match="read a file of the host, list a folder of the host"):
            Sandbox(SMALL, steps_of(way), 1, (), {}).proved()


def test_every_way_that_stands_says_what_it_is(walled: Sandbox) -> None:
    assert walled.tier.value in walled.layers and "system call filter" in walled.layers
    assert {*WAYS} and walled.steps.tier in Tier


# ------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_hundred_candidates_a_second(way: str) -> None:
    """The mark, on two idle cores; what a busy machine shows is bounded through processor time."""
    programs = [Program("def f(x): return sorted(x)", (Call("f", ([3, 1, 2],)),))] * 300
    with opened(way, workers=2) as sandbox:
        sandbox.run_all(programs[:8])
        began, own = time.monotonic(), time.process_time()
        outcomes = sandbox.run_all(programs)
        rate = len(programs) / (time.monotonic() - began)
        used = time.process_time() - own + sum(outcome.cpu_seconds for outcome in outcomes)
    print(f"{way}: {rate:.0f} candidates/s, {1000 * used / len(programs):.1f} ms of processor time each")
    assert all(outcome.status is Status.ENDED for outcome in outcomes)
    assert used / len(programs) < 0.020


def test_a_host_with_many_open_files_shows_none_of_them() -> None:
    """Breaks when a descriptor keeps the number that it has in the host, where a guest would find it."""
    with contextlib.ExitStack() as kept:
        for _ in range(300):
            kept.enter_context(Path("/dev/null").open())
        with strongest() as sandbox:
            assert sandbox.run(Program("print(1)")).stdout == "1\n"
