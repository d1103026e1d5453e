"""Break luthier in every way its tests know, many times, and print the fault table: fault, promise, passed / tried.

What: runs each campaign of tests/faults and its negative control, two campaigns at a time, each in a process of its
own. What was run in full (no --scale) takes its row in the table of docs/faults.md; the rows of campaigns that were not
asked for stay, each with the commit it was made at. Ends with 1 when a promise was broken or a negative control found
nothing, and with --no-skips also when this machine could not run a campaign.

    python scripts/faults.py                        # all of it: make faults
    python scripts/faults.py --only kills --scale 0.1 --seed 7
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
PAGE = HOME / "docs" / "faults.md"
BEGIN, END = "<!-- fault table -->", "<!-- fault table ends -->"
LANES = 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: where its campaign lies, and how often a whole run tries it."""

    name: str
    module: str
    count: int
    run: str = "run"
    control: str = "control"
    alone: bool = False
    """Whether nothing else may run meanwhile, because it looks at times."""


ENTRIES = (
    Entry("kills", "kills", 1000),
    Entry("header-mutants", "header_mutants", 1_000_000),
    Entry("orphans", "orphans", 200),
    Entry("sigterm", "signals", 200),
    Entry("kill-whole-run", "syscalls", 150, "run_whole", "control_whole"),
    Entry("signals", "signals", 100, "run_others", "control_others"),
    Entry("bad-numbers", "bad_numbers", 200),
    Entry("full-disks", "full_disks", 50),
    Entry("inodes", "full_disks", 50, "run_inodes", "control_inodes"),
    Entry("data-mutants", "data_mutants", 100_000),
    Entry("failing-calls", "syscalls", 5000, "run_errors", "control_errors"),
    Entry("flips", "flips", 1500),
    Entry("store-locks", "locks", 5000, "run_store", "control_store"),
    Entry("power-cuts", "power_cuts", 200),
    Entry("finished", "locks", 30, "run_finished", "control_finished"),
    Entry("kill-save", "syscalls", 5000),
    Entry("locks", "locks", 100, alone=True),
)
"""The longest first, so that none is left over at the end. Some campaigns have fewer places than their count."""


def one(entry: Entry, *, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """A campaign and its negative control, in this process: what `main` makes a row of."""
    sys.path[:0] = [str(HOME), str(HOME / "src")]
    from tests.faults.campaign import UnavailableError

    os.environ["LUTHIER_CACHE"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    module = importlib.import_module(f"tests.faults.{entry.module}")
    try:
        control = getattr(module, entry.control)(seed=seed, folder=folder / "control")
        done = getattr(module, entry.run)(count, seed=seed, folder=folder / "run")
    except UnavailableError as reason:
        return {"skipped": str(reason), "fault": entry.name}
    return {**dataclasses.asdict(done), "broken": dataclasses.asdict(control), "commit": _commit()}


def apart(entry: Entry, *, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """The same in a process of its own; what it says on stderr goes on to ours."""
    place, answer = folder / entry.name, folder / f"{entry.name}.json"
    place.mkdir()
    told = ["--one", entry.name, "--count", str(count), "--seed", str(seed)]
    command = [sys.executable, __file__, *told, "--folder", str(place), "--answer", str(answer)]
    began = time.monotonic()
    ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if ended.returncode == 0 and answer.exists():
        row: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        shutil.rmtree(place, ignore_errors=True)
    else:
        row = {"fault": entry.name, "broke": f"the campaign itself ended with {ended.returncode}; see {place}"}
    sys.stderr.write(f"== {entry.name}: {_verdict(row)} after {time.monotonic() - began:.0f} s\n")
    return row


def all_of(entries: list[Entry], *, scale: float, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of these campaigns, in their order."""

    def row(entry: Entry) -> dict[str, Any]:
        return apart(entry, count=max(1, round(entry.count * scale)), seed=seed, folder=folder)

    with concurrent.futures.ThreadPoolExecutor(LANES) as pool:
        beside = {entry.name: pool.submit(row, entry) for entry in entries if not entry.alone}
    rows = {name: future.result() for name, future in beside.items()}
    rows |= {entry.name: row(entry) for entry in entries if entry.alone}
    return [rows[entry.name] for entry in entries]


HEAD = ("fault", "promise", "passed / tried", "seconds", "seed", "commit", "negative control", "how they ended")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as people read them."""
    return _joined([_line(HEAD), _line(["---"] * len(HEAD)), *lines(rows)])


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line of the table for each row."""
    made = []
    for row in rows:
        if "skipped" in row or "broke" in row:
            made.append(_line((row["fault"], "", row.get("skipped") or row["broke"], *[""] * (len(HEAD) - 3))))
            continue
        broken = row["broken"]
        found = f"{row['control']}: {broken['tried'] - broken['passed']:,} of {broken['tried']:,} found"
        verdicts = ", ".join(f"{number:,} {verdict}" for verdict, number in row["verdicts"].items())
        counts = f"{row['passed']:,} / {row['tried']:,}"
        seconds = f"{row['seconds']:,.0f}"
        which = (str(row["seed"]), row["commit"])
        made.append(_line((row["fault"], row["promise"], counts, seconds, *which, found, verdicts)))
    return made


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    """The notes of the campaigns, a list."""
    return [f"- {row['fault']}: {'; '.join(row['notes'])}." for row in rows if row.get("notes")]


def written(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with these rows in the place of those of the same campaigns, the day and the machine."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    day = datetime.date.today().isoformat()
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release().split('-')[0]}"
    about = f"Last changed {day}: {machine}, Python {platform.python_version()}."
    body = [line for line in old.splitlines() if line.startswith("| ")][2:]
    told = [line for line in old.splitlines() if line.startswith("- ")]
    names = [row["fault"] for row in rows]
    merged = _merged(body, lines(rows), [f"| {_cell(name)} |" for name in names])
    notes = _merged(told, remarks(rows), [f"- {name}: " for name in names])
    text = _joined([_line(HEAD), _line(["---"] * len(HEAD)), *merged])
    return f"{before}{BEGIN}\n{about}\n\n{text}\n{_joined(notes)}{END}{after}"


def _merged(old: list[str], new: list[str], starts: list[str]) -> list[str]:
    """`new` lines in the places of the old ones that begin alike, the rest behind them; `starts` are replaced."""
    left = dict.fromkeys(new)
    found = []
    for line in old:
        start = next((start for start in starts if line.startswith(start)), None)
        if start is None:
            found.append(line)
            continue
        same = next((each for each in left if each.startswith(start)), None)
        if same is not None:
            found.append(same)
            del left[same]
    return [*found, *left]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(text) for text in cells) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _joined(texts: Sequence[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def _commit() -> str:
    said = subprocess.run(["git", "-C", str(HOME), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def _verdict(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"skipped ({row['skipped']})"
    if "broke" in row:
        return str(row["broke"])
    if row["broken"]["passed"] == row["broken"]["tried"]:
        return "its negative control found nothing"
    return "kept" if 0 < row["tried"] == row["passed"] else f"BROKEN {row['verdicts']}"


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="run the fault campaigns and print the fault table")
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--only", default="", help=f"some of {', '.join(names)}, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full counts")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)), help="of every random choice")
    parser.add_argument("--no-skips", action="store_true", help="a campaign that cannot run here is a failure")
    for hidden in ("--one", "--count", "--folder", "--answer"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        entry = next(entry for entry in ENTRIES if entry.name == asked.one)
        row = one(entry, count=int(asked.count), seed=asked.seed, folder=Path(asked.folder))
        Path(asked.answer).write_text(json.dumps(row), encoding="utf-8")
        return 0
    wanted = asked.only.split(",") if asked.only else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"{', '.join(unknown)}: no such campaign; there are {', '.join(names)}")
    sys.stderr.write(f"seed {asked.seed}\n")
    folder = Path(tempfile.mkdtemp(prefix="luthier-faults-"))
    entries = [entry for entry in ENTRIES if entry.name in wanted]
    rows = all_of(entries, scale=asked.scale, seed=asked.seed, folder=folder)
    sys.stdout.write(f"{table(rows)}\n{_joined(remarks(rows))}")
    for row in rows:
        for detail in row.get("failures", ()):
            sys.stdout.write(f"{row['fault']}: {detail}\n")
    if asked.scale >= 1:
        PAGE.write_text(written(PAGE.read_text("utf-8"), rows), encoding="utf-8")
        sys.stdout.write(f"written into {PAGE.relative_to(HOME)}\n")
    bad = [row for row in rows if _verdict(row) != "kept" and not ("skipped" in row and not asked.no_skips)]
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
