"""The sandbox: open it once, run many programs in it.

Idea: a program of a model is an adversary. It runs in a fresh process behind walls that are proved to stand before the
first program is let in; what it returns is plain data that is built anew here; and where the walls cannot be built,
nothing is run. The verdict is made outside: this file says what happened, never whether that is good.
Source: the tiers and the suite of escapes are those of docs/sandbox.md.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar, final

from luthier.core.errors import RefusedError, SandboxUnavailableError
from luthier.sandbox.devices import ALWAYS, SETTINGS, about_devices, require_devices
from luthier.sandbox.examining import examine_program
from luthier.sandbox.guest.kernel import DEVICE_CONTROL, LOOK, READ, WRITE, landlock_version
from luthier.sandbox.program import Examination, Limits, Outcome, Program, Status
from luthier.sandbox.running import run_program
from luthier.sandbox.self_test import must_hold
from luthier.sandbox.tiers import (
    FIX,
    Steps,
    Tier,
    UnreachableError,
    View,
    lesser_user,
    may_mount,
    must_be_reachable,
    view,
    ways,
)
from luthier.sandbox.zygotes import LostError, Zygote

HOMES: Final = ("/guest", "/luthier-guest")
"""The folder of a candidate: its own, in memory, gone with it. The first that covers nothing that it must see."""
_FILES: Final = 1024
_OTHERS: Final = 3
"""Processes besides those of the candidate that count against its user: the zygote and what started it."""
_PROBING: Final = Limits(seconds=30.0, cpu_seconds=30.0)
_Result = TypeVar("_Result")


def open_sandbox(
    limits: Limits | None = None,
    *,
    tier: Tier | None = None,
    workers: int | None = None,
    preload: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    devices: Sequence[str] = (),
) -> Sandbox:
    """A sandbox of the strongest tier that stands here, or of `tier`. Raises SandboxUnavailableError where none does.

    `workers` programs run at a time. `preload` names modules of our own packages that programs may import, and that
    are imported before; without any, only the standard library is there. `environment` is added to what guests see.
    `devices` are files of /dev that they may use besides, such as those of a GPU (`devices.gpu_devices`).
    """
    require_devices(devices)
    reasons: list[str] = []
    for steps in ways(tier):
        try:
            if devices and not steps.own_processes:
                raise UnreachableError("a device is let in only where programs have a root of their own")
            count = workers or os.cpu_count() or 1
            sandbox = Sandbox(limits or Limits(), steps, count, preload, environment or {}, devices)
            sandbox.passed_over = tuple(reasons)
            return sandbox.proved()
        except (LostError, UnreachableError) as failure:
            reasons.append(f"{steps}: {failure}")
    raise SandboxUnavailableError("no walls stand here: " + "; ".join(reasons), allowed=FIX)


@final
class _Worker:
    """Two zygotes, of which the second one is started when tests are to be run: they never meet a candidate."""

    def __init__(self, start: Callable[[bool], Zygote]) -> None:
        self._start = start
        self._zygotes: dict[bool, Zygote] = {}

    def zygote(self, *, examiner: bool) -> Zygote:
        if examiner not in self._zygotes:
            self._zygotes[examiner] = self._start(examiner)
        return self._zygotes[examiner]

    def close(self) -> None:
        # One by one, as another thread may be closing the same.
        with suppress(KeyError):
            while True:
                self._zygotes.popitem()[1].close()


@final
class Sandbox:
    """Walls that stand. A context manager; one object serves several threads. Made by `open_sandbox`."""

    def __init__(
        self, limits: Limits, steps: Steps, workers: int, preload: Sequence[str], environment: Mapping[str, str],
        devices: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.limits = limits
        self.steps = steps
        self._owner = os.getpid()
        self.passed_over: tuple[str, ...] = ()
        """Stronger walls that were tried first, and why they do not stand here."""
        seen = view(preload, system=bool(devices))
        self._settings = _settings(limits, steps, seen, preload, environment, devices)
        self._count = workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(self._zygote) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        # Walls are bound to the thread that builds them: to one that lives as long as we do.
        self._starter = ThreadPoolExecutor(1, "sandbox-starter")
        self._end = weakref.finalize(self, _close, self._workers, self._starter)

    @property
    def tier(self) -> Tier:
        """How the walls are built."""
        return self.steps.tier

    @property
    def layers(self) -> tuple[str, ...]:
        """What stands between a candidate and this machine, for people and for the record of a run."""
        return _layers(self._settings, self.steps)

    def proved(self) -> Sandbox:
        """This, with the walls of its first worker built and proved. Raises LostError where they cannot be built."""
        try:
            zygote = self._workers[0].zygote(examiner=False)
            must_hold(
                lambda program: run_program(zygote, program, _PROBING, writable=False),
                str(self.steps),
                self._settings,
            )
        except BaseException:
            self.close()
            raise
        return self

    def run(self, program: Program) -> Outcome:
        """Run one program. What the sandbox itself does wrong is tried once more, then told as BROKEN."""
        return self._tried(
            lambda worker: run_program(
                worker.zygote(examiner=False), program, self.limits, writable=self.steps.own_processes
            ),
            lambda reason: Outcome(Status.BROKEN, reason=reason),
        )

    def run_all(self, programs: Iterable[Program]) -> list[Outcome]:
        """Run many, as many at a time as there are workers; the outcomes are in their order."""
        with ThreadPoolExecutor(self._count, "sandbox") as pool:
            return list(pool.map(self.run, programs))

    def examine(self, program: Program, tests: str, *, entry: str = "") -> Examination:
        """Run tests against a program that they never share a process with.

        Names that the tests use and do not define are the program's functions. `entry` is the one that a
        `check(candidate)` of the tests is about.
        """
        return self._tried(
            lambda worker: examine_program(
                worker.zygote(examiner=False), worker.zygote(examiner=True), program, tests, entry, self.limits,
                writable=self.steps.own_processes,
            ),
            lambda reason: Examination(Status.BROKEN, reason=reason),
        )  # fmt: skip

    def examine_all(self, asked: Iterable[tuple[Program, str, str]]) -> list[Examination]:
        """As `examine`, of many (program, tests, entry) on all workers; in their order."""
        with ThreadPoolExecutor(self._count, "sandbox") as pool:
            return list(pool.map(lambda each: self.examine(each[0], each[1], entry=each[2]), asked))

    def close(self) -> None:
        """End every process of the sandbox. Nothing is left of it."""
        self._end()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tried(self, work: Callable[[_Worker], _Result], broken: Callable[[str], _Result]) -> _Result:
        if os.getpid() != self._owner:
            raise RefusedError("a sandbox of the parent process", allowed="one of this process", do="open another one")
        worker = self._idle.get()
        try:
            reason = ""
            for _ in range(2):
                if not self._end.alive:
                    raise RefusedError("the sandbox is closed", allowed="one that is open", do="open another one")
                try:
                    return work(worker)
                except (LostError, OSError) as failure:
                    reason = f"{type(failure).__name__}: {failure}"
                    with suppress(OSError):
                        worker.close()
                except BaseException:
                    # Interrupted half-way: whoever comes next gets new zygotes.
                    worker.close()
                    raise
            return broken(reason)
        finally:
            self._idle.put(worker)

    def _zygote(self, examiner: bool) -> Zygote:
        settings = {**self._settings, "examiner": examiner, "user": lesser_user()}
        return self._starter.submit(Zygote, settings["interpreter"], settings).result()


def _close(workers: Sequence[_Worker], starter: ThreadPoolExecutor) -> None:
    for worker in workers:
        worker.close()
    starter.shutdown()


def _settings(
    limits: Limits, steps: Steps, seen: View, preload: Sequence[str], environment: Mapping[str, str],
    devices: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """All that the guest's side needs to know, as plain data."""
    root = os.geteuid() == 0
    lend = root and may_mount() and steps.walls != "root"
    if root and not may_mount():
        must_be_reachable(seen)
    version = landlock_version()
    home = next(name for name in HOMES if not _below(name, seen)) if steps.own_processes else ""
    places = [(target, LOOK) for _, target in seen.folders] + [(name, READ | WRITE) for name in ALWAYS]
    places += [(name, READ | WRITE | DEVICE_CONTROL) for name in devices]
    return {
        "view": [list(pair) for pair in seen.folders],
        "links": {**seen.links, **({"/tmp": home} if home and not _below("/tmp", seen) else {})},
        "path": list(seen.path),
        "interpreter": seen.interpreter,
        "bubblewrap": steps.bubblewrap,
        "walls": steps.walls,
        "lend": lend,
        "work": home,
        "own_processes": steps.own_processes,
        "counted": steps.own_processes or root,
        "landlock": version,
        "places": places if version else [],
        "devices": [*ALWAYS, *devices],
        "lent": bool(devices),
        "about": about_devices() if devices else None,
        "statm": None,
        "preload": list(preload),
        "environment": {**_environment(home or "/", lent=bool(devices)), **environment},
        "limits": {**dataclasses.asdict(limits), "files": _FILES, "others": _OTHERS},
    }


def _below(folder: str, seen: View) -> bool:
    """Whether something of the view lies in this folder."""
    return any(Path(target).is_relative_to(folder) for _, target in seen.folders)


def _environment(home: str, *, lent: bool) -> dict[str, str]:
    ours = ("LD_LIBRARY_PATH", *(SETTINGS if lent else ()))
    return {
        **{name: os.environ[name] for name in ours if name in os.environ},
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",  # the same program gives the same answers
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }


def _layers(settings: Mapping[str, Any], steps: Steps) -> tuple[str, ...]:
    found = [steps.tier.value]
    if settings["own_processes"]:
        found += ["user namespace", "network namespace", "own processes", "own root", "files in memory"]
    elif steps.walls:
        found += ["network namespace", "own root"]
    if settings["landlock"]:
        found.append(f"Landlock {settings['landlock']}")
    found += [f"with {name}" for name in settings["devices"] if name not in ALWAYS]
    return (*found, "system call filter", "limits", "lesser user" if os.geteuid() == 0 else "user without capabilities")
