"""The proof that walls stand: before anything is run behind them, the probes of guest/probes.py are.

Idea: what a configuration says and what a kernel does are two things. Root-started bubblewrap left hundreds of files of
/proc/sys open for writing, on a machine where all looked well. So something is put outside that a guest must not
reach (a file, a port, sockets), and it is sent to reach for them and for all that has let others out before.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from luthier.core.errors import SandboxUnavailableError
from luthier.sandbox.program import Call, Outcome, Program, Status
from luthier.sandbox.zygotes import LostError


def must_hold(run: Callable[[Program], Outcome], name: str, settings: Mapping[str, Any]) -> None:
    """Raises SandboxUnavailableError if one probe gets what it reaches for, LostError if they cannot be run."""
    source = files("luthier.sandbox.guest").joinpath("probes.py").read_text("utf-8")
    with _outside() as facts:
        facts |= {"environment": list(settings["environment"]), "lent": settings["lent"]}
        facts["names"] = _names(Path.home(), [Path(target) for _, target in settings["view"]])
        outcome = run(Program(source, (Call("succeeded", (facts,)),)))
        if outcome.status is not Status.ENDED or outcome.returned[0].error is not None:
            told = outcome.reason or (outcome.returned[0].error if outcome.returned else "")
            raise LostError(f"the self-test did not run: {outcome.status}, {told}")
        got = list(outcome.returned[0].value)
    if got:
        raise SandboxUnavailableError(
            f"the walls of {name} do not hold: a guest could {', '.join(got)}",
            allowed="none of it",
            do="tell us of this machine; until then use another tier (open_sandbox(tier=...)), or none",
        )


@contextmanager
def _outside() -> Iterator[dict[str, Any]]:
    """Things that every user of this machine may reach, and no guest."""
    with tempfile.TemporaryDirectory(prefix="luthier-probes-") as made:
        folder = Path(made)
        folder.chmod(0o777)
        file = folder / "file"
        file.write_text("outside")
        file.chmod(0o666)
        abstract = f"luthier-{secrets.token_hex(8)}"
        path = folder / "socket"
        with socket.create_server(("127.0.0.1", 0)) as port, _listening(f"\0{abstract}"), _listening(str(path)):
            path.chmod(0o777)
            yield {
                "file": str(file),
                "folder": made,
                "home": str(Path.home()),
                "port": port.getsockname()[1],
                "abstract": abstract,
                "socket": str(path),
                "process": os.getpid(),
            }


def _names(home: Path, seen: Sequence[Path]) -> list[str]:
    """What lies in the home and no guest may know of: all but the way to the interpreter, where that leads there."""
    try:
        return [path.name for path in home.iterdir() if not any(other.is_relative_to(path) for other in seen)]
    except OSError:
        return []


def _listening(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    return listener
