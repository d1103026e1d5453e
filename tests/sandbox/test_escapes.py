"""More than two hundred programs that try to get out, and none of them does.

Each is judged from outside: nothing of it got the secret out, nothing outside was touched, we are alive, it ended in
time, nothing of it lives on, and the kernel's switches are what they were. The same programs do get out where there are
no walls: without that the suite could not fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Set
from pathlib import Path

import psutil
import pytest

from luthier.sandbox import sandbox as machine
from luthier.sandbox.program import Limits, Outcome, Program, Status
from luthier.sandbox.sandbox import Sandbox
from tests.sandbox import escapes
from tests.sandbox.conftest import WAYS, Outside, as_json, opened, strongest, unwalled

LET_IN = {"lent": {"a nameless program"}}
"""What is no way out, and the library of a GPU cannot do without."""
AT_ONCE = {**escapes.REACH, **escapes.KERNEL, **escapes.NETWORK, **escapes.SIGNALS, **escapes.CHANNEL}
TIGHT = Limits(seconds=0.6, cpu_seconds=0.6, memory_bytes=64 << 20, output_bytes=1 << 18, file_bytes=4 << 20)
SLACK = 4.0
"""Seconds beyond the limit that a busy machine is forgiven; `test_a_limit_is_kept` measures the half second."""


def test_there_are_at_least_120_programs() -> None:
    assert len(AT_ONCE) + len(escapes.CROSS) + len(escapes.RESOURCES) >= 230


def whole(code: str, outside: Outside, sandbox: Sandbox | None = None) -> str:
    facts = {**outside.facts, "writes": bool(sandbox and sandbox.steps.own_processes)}
    return escapes.PRELUDE.format(facts=as_json(facts)) + code


def out_of(outcome: Outcome, outside: Outside) -> str:
    """How a program got out; empty when it did not."""
    said = outcome.stdout + outcome.stderr + outcome.reason + repr(outcome.returned)
    if outside.secret in said:
        return "it told the secret"
    if "ESCAPED" in outcome.stdout:
        return outcome.stdout
    if "FORGED" in repr(outcome.returned) or outcome.status is Status.BROKEN:
        return f"{outcome.status}: {outcome.reason}"
    return outside.reached()


def processes(sandbox: Sandbox) -> set[int]:
    """Everything that was started for the sandbox and lives."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("way", [
    "bubblewrap",
    "bare",
    pytest.param("lent", marks=pytest.mark.slow),
    pytest.param("namespaces", marks=pytest.mark.slow),
    pytest.param("root", marks=pytest.mark.slow),
])  # fmt: skip
def test_no_program_gets_out(way: str, outside: Outside) -> None:
    """Breaks when one wall is missing: each program tries one way out."""
    with opened(way) as sandbox:
        attempt(sandbox, outside, LET_IN.get(way, set()))


def attempt(walled: Sandbox, outside: Outside, let_in: Set[str] = frozenset()) -> None:
    walled.run(Program("pass"))
    before, mounts = processes(walled), Path("/proc/self/mounts").read_text()
    got = {}
    for name, code in AT_ONCE.items():
        outcome = walled.run(Program(whole(code, outside, walled)))
        if how := out_of(outcome, outside):
            got[name] = how
        if processes(walled) != before:
            got[name] = "it lives on"
            before = processes(walled)
    assert {name: how for name, how in got.items() if name not in let_in} == {}
    assert not outside.switched() and Path("/proc/self/mounts").read_text() == mounts


@pytest.mark.slow
def test_bubblewrap_holds_where_the_kernel_has_no_landlock(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the stronger tier leans on what older kernels do not have."""
    whole = machine._settings
    monkeypatch.setattr(machine, "_settings", lambda *given: {**whole(*given), "landlock": 0})
    with opened("bubblewrap") as sandbox:
        attempt(sandbox, outside)


def test_nothing_of_one_candidate_reaches_the_next(walled: Sandbox, outside: Outside) -> None:
    """Breaks when candidates share a folder, memory, modules or processes."""
    got = {}
    for name, code in escapes.CROSS.items():
        walled.run(Program(whole(code, outside, walled)))
        outcome = walled.run(Program(whole(escapes.LOOKS, outside, walled)))
        if out_of(outcome, outside) or outcome.status is not Status.ENDED:
            got[name] = (outcome.status, outcome.stdout, outcome.stderr)
    assert got == {}


CHEAP = (
    "a fork bomb", "forks that leave", "zombies", "memory bit by bit", "memory at once", "no signals", "threads",
    "a flood of output", "fill the folder", "many files", "a deep parse", "a crash", "descriptors",
)  # fmt: skip


def test_resources_are_bounded(outside: Outside) -> None:
    """Breaks when a program outlasts its limits, or lives on. A part of them; the others are slow."""
    with strongest(TIGHT) as sandbox:
        exhaust(sandbox, outside, {name: escapes.RESOURCES[name] for name in CHEAP})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_all_resources_are_bounded_by_every_way(way: str, outside: Outside) -> None:
    with opened(way, TIGHT) as sandbox:
        exhaust(sandbox, outside, escapes.RESOURCES)


def exhaust(sandbox: Sandbox, outside: Outside, programs: dict[str, str]) -> None:
    sandbox.run(Program("pass"))
    before = processes(sandbox)
    got = {}
    for name, code in programs.items():
        began = time.monotonic()
        outcome = sandbox.run(Program(whole(code, outside, sandbox)))
        took = time.monotonic() - began
        if how := out_of(outcome, outside):
            got[name] = how
        elif took > TIGHT.seconds + SLACK:
            got[name] = f"it took {took:.1f} s"
        elif max(len(outcome.stdout), len(outcome.stderr)) > TIGHT.output_bytes:
            got[name] = "it wrote too much"
        elif processes(sandbox) != before:
            got[name] = "it lives on"
            before = processes(sandbox)
    assert got == {}


def test_a_limit_is_kept(sandbox: Sandbox) -> None:
    """Breaks when the wall time of a program is more than half a second over its limit; the best of three."""
    with strongest(Limits(seconds=0.3)) as short:
        over = []
        for _ in range(3):
            began = time.monotonic()
            outcome = short.run(Program("import time\nwhile True: time.sleep(1)"))
            over.append(time.monotonic() - began - 0.3)
            assert outcome.status is Status.TIMED_OUT
    assert min(over) < 0.5


@pytest.mark.parametrize("name", [
    "read the canary", "write the canary", "read the canary in a thread", "the environment of the host",
    "list the folder of the canary", "the command line of the parent", "/etc/passwd",
])  # fmt: skip
def test_without_walls_programs_that_read_do_get_out(name: str, outside: Outside) -> None:
    """The negative control: breaks when a program that is said to be stopped would not have come through anyway."""
    said = unwalled(whole(escapes.REACH[name], outside), outside)
    assert outside.secret in said or "ESCAPED" in said, said


@pytest.mark.parametrize("name", [
    "connect to a port", "connect without waiting", "a socket by name", "a socket by path", "listen",
    "a datagram to a socket by path", "a datagram to a socket by name", "a message to a socket by path",
])  # fmt: skip
def test_without_walls_programs_that_connect_do_get_out(name: str, outside: Outside) -> None:
    outside.reached()
    said = unwalled(whole(escapes.NETWORK[name], outside), outside)
    assert "ESCAPED" in said, said
    assert name == "listen" or outside.reached()


@pytest.mark.parametrize("name", ["a nameless program", "shared memory that stays", "adopt orphans"])
def test_without_walls_programs_that_ask_the_kernel_do_get_out(name: str, outside: Outside) -> None:
    code = {**escapes.KERNEL, **escapes.REACH}[name]
    tidy = "\nos.path.exists('/dev/shm/stays') and os.unlink('/dev/shm/stays')"
    assert "ESCAPED" in unwalled(whole(code, outside) + tidy, outside)


def test_the_host_is_who_it_was() -> None:
    """Last in the file: nothing above changed this process."""
    assert os.getpid() == psutil.Process().pid and psutil.Process().status() != psutil.STATUS_STOPPED
