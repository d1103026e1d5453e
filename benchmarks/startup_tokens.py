"""Rows to checked and stored tokens, for `startup.py`: megabytes of text a second and core, caches cold.

The text is that of Python's standard library, as one document or as the questions and answers that `prepare.py` draws
from it; a file of one's own goes in with --file. Processor time counts, of this process and of the one that renders
templates. The tokenizers library alone, on the same text in pieces of 16 thousand characters, is the speed that
anything that hands it the whole text must stay below: without offsets, and without anything else being done.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from luthier.data.prepare import Reading, prepare
from luthier.data.tokenizer import Tokenizer

LEAST_BYTES = 10_000_000
PIECE = 2**14


def text_bytes(path: Path) -> int:
    """Bytes of text in a data file: the whole of a text, the strings of rows otherwise."""
    return sum(len(text.encode()) for text in texts(path))


def texts(path: Path) -> Iterator[str]:
    """The texts of a data file: one for a text file, each string of each row otherwise."""
    if path.suffix == ".txt":
        yield path.read_text("utf-8")
        return
    if path.suffix == ".json":
        yield from strings(json.loads(path.read_text("utf-8")))
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield from strings(json.loads(line))


def strings(value: object) -> Iterator[str]:
    """The strings of a row, however deep they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def write_text(path: Path) -> None:
    """The standard library's sources, as many as give enough."""
    from prepare import _library_texts

    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in _library_texts():
            if size >= LEAST_BYTES:
                break
            file.write(text)
            size += len(text.encode())


def write_chat(path: Path, rows: Path) -> None:
    """The prepared rows again and again, each time with another number, so that none is a copy."""
    prepared = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < LEAST_BYTES // 2:
            for row in prepared:
                number += 1
                made = {"prompt": f"{number} {row['prompt']}", "completion": row["completion"]}
                file.write(json.dumps(made) + "\n")
                size += len(made["prompt"]) + len(made["completion"])


def cpu_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the prepared folder, HOME/m1")
    parser.add_argument("--kind", choices=["text", "chat"], required=True)
    parser.add_argument("--file", type=Path, help="a .txt or .jsonl file instead")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(str(args.folder / "model"))
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        path = args.file or Path(scratch) / ("rows.txt" if args.kind == "text" else "rows.jsonl")
        if args.file is None:
            write_text(path) if args.kind == "text" else write_chat(path, args.folder / "rows.jsonl")
        size = text_bytes(path)
        began, wall = cpu_seconds(), time.perf_counter()
        reading = Reading(template="instruction", max_tokens=4096)
        made = prepare(str(path), tokenizer, reading, cache=Path(scratch) / "cache")
        spent, taken = cpu_seconds() - began, time.perf_counter() - wall
        pieces = [text[start : start + PIECE] for text in texts(path) for start in range(0, len(text), PIECE)]
        began = cpu_seconds()
        tokenizer.raw.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        alone = cpu_seconds() - began
    line = {
        "text_bytes": size,
        "tokens": made.store.token_count,
        "mb_per_s": round(size / 1e6 / spent, 2),
        "mb_per_s_wall": round(size / 1e6 / taken, 2),
        "tokenizer_mb_per_s": round(size / 1e6 / alone, 2),
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
