"""Mutated data files: a file somebody cut, glued, re-encoded or attacked is read, or refused with an address.

Each trial mutates a good file of one format and reads it. Only luthier's own errors may leave; read = kept + rejected;
what is kept is what an independent strict parser finds at the row's address; no second of processor time too many, no
memory beyond a bound.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError, LuthierError, RecipeError, StorageError
from luthier.data.formats import named
from luthier.data.reading import json_list, readers
from luthier.data.reading.rows import SourceFile
from luthier.data.row_log import demand_readable
from luthier.data.strict_json import Place
from tests.data.taken import Taken, take
from tests.faults.campaign import CLEAN, Campaign, Tally
from tests.faults.mutators import mutate, mutate_scalar
from tests.faults.watch import HangError, Watch, alarmed

FAULT = "mutated data files"
PROMISE = "read = kept + rejected, each bad row with an address, kept rows as strict JSON; no crash, no hang"
CONTROL = "a reader on the standard library's lenient JSON"
SECONDS = 2.0
SPARE_BYTES = 64 * 2**20
"""Memory that a small file may take; what a reader promises to hold of a large one is 64 MiB as well."""
ALLOWED = (DataError, StorageError, RecipeError)
"""TemplateError is a DataError."""

SAY = 'é \\u00e9 \\ud83d\\ude00 \\n \\" 雪 <|end|>'


def _chat(count: int) -> list[dict[str, Any]]:
    said = json.loads(f'"{SAY}"')
    return [
        {"messages": [{"role": "user", "content": f"{n}: {said}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(count)
    ]


def seeds() -> dict[str, bytes]:
    """A good file of each kind, by suffix and what is in it."""
    lines = [json.dumps(row, ensure_ascii=bool(n % 2)) for n, row in enumerate(_chat(5))]
    alpaca = [{"instruction": f"say {n}", "input": "é" * (n % 2), "output": f"it is {n}"} for n in range(5)]
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    share = [{"conversations": turns, "id": n, "score": n / 3, "flag": None} for n in range(4)]
    cells = 'prompt,completion\r\n"a, ""b""\nc",d\r\nx,"é"\r\n1,2\r\nlast "one",fine\r\n'
    pairs = "question\tanswer\nwhat is it\tthis\nand 雪\tsnow\nend\tdone\n"
    files = {
        "chat.jsonl": "\n".join(lines).encode() + b"\n",
        "alpaca.json": json.dumps(alpaca, indent=1, ensure_ascii=False).encode(),
        "sharegpt.json": json.dumps(share).encode(),
        "sharegpt.jsonl": b"\r\n".join(json.dumps(row).encode() for row in share),
        "pairs.csv": cells.encode(),
        "pairs.tsv": pairs.encode(),
        "text.txt": ("the first line\n\nzweite Zeile é雪\n" * 3).encode(),
    }
    packed = ("chat.jsonl", "alpaca.json", "pairs.csv", "text.txt")
    return {**files, **{f"{name}.gz": gzip.compress(files[name], mtime=0) for name in packed}}


@dataclass
class Found:
    """What one trial came to."""

    verdict: str
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
    kept: int = 0
    rejected: int = 0


@dataclass
class Sums:
    """Figures over a campaign."""

    kept: int = 0
    rejected: int = 0
    slowest: float = 0.0
    largest: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        self.kept += found.kept
        self.rejected += found.rejected
        self.slowest = max(self.slowest, found.seconds)
        self.largest = max(self.largest, found.bytes)


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` mutants over all formats; those of Parquet are read in a process of their own."""
    from tests.faults.parquet_mutants import run_apart

    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL)
    sums = Sums()
    parquet = count // 12
    _in_process(count - parquet, seed, folder, tally, sums)
    run_apart(parquet, seed=seed, folder=folder, tally=tally)
    tally.notes.append(
        f"{sums.kept:,} rows kept and compared, {sums.rejected:,} rejected; "
        f"slowest file {sums.slowest:.2f} s of processor time, most memory {sums.largest / 2**20:.0f} MiB"
    )
    return tally.result()


def control(*, seed: int, folder: Path) -> Campaign:
    """The same with what Python's json module lets pass."""
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL)
    with _lenient():
        _in_process(1500, seed, folder, tally, Sums())
    return tally.result()


def _in_process(count: int, seed: int, folder: Path, tally: Tally, sums: Sums) -> None:
    good = seeds()
    names = list(good)
    folder = folder / "data-mutants"
    folder.mkdir(parents=True, exist_ok=True)
    for trial in range(count):
        dice = random.Random(f"{seed} {trial}")
        name = names[trial % len(names)]
        data = mutant(name, good[name], dice)
        found = attempt(folder / name, data, raising=dice.random() < 0.2)
        sums.add(found)
        tally.count(found.verdict, f"trial {trial} of seed {seed} ({name}): {found.detail}")


def mutant(name: str, good: bytes, dice: random.Random) -> bytes:
    """`good` changed; of a packed file the content or the packing."""
    if name.endswith(".gz"):
        if dice.random() < 0.3:
            return mutate(good, dice)
        return gzip.compress(mutant(name.removesuffix(".gz"), gzip.decompress(good), dice), compresslevel=1, mtime=0)
    if ".json" in name and dice.random() < 0.3:
        good = mutate_scalar(good, dice)
        if dice.random() < 0.7:
            return good
    return mutate(good, dice)


def attempt(path: Path, data: bytes, *, raising: bool = False) -> Found:
    """Read one mutant and say how that ended."""
    path.write_bytes(data)
    watch = Watch()
    try:
        with alarmed(), watch.over():
            try:
                report = take(SourceFile(path))
            except ALLOWED as refused:
                found = _refused(refused)
            else:
                found = Found(CLEAN, kept=report.kept, rejected=report.rejected)
    except HangError as hang:
        return Found("hang", str(hang))
    except Exception as failure:  # noqa: BLE001 (whatever else leaves is what is looked for)
        return Found("traceback", f"{type(failure).__name__}: {str(failure)[:200]}")
    found.seconds, found.bytes = watch.seconds, watch.bytes
    if watch.seconds > SECONDS:
        return Found("hang", f"{watch.seconds:.1f} s for {len(data):,} bytes", watch.seconds)
    if watch.bytes > SPARE_BYTES + 16 * len(data):
        return Found("memory", f"{watch.bytes:,} bytes for {len(data):,}", watch.seconds, watch.bytes)
    if found.verdict == CLEAN and found.kept:
        found.verdict, found.detail = _checked(path, data, report)
        if raising and found.verdict == CLEAN:
            found.verdict, found.detail = _raises(path, report)
    return found


def _refused(error: LuthierError) -> Found:
    """A refusal says what and where, in a bounded text."""
    if not error.received or len(error.told()) > 50_000:
        return Found("wrong-error", f"{error.code} of {len(error.told()):,} characters: {error.received[:80]!r}")
    return Found(CLEAN, detail=error.code)


def _raises(path: Path, report: Taken) -> tuple[str, str]:
    """A bad row is an error unless it may be skipped."""
    try:
        demand_readable([SourceFile(path)])
    except DataError:
        return (CLEAN, "") if report.rejected else ("wrong-error", "an error, and no row is rejected")
    return ("silent", f"{report.rejected} bad rows and no error") if report.rejected else (CLEAN, "")


# ---------------------------------------------------------------------------------------------- what should come out


def _checked(path: Path, data: bytes, report: Taken) -> tuple[str, str]:
    """Whether the counts add up and each kept row is what strict parsing finds at its address."""
    if report.read != report.kept + report.rejected or len({row.number for row in report.rows}) != report.kept:
        return "miscount", f"{report.read} read, {report.kept} kept, {report.rejected} rejected"
    for reject in report.rejects:
        if not reject.where.startswith(f"{path}:"):
            return "wrong-error", f"a rejected row at {reject.where!r}"
    raw, sound = unpacked(path, data)
    format = named(report.files[0].format)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    expected = _ORACLES[kind](raw)
    for row in report.rows:
        line, column = (int(part) for part in row.where.rsplit(":", 2)[1:])
        try:
            same = row.content == format.read(expected(line, column), "")
        except (ValueError, LookupError, RecursionError) as failure:
            return "differs", f"row {row.number} at {row.where}: kept, but strictly: {str(failure)[:200]}"
        if not same:
            return "differs", f"row {row.number} at {row.where}: {str(row.content)[:200]}"
    whole = _count_of(kind, raw) if sound else None
    if whole is not None and whole != report.read:
        return "miscount", f"{report.read} read, {whole} in the file"
    return CLEAN, ""


def unpacked(path: Path, data: bytes) -> tuple[bytes, bool]:
    """What a packed file holds up to where its packing is damaged, and whether it is not."""
    if not path.name.endswith(".gz"):
        return data, True
    pieces = []
    with gzip.open(path, "rb") as file, contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
        while piece := file.read1(8192):
            pieces.append(piece)
        return b"".join(pieces), True
    return b"".join(pieces), False


Oracle = Callable[[int, int], Mapping[str, Any]]


def _json_oracle(raw: bytes) -> Oracle:
    """The object that strictly stands at a line and column."""
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")

    def find(line: int, column: int) -> Mapping[str, Any]:
        text = _valid_part(b"\n".join(lines[line - 1 :]))
        value, _ = STRICT.raw_decode(text, column - 1)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
        json.dumps(value, ensure_ascii=False).encode()
        return value

    return find


def _table_oracle(raw: bytes) -> Oracle:
    """The row that begins at a line, by column name."""
    text = _valid_part(raw.removeprefix(b"\xef\xbb\xbf"))
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    head = next((n for n, line in enumerate(lines) if line.strip(b"\r")), 0)
    delimiter = max(",;\t", key=_valid_part(lines[head]).count)
    start = sum(len(_valid_part(line)) + 1 for line in lines[:head])
    header = [cell.strip() for cell in _cells(text, start, delimiter)[0]]

    def find(line: int, _column: int) -> Mapping[str, Any]:
        cells, _ = _cells(_valid_part(b"\n".join(lines[line - 1 :])), 0, delimiter)
        if len(cells) != len(header) or len(set(header)) != len(header):
            raise ValueError(f"{len(cells)} cells for {len(header)} columns")
        return dict(zip(header, cells, strict=True))

    return find


def _cells(text: str, at: int, delimiter: str) -> tuple[list[str], int]:
    """The cells of the record at `at`, character by character as RFC 4180 has them, and the offset behind it."""
    cells: list[str] = []
    while True:
        cell = []
        if text[at : at + 1] == '"':
            at += 1
            while True:
                if at >= len(text):
                    raise ValueError("an open quote")
                if text[at] == '"' and text[at + 1 : at + 2] == '"':
                    cell.append('"')
                    at += 2
                elif text[at] == '"':
                    at += 1
                    break
                else:
                    cell.append(text[at])
                    at += 1
        else:
            while at < len(text) and text[at] != delimiter and text[at] != "\n":
                cell.append(text[at])
                at += 1
            if text[at : at + 1] in ("\n", ""):
                while cell and cell[-1] == "\r":
                    cell.pop()
        cells.append("".join(cell))
        while text[at : at + 1] == "\r" and text[at:].lstrip("\r")[:1] in ("\n", ""):
            at += 1
        if text[at : at + 1] != delimiter:
            if text[at : at + 1] not in ("\n", ""):
                raise ValueError(f"{text[at]!r} after a closing quote")
            return cells, at + 1
        at += 1


def _text_oracle(raw: bytes) -> Oracle:
    text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    if "\0" in text:
        raise ValueError("a NUL")
    return lambda _line, _column: {"text": text}


_ORACLES: dict[str, Callable[[bytes], Oracle]] = {
    "jsonl": _json_oracle,
    "json": _json_oracle,
    "csv": _table_oracle,
    "tsv": _table_oracle,
    "txt": _text_oracle,
}


def _count_of(kind: str, raw: bytes) -> int | None:
    """How many rows are in a file that is strictly sound as a whole; None when it is not."""
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError:
        return None
    if kind == "txt":
        return 1
    try:
        if kind == "json":
            whole = STRICT.decode(text)
            return len(whole) if isinstance(whole, list) else None
        if kind == "jsonl":
            # A first line that opens a list makes it a list.
            return None if text.lstrip().startswith("[") else len([x for x in text.split("\n") if x.strip(" \t\r\n")])
    except (ValueError, RecursionError):
        return None
    return None


def _valid_part(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as failure:
        text = raw[: failure.start].decode("utf-8")
    return text.partition("\0")[0]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key for the second time")
    return dict(pairs)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not finite")
    return float(text)


STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_finite, parse_constant=lambda name: _finite(name))


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Broken: rows are whatever Python's json module makes of them."""
    loose = json.JSONDecoder()
    kept = readers.parse, json_list.parse_at

    def parse(text: str, place: Place) -> object:
        return parse_at(text.strip(), 0, place)[0]

    def parse_at(text: str, start: int, place: Place) -> tuple[object, int]:
        try:
            return loose.raw_decode(text, start)
        except (ValueError, RecursionError) as failure:
            raise DataError(str(failure), where=place.at(text, start)) from None

    readers.parse, json_list.parse_at = parse, parse_at
    try:
        yield
    finally:
        readers.parse, json_list.parse_at = kept
