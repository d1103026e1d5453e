"""Every fault that a data file can have: its place, what came, what is allowed, and counts that add up.

Each case is read as a run reads it (one error that lists the bad rows) and as a count (all rows, kept and rejected).
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import DataError, StorageError
from luthier.data.reading import json_list, text_files
from luthier.data.reading.rows import SourceFile, Stamp, find_sources, open_source
from luthier.data.row_log import demand_readable
from tests.cli.commands import chat, luthier
from tests.cli.conftest import llama
from tests.data.taken import take

__all__ = ["llama"]

GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'
BOM = b"\xef\xbb\xbf"


def row(value: str) -> bytes:
    return b'{"question": "q", "answer": ' + value.encode() + b"}\n"


@dataclass(frozen=True)
class Fault:
    """A file with one bad row: what is in it, where the fault stands, what is said of it, and the counts."""

    name: str
    content: bytes
    at: str
    came: str
    allowed: str
    read: int = 3
    kept: int = 2


LINES = GOOD + b"%s" + GOOD
ARRAY = b"[" + GOOD.rstrip() + b"," + GOOD.rstrip() + b"]"
QUOTE = b'question,answer\n1,2\n3,4\n5,"6\n7,8\n'
CUT = gzip.compress(b"".join(row(f'"{os.urandom(20).hex()}"') for _ in range(3000)), mtime=0)[:-900]
FAULTS = {
    "truncated gzip": Fault("r.jsonl.gz", CUT, "", "cut short", "compress it again", 0, 0),
    "no gzip": Fault("rows.jsonl.gz", GOOD, "1:1", "damaged", "fetch or compress it again", 1, 0),
    "byte order mark inside": Fault("r.jsonl", LINES % (BOM + GOOD), "2:1", "\\ufeff", "expected a value"),
    "lone surrogate": Fault("r.jsonl", LINES % row('"\\ud800"'), "2:29", "half of a surrogate pair", "whole"),
    "surrogate bytes": Fault("r.jsonl", LINES % b'{"a": "\xed\xa0\x80"}\n', "2:8", "0xed", "UTF-8"),
    "NaN": Fault("r.jsonl", LINES % row("NaN"), "2:29", "NaN", "a finite number, or null"),
    "Infinity": Fault("r.jsonl", LINES % row("-Infinity"), "2:29", "-Infinity", "a finite number, or null"),
    "1e999": Fault("r.jsonl", LINES % row("1e999"), "2:29", "1e999", "64-bit float"),
    "5,000 digits": Fault("r.jsonl", LINES % row("7" * 5000), "2:29", "5000 digits", "at most 300 digits"),
    "depth 200,000": Fault("r.jsonl", LINES % row("[" * 200_000), "2:228", "nested too deep", "at most 200 levels"),
    "duplicate keys": Fault("r.jsonl", LINES % row('"x", "answer": "y"'), "2:34", "second time", "each key once"),
    "NUL": Fault("r.jsonl", LINES % row('"\0"'), "2:30", "a NUL byte", "UTF-8 text"),
    "carriage returns": Fault("r.jsonl", GOOD.replace(b"\n", b"\r") * 3, "1:39", "after the end", "line ends", 1, 0),
    "not UTF-8": Fault("r.jsonl", LINES % b'{"a": "\xff"}\n', "2:8", "byte 0xff", "UTF-8 text"),
    "UTF-16": Fault("r.jsonl", GOOD.decode().encode("utf-16"), "1:1", "UTF-16", "UTF-8", 1, 0),
    "wrong type": Fault("r.jsonl", LINES % row("7"), "2:19", "answer is a number", "expected a string"),
    "an array for a row": Fault("r.jsonl", LINES % b"[1, 2]\n", "2:1", "a list", "an object"),
    "an array in a .jsonl": Fault("r.jsonl", ARRAY, "1:1", "the row is a list", "the name .json", 1, 0),
    "no final newline, cut": Fault("r.jsonl", GOOD * 2 + b'{"question": "1', "3:14", "broken JSON", "closing"),
    "unbalanced quote": Fault("r.csv", QUOTE, "4:3", "never closed", "a closing quote"),
    "too many cells": Fault("r.csv", b"question,answer\n1,2\n3,4,5\n6,7\n", "3:1", "3 cells", "2 cells"),
    "empty cell": Fault("r.csv", b"question,answer\n1,2\n3,\n6,7\n", "3:3", "the answer is empty", "some text"),
    "a list cut short": Fault("r.json", b"[" + GOOD + b"," + GOOD + b",", "3:2", "the JSON ends too early", "a value"),
    "a list with damage": Fault("r.json", b"[" + GOOD + b"," + GOOD + b",\n\xff]", "4:1", "0xff", "UTF-8"),
    "lines in a .json": Fault("r.json", LINES % row("NaN"), "2:29", "NaN", "finite"),
    "no Parquet": Fault("r.parquet", b"PAR1" + b"\0" * 90 + b"PAR1", "1:1", "not readable as Parquet", "", 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_fault_has_an_address_a_cause_and_a_count(tmp_path: Path, case: Fault) -> None:
    """Breaks when damage is read as data, stands at another place than is said, or hides a row from the counts."""
    path = tmp_path / case.name
    path.write_bytes(case.content)
    found = take(SourceFile(path))
    (error,) = found.rejects
    said = str(error)
    assert case.came in said and case.allowed in said
    assert error.where == f"{path}:{case.at}" if case.at else error.where.startswith(f"{path}:")
    if case.read:
        assert (found.read, found.kept, found.rejected) == (case.read, case.kept, case.read - case.kept)
    with pytest.raises(DataError) as caught:
        demand_readable([SourceFile(path)])
    assert f"1 of {found.read:,} rows cannot be used ({found.kept:,} can)" in str(caught.value)
    assert error.where in str(caught.value) and len(str(caught.value)) < 1000


def test_without_the_fault_nothing_is_said(tmp_path: Path) -> None:
    """The negative control: the same files, whole. Breaks when sound rows are refused."""
    path = tmp_path / "rows.jsonl"
    for content in (GOOD * 3, BOM + GOOD * 3, GOOD.replace(b"\n", b"\r\n") * 3, (GOOD * 3).rstrip(), b"\n" + GOOD * 3):
        path.write_bytes(content)
        found = take(SourceFile(path))
        assert (found.read, found.kept, found.rejects) == (3, 3, [])
        assert {row.content for row in found.rows} == {found.rows[0].content}
        demand_readable([SourceFile(path)])
    table = tmp_path / "rows.csv"
    table.write_bytes(b'question,answer\r\n1,"2\r\n, ""3"""\r\n')
    assert take(SourceFile(table)).kept == 1


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    """Breaks when a cut or altered Parquet file gives a traceback, or rows that nobody wrote."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    rows = [{"question": f"q{n}", "answer": f"a{n}" * 40} for n in range(300)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=50)
    whole = buffer.getvalue()
    path = tmp_path / "rows.parquet"
    path.write_bytes(whole)
    assert take(SourceFile(path)).kept == 300
    path.write_bytes(whole[:-40])
    (error,) = take(SourceFile(path)).rejects
    assert error.where == f"{path}:1:1" and "not readable as Parquet" in error.received
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    found = take(SourceFile(path))
    assert found.read == found.kept + found.rejected and all(error.where for error in found.rejects)


def test_lines_cells_and_texts_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when one endless line, cell, text or list element is taken for a row, or hides the rows behind it."""
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 5000)
    monkeypatch.setattr("luthier.data.reading.tables.MAX_LINE_BYTES", 5000)
    monkeypatch.setattr("luthier.data.reading.readers.MAX_LINE_BYTES", 5000)
    monkeypatch.setattr(json_list, "MAX_VALUE", 5000)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 512)
    long = b"x" * 90_000
    for name, content, at, words, counts in (
        ("r.jsonl", LINES % (b'{"a": "' + long + b'"}\n'), "2:1", "a line longer than", (3, 2)),
        (
            "r.csv",
            b'question,answer\n1,2\n3,"' + (b"x" * 99 + b"\n") * 90 + b'"\n4,5\n',
            "3:3",
            "a cell in quotes",
            None,
        ),
        ("r.csv", b"question,answer\n1,2\n3," + long + b"\n4,5\n", "3:1", "a line longer than", (3, 2)),
        ("r.csv", b"question,answer\n1,2\n" + b",".join([b'"' + b"y\n" * 900 + b'"'] * 9), "3:1", "a row longer", None),
        ("r.txt", long, "1:1", "a text longer than", (1, 0)),
        ("r.json", b"[" + GOOD + b',{"question": "' + long + b'"}]', "2:2", "a value longer than", (2, 1)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        found = take(SourceFile(path))
        assert found.rejects[0].where == f"{path}:{at}" and words in found.rejects[0].received
        assert counts is None or (found.read, found.kept) == counts


def test_what_is_no_file(tmp_path: Path) -> None:
    """Breaks when a folder, a pipe, a device or a missing file is waited for, or ends in a traceback."""
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for path, words in (
        (tmp_path / "folder.jsonl", "is a folder"),
        (tmp_path / "pipe.jsonl", "is a pipe; a regular file"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "none.jsonl", "there is no such file"),
        (tmp_path / "loop.jsonl", "there is no such file"),
        (tmp_path / "no" / "rows.jsonl", "there is no folder"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            open_source(SourceFile(path))
        assert caught.value.where == str(path)
        if "folder.jsonl" not in str(path):
            with pytest.raises(DataError, match=words):
                find_sources(path)
    for name in ("x" * 300 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises((StorageError, DataError)):
            find_sources(tmp_path / name)


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a refusal of the system comes through as a traceback, or is taken for an empty file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    plain = Path.open

    def refused(self: Path, *settings: Any, **named: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *settings, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        take(SourceFile(path))
    assert caught.value.where == str(path) and "permissions" in caught.value.do


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions_of_the_file_system(tmp_path: Path) -> None:
    """Breaks when a file without permissions is taken for something else."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(StorageError, match="Permission denied"):
        take(SourceFile(path))


@pytest.mark.parametrize("change", ["append", "truncate", "replace"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: str) -> None:
    """Breaks when rows of two versions of a file are mixed in silence."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 3000)
    changes: dict[str, Callable[[], Any]] = {
        "append": lambda: path.write_bytes(GOOD * 3001),
        "truncate": lambda: os.truncate(path, len(GOOD) * 2900),
        "replace": lambda: path.with_suffix(".new").rename(path),
    }
    path.with_suffix(".new").write_bytes(GOOD * 3000)
    os.utime(path.with_suffix(".new"), ns=(1, Stamp.of(path).changed_ns))
    items = open_source(SourceFile(path)).items
    next(items)
    changes[change]()
    with pytest.raises(DataError, match="changed while it was read") as caught:
        list(items)
    assert caught.value.where == str(path) and "wait until it is complete" in caught.value.do


def test_the_command_says_it_without_a_traceback(tmp_path: Path, llama: Path) -> None:
    """Breaks when a damaged file ends `luthier data check` in a traceback, or with another code than 65."""
    path = tmp_path / "rows.jsonl"
    good = json.dumps(chat("x", "y")).encode() + b"\n"
    path.write_bytes(good + b'{"messages": NaN}\n' + good + b"\xff\n" + good.replace(b'"y"', b'"\\ud800"') + good)
    told = luthier("data", "check", path, "--model", llama).must(65, "3 problems in 6 rows (3 kept, 3 rejected)")
    assert "6 read = 3 kept + 3 rejected" in told.out and "Traceback" not in told.err
    assert all(f"{path}:{at}" in told.out for at in ("2:14: NaN", "4:1: byte 0xff", "5:"))
    counted = json.loads(luthier("data", "check", path, "--model", llama, "--json").must(65).out.splitlines()[0])
    assert (counted["read"], counted["kept"], counted["rejected"], counted["clean"]) == (6, 3, 3, False)
