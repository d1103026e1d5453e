"""The proof of a finished run: that its saved files are what the run says they are, found out by a fresh process.

Idea: exit code 0 of a training run is a promise, and whoever wrote the files is the wrong one to read them back: what
is only in its memory would make up for what is missing on disk. So `verify_apart` starts a process that knows nothing
but the run directory. What is checked is in `proof.py`; this file is light, so that the child is bound to its parent
before it imports anything heavy.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.core.child import answer_of, bound_to_parent, start_child
from luthier.core.errors import GateError, LuthierError, StoppedError
from luthier.core.events import plain
from luthier.core.imports import uncollected
from luthier.store.runs import RunDirectory

LAST_WORDS = 2000
"""Bytes of a dead child's stderr that are looked at for a reason."""


def verify_run(run: RunDirectory) -> dict[str, Any]:
    """Check the result of `run` in this process; what was checked, with its figures.

    Raises CorruptError for files that are not what they were, DriftError for a base, a recipe or data that have
    changed since, NumericError and GateError for a result that no run may have.
    """
    with uncollected():
        from luthier.recipes.proving.proof import prove

    return prove(run)


def verify_apart(run: RunDirectory) -> dict[str, Any]:
    """`verify_run` in a fresh process that ends with this one; its errors are raised here."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as words:
        child = start_child("luthier.recipes.proving.verify", [str(run.folder)], stderr=words.fileno())
        answer, code = answer_of(child)
        words.seek(max(0, words.seek(0, os.SEEK_END) - LAST_WORDS))
        last = words.read().decode("utf-8", "replace")
    try:
        found = json.loads(answer)
    except ValueError:
        raise _died(run, code, last) from None
    if "error" in found:
        raise _told(found["error"])
    return {**found["proof"], "process": "fresh", "seconds": round(time.perf_counter() - began, 3)}


def proved(run: RunDirectory) -> dict[str, Any]:
    """The proof at the end of a run, which has no result without it.

    Raises GateError for whatever is wrong with the result; what asks the run to stop passes through.
    """
    try:
        return verify_apart(run)
    except (GateError, StoppedError):
        raise
    except LuthierError as error:
        raise GateError(f"the saved result is not proved: {error.received}", allowed=error.allowed, where=error.where,
                        do=error.do or f"luthier resume {run.folder} writes and proves it again") from error


def _died(run: RunDirectory, code: int, last: str) -> GateError:
    """The error for a child that ended without an answer."""
    lines = [line.strip() for line in last.splitlines() if line.strip()]
    how = f"ended with exit code {code}"
    if code < 0:
        known = -code in set(signal.Signals)
        how = f"was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
        how += " (out of memory?)" if -code == signal.SIGKILL else ""
    said = f": {lines[-1][:300]}" if lines else ""
    return GateError(
        f"the process that checks the saved result {how}, so nothing is proved{said}",
        do=f"luthier eval {run.folder} --verify repeats the proof, luthier resume {run.folder} the end of the run",
    )


def _told(values: dict[str, Any]) -> LuthierError:
    """The error that a child sent, as an error of the same class."""
    kind = next((kind for kind in _kinds(LuthierError) if kind.code == values["code"]), GateError)
    return kind(values["received"], allowed=values["allowed"], do=values["do"], where=values["where"])


def _kinds(kind: type[LuthierError]) -> Iterator[type[LuthierError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


def main() -> None:
    """The child: one line of JSON on standard output, whatever libraries print there meanwhile."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Without a buffer, whose lock the interpreter would miss when it ends while the watcher waits for input.
    bound_to_parent(watch=io.FileIO(sys.stdin.fileno(), closefd=False))
    try:
        line: dict[str, Any] = {"proof": verify_run(RunDirectory.open(Path(sys.argv[1])))}
        code = 0
    except LuthierError as error:
        line, code = {"error": error.as_dict()}, error.exit_code
    with answer:
        answer.write(json.dumps(plain(line)) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
