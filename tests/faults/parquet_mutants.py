"""Mutated Parquet files, read in a process of their own: the library that reads them is C++ and may take it down.

    python -m tests.faults.parquet_mutants COUNT SEED FOLDER

prints a line `begin TRIAL` before each trial and `VERDICT detail` after it, so that whoever started it knows which file
was the last.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.campaign import CLEAN, Tally
from tests.faults.mutators import mutate

_REPOSITORY = Path(__file__).resolve().parents[2]
_ADDRESS_SPACE = 6 * 2**30
_LARGEST_PAGE = 2**31 + 2**28
"""The library takes as much memory for a page as its header says, at most 2 GiB; something goes on top of it."""

_TOKENS = (
    b"PAR1", b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff\x0f", b"\x80" * 9 + b"\x01", b"\x15", b"\x19", b"\x1c",
    b"schema",
)  # fmt: skip


def run_apart(count: int, *, seed: int, folder: Path, tally: Tally) -> None:
    """Read `count` mutants and count their verdicts; a process that dies is a crash of the trial it was at."""
    done = 0
    while done < count:
        command = [sys.executable, "-m", "tests.faults.parquet_mutants", str(done), str(count), str(seed), str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), str(_REPOSITORY / "src")])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=_REPOSITORY) as child:
            at = done
            for line in child.stdout or ():
                verdict, _, detail = line.rstrip("\n").partition(" ")
                if verdict == "begin":
                    at = int(detail)
                else:
                    tally.count(verdict, f"Parquet trial {at} of seed {seed}: {detail}")
                    done = at + 1
        if child.returncode != 0:
            tally.count("crash", f"Parquet trial {at} of seed {seed}: the process ended with {child.returncode}")
            done = at + 1


def seed_file() -> bytes:
    """A good Parquet file of a few conversations, with two row groups."""
    import io

    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"é {n}"}, {"role": "assistant", "content": "x" * n}], "id": n}
        for n in range(12)
    ]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=6, compression="snappy")
    return buffer.getvalue()


def _attempt(path: Path, data: bytes) -> tuple[str, str]:
    import pyarrow
    import pyarrow.parquet

    from luthier.data.formats import named
    from luthier.data.reading.rows import SourceFile
    from tests.data.taken import take
    from tests.faults.data_mutants import ALLOWED, SECONDS
    from tests.faults.watch import Watch

    path.write_bytes(data)
    watch, refused = Watch(), ""
    try:
        with watch.over():
            try:
                report = take(SourceFile(path))
            except ALLOWED as error:
                refused = error.code
    except Exception as failure:  # noqa: BLE001 (whatever else leaves is what is looked for)
        return "traceback", f"{type(failure).__name__}: {str(failure)[:200]!r}"
    # The kernel's share is the price of memory: it clears what a page says that it will need.
    if watch.user_seconds > SECONDS:
        return "hang", f"{watch.user_seconds:.1f} s"
    if watch.bytes > _LARGEST_PAGE:
        return "memory", f"{watch.bytes:,} bytes"
    if refused:
        return CLEAN, refused
    if report.read != report.kept + report.rejected:
        return "miscount", f"{report.read} read, {report.kept} kept, {report.rejected} rejected"
    try:
        whole = pyarrow.parquet.ParquetFile(path).read(use_threads=False).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError):
        return CLEAN, "damaged for pyarrow too"
    format = named(report.files[0].format)
    for row in report.rows:
        if row.content != format.read(whole[row.number], ""):
            return "differs", f"row {row.number}"
    return (CLEAN, "") if report.read == len(whole) else ("miscount", f"{report.read} read, {len(whole)} there")


def main() -> None:
    """Read the mutants from the first number to the second."""
    first, stop, seed, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    # A size that a mutant makes up must be refused, not fill the machine.
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    good = seed_file()
    folder.mkdir(parents=True, exist_ok=True)
    for trial in range(first, stop):
        print("begin", trial, flush=True)
        dice = random.Random(f"parquet {seed} {trial}")
        verdict, detail = _attempt(folder / "rows.parquet", mutate(good, dice, tokens=_TOKENS))
        print(verdict, json.dumps(detail), flush=True)


if __name__ == "__main__":
    main()
