"""What the sandbox itself does wrong is never told as something that a program did, and nothing outlives anybody."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from luthier.core.errors import RefusedError
from luthier.sandbox import guest_process, running, zygotes
from luthier.sandbox import sandbox as machine
from luthier.sandbox.program import Call, Examination, Limits, Outcome, Program, Status
from luthier.sandbox.sandbox import Sandbox
from luthier.sandbox.zygotes import LostError, Zygote
from tests.architecture.source import SOURCE
from tests.sandbox.conftest import WAYS, opened, strongest

GOOD = Program("def f(x): return x", (Call("f", (1,)),))


def broke(told: Outcome | Examination) -> None:
    assert told.status is Status.BROKEN and told.reason
    assert not getattr(told, "returned", ()) and not getattr(told, "cases", ())


def zygote_of(sandbox: Sandbox) -> Zygote:
    return sandbox._workers[0].zygote(examiner=False)


def kill_all(zygote: Zygote) -> None:
    """As a hand from outside would, or the kernel when memory is short."""
    for process in [*psutil.Process(zygote.pid).children(recursive=True), psutil.Process(zygote.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_zygote_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    """Breaks when one loss of the sandbox costs a program its run."""
    sandbox.run(GOOD)
    kill_all(zygote_of(sandbox))
    assert sandbox.run(GOOD).returned[0].value == 1


def test_a_candidate_that_is_killed_from_outside_is_broken(walled: Sandbox) -> None:
    """Breaks when the kernel, short of memory, makes an honest program a failure; a program cannot kill itself so."""
    walled.run(GOOD)
    done, before = threading.Event(), {process.pid for process in psutil.Process().children(recursive=True)}

    def strike() -> None:
        while not done.is_set():
            time.sleep(0.1)
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.pid not in before:
                        process.kill()

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        broke(walled.run(Program("import time\ntime.sleep(5)")))
    finally:
        done.set()
        striker.join()
    outcome = walled.run(Program("import os, signal\ntry: os.kill(os.getpid(), 9)\nexcept OSError: pass\nprint(1)"))
    assert (outcome.status, outcome.stdout) == (Status.ENDED, "1\n")


@pytest.mark.parametrize("after", [0.0, 0.03, 0.2])
def test_a_zygote_that_is_killed_again_and_again_is_broken_not_a_verdict(sandbox: Sandbox, after: float) -> None:
    done = threading.Event()

    def strike() -> None:
        while not done.is_set():
            # Other tests of this process have children too.
            time.sleep(after)
            for child in psutil.Process().children():
                try:
                    if "luthier.sandbox" in " ".join(child.cmdline()):
                        kill_all(type("Z", (), {"pid": child.pid}))  # type: ignore[arg-type]
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            time.sleep(0.001)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        broke(sandbox.run(Program("import time\ntime.sleep(3)")))
        broke(sandbox.examine(Program("import time\ndef f(): time.sleep(3)"), "assert f() is None"))
    finally:
        done.set()
        striker.join()
    assert sandbox.run(GOOD).status is Status.ENDED


LEFT = """#!{python}
import os, socket, sys, time
before = os.getpid()
other = os.fork()
if other:
    open({note!r}, "w").write(str(other))
    os._exit(0)
while os.getppid() == before or {waits}: time.sleep(0.01)
control = socket.socket(fileno=os.dup(0))
control.send(b"W")
time.sleep(600)
"""


@pytest.mark.parametrize("waits", [False, True], ids=["goes on", "waits for ever"])
def test_what_a_zygote_has_left_is_no_zygote(waits: bool, tmp_path: Path) -> None:
    """Breaks when bubblewrap, killed before its child is bound to it, leaves a process that nobody ends: one that is
    waited for for minutes, or that serves without the one who was to watch over it."""
    script, note = tmp_path / "started", tmp_path / "note"
    script.write_text(LEFT.format(python=sys.executable, note=str(note), waits=waits), encoding="utf-8")
    script.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(LostError):
        Zygote(str(script), {"environment": {}})
    assert time.monotonic() - began < zygotes.START_SECONDS / 2
    left = int(note.read_text(encoding="utf-8"))
    until = time.monotonic() + 20
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.01)


def test_a_zygote_that_ends_while_its_child_goes_on_is_lost(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a candidate is believed whose zygote is watched over by nobody."""
    with monkeypatch.context() as patch:
        patch.setattr(Zygote, "gone", lambda self: True)
        broke(sandbox.run(GOOD))
    assert sandbox.run(GOOD).status is Status.ENDED


def fails(kind: type[BaseException], *words: object) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise kind(*words)

    return fail


@pytest.mark.parametrize(("owner", "name", "fault"), [
    (guest_process.os, "pipe2", fails(OSError, 24, "Too many open files")),
    (guest_process.socket, "socketpair", fails(OSError, 24, "Too many open files")),
    (zygotes.socket, "send_fds", fails(BrokenPipeError, 32, "Broken pipe")),
    (Zygote, "run", fails(LostError, "it does not answer")),
    (Zygote, "ended", fails(LostError, "it ended")),
    (guest_process.GuestProcess, "_read_channel", fails(OSError, 5, "Input/output error")),
    (running, "GuestProcess", fails(BlockingIOError, 11, "no process left")),
], ids=["pipes", "sockets", "hand over", "fork", "end", "read", "start"])  # fmt: skip
def test_a_fault_of_ours_is_broken_and_the_next_one_runs(
    sandbox: Sandbox, owner: object, name: str, fault: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a failure of pipes, descriptors or processes becomes an outcome, or stays."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        broke(sandbox.run(GOOD))
    assert sandbox.run(GOOD).returned[0].value == 1
    with monkeypatch.context() as patch:
        whole, left = getattr(owner, name), [1]
        patch.setattr(owner, name, lambda *given, **more: fault() if left and left.pop() else whole(*given, **more))
        assert sandbox.run(GOOD).returned[0].value == 1  # once is tried again


def test_a_host_without_descriptors_says_broken(sandbox: Sandbox) -> None:
    sandbox.run(GOOD)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        broke(sandbox.run(GOOD))
        broke(sandbox.examine(GOOD, "assert f(1) == 1"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sandbox.run(GOOD).status is Status.ENDED


def test_a_process_that_cannot_be_locked_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a step of the lock fails and the program runs with a wall less."""
    whole = machine._settings
    with strongest() as fine:
        steps = fine.steps
    for key, value in (("places", [("/nowhere", 1)]), ("limits", {"memory_bytes": "x"}), ("path", [])):
        monkeypatch.setattr(machine, "_settings", lambda *given, k=key, v=value: {**whole(*given), k: v})
        with pytest.raises(LostError):
            Sandbox(Limits(), steps, 1, (), {}).proved()


def test_descriptors_and_processes_do_not_add_up(sandbox: Sandbox) -> None:
    sandbox.run(GOOD)
    sandbox.examine(GOOD, "assert f(1) == 1")
    before = len(os.listdir("/proc/self/fd")), len(psutil.Process().children(recursive=True))  # noqa: PTH208
    for _ in range(20):
        sandbox.run(GOOD)
        sandbox.run(Program("raise ValueError"))
        sandbox.run(Program("x", stdin="text"))
        sandbox.examine(GOOD, "assert f(1) == 2")
    assert (len(os.listdir("/proc/self/fd")), len(psutil.Process().children(recursive=True))) == before  # noqa: PTH208


PARENT = """
import sys, threading, time
from luthier.sandbox.program import Limits, Program
from luthier.sandbox.sandbox import Sandbox
from luthier.sandbox.tiers import Steps, Tier
tier, bubblewrap, walls = sys.argv[1:]
sandbox = Sandbox(Limits(), Steps(Tier(tier), bubblewrap, walls), 2, (), {}).proved()
threads = [threading.Thread(target=sandbox.run, args=(Program("import time\\ntime.sleep(60)"),)) for _ in range(2)]
for thread in threads: thread.start()
time.sleep(0.3)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("way", [way if way in ("bubblewrap", "bare") else pytest.param(way, marks=pytest.mark.slow)
                                 for way in WAYS])  # fmt: skip
def test_nothing_outlives_a_parent_that_is_killed(way: str) -> None:
    """Breaks when `kill -9` of a run leaves a zygote or a candidate behind."""
    with opened(way) as sandbox:
        steps = sandbox.steps
    words = [steps.tier.value, steps.bubblewrap, steps.walls]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *words], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    until = time.monotonic() + 60
    while len(family := psutil.Process(parent.pid).children(recursive=True)) < 4:
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_walls_outlive_the_thread_that_asked_for_them() -> None:
    """Breaks when bubblewrap, which is bound to the thread that starts it, goes with a short-lived one."""
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(opened_here()))
    thread.start()
    thread.join()
    if not made:
        pytest.skip("no walls stand here")
    time.sleep(0.1)
    with made[0] as sandbox:
        before = zygote_of(sandbox)
        assert sandbox.run(GOOD).status is Status.ENDED and zygote_of(sandbox) is before


def opened_here() -> Sandbox:
    return machine.open_sandbox(workers=1)


def test_closing_ends_what_runs_and_starts_nothing_anew() -> None:
    """Breaks when a program whose walls were closed in another thread is tried again behind new ones."""
    before = psutil.Process().children()
    sandbox = strongest()
    said: list[object] = []

    def run() -> None:
        try:
            said.append(sandbox.run(Program("import time\ntime.sleep(20)")).status)
        except RefusedError as failure:
            said.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    sandbox.close()
    thread.join()
    assert time.monotonic() - began < 5 and isinstance(said[0], RefusedError)
    assert psutil.Process().children() == before


def test_an_interruption_leaves_a_sandbox_that_works(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when Ctrl-C in the middle of a program leaves answers for the next one to read."""
    with monkeypatch.context() as patch:
        patch.setattr(running, "answered", fails(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(GOOD)
    assert sandbox.run(GOOD).returned[0].value == 1
