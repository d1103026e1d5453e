"""Where the time of chat rows goes on the way from a file to stored tokens, stage by stage.

    python benchmarks/chat_stages.py --files rows.jsonl more.json --templates chatml path/to/mine.jinja

For each file under each template: megabytes of its text a second of processor time, for each stage alone and for the
whole way. The stages are those of `luthier.data.prepare`, in its order and in batches of its size, on one thread:

- parse: a file's rows, which a run reads once more where they are many (`row_log.KEPT_CHARACTERS`);
- render: messages to texts, and where answers stand in them, the template's process included (its processor time is
  read from /proc);
- tokenise: texts to ids and spans;
- weights: the weight and the role of each token;
- check: what must hold of every row, looked at again;
- pack: digests of rows, and the arrays on the disk.

A stage is one call for a batch of rows where they are as nearly all are; `alike` is the share of such rows.

The tokenizer is that of --model (a folder or a hub id), by default the small base model that ships with luthier.
`alone` is the tokenizers library on the same text, nothing else being done, and `share` the speed of the whole way
against it. Rows that a template refuses count as text
but not in full as work, so a template that refuses many seems quick: see `kept`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from counts import count
from startup_tokens import PIECE, texts

from luthier.core.errors import DataError
from luthier.data.checks import check_rendered, sound_rows
from luthier.data.conversation import Row
from luthier.data.findings import Noted, digests, noted
from luthier.data.intake import BATCH_ROWS, FIRST_ROWS
from luthier.data.prepare import Reading, make_renderer, sources_of
from luthier.data.reading.rows import open_source
from luthier.data.rendering.layout import Filled
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.renderer import Renderer
from luthier.data.token_store import TokenStore
from luthier.data.tokenizer import Tokenizer

STAGES = ("parse", "render", "tokenise", "weights", "check", "pack")


class Clock:
    """Processor seconds of each stage: this process's, and in `render` also the template's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.process_time() - began


def text_bytes(path: Path) -> tuple[int, list[str]]:
    """Bytes of text in the rows of a file, and the texts in pieces, as the library is given them alone."""
    found = list(texts(path))
    pieces = [text[start : start + PIECE] for text in found for start in range(0, len(text), PIECE)]
    return sum(len(text.encode()) for text in found), pieces


def measured(path: Path, template: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """One file under one template, nothing cached."""
    clock = Clock()
    reading = Reading(template=template, over_length="drop", max_tokens=4096)
    renderer, _ = make_renderer(tokenizer, reading)
    (source,) = sources_of(path, reading)
    before = _process_seconds(renderer)
    items = open_source(source).items
    kept: list[tuple[Rendered, Noted | None]] = []
    rows, most = 0, FIRST_ROWS
    while True:
        with clock.stage("parse"):
            batch = [item for item in islice(items, most) if isinstance(item, Row)]
        if not batch:
            break
        most = min(2 * most, BATCH_ROWS)
        rows += len(batch)
        kept += _views(batch, renderer, clock)
    clock.seconds["render"] += _process_seconds(renderer) - before
    if tokenizer.words is not None:
        tokenizer.words.forget()
    with clock.stage("pack"), tempfile.TemporaryDirectory() as folder:
        for view, known in kept:
            if known is None:
                digests([view], renderer.native_rows)
        if kept:
            TokenStore.open_or_build(lambda _: (view for view, _ in kept), renderer, key="k", folder=Path(folder))
    renderer.template.close()
    size, pieces = text_bytes(path)
    began = time.process_time()
    tokenizer.raw.backend_tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    alone = time.process_time() - began
    # Three digits, wherever they begin: of a small file on a loaded machine two behind the point are none.
    speeds = {name: float(f"{size / 1e6 / max(spent, 1e-9):.3g}") for name, spent in clock.seconds.items()}
    whole = sum(clock.seconds.values())
    return {
        "file": path.name,
        "template": Path(template).stem,
        "rows": rows,
        "kept": len(kept),
        "alike": round(sum(known is not None for _, known in kept) / max(len(kept), 1), 2),
        "text_mb": round(size / 1e6, 2),
        **speeds,
        "whole": round(size / 1e6 / whole, 2),
        "alone": round(size / 1e6 / max(alone, 1e-9), 2),
        "share": round(max(alone, 1e-9) / whole, 2),
    }


def _views(batch: list[Row], renderer: Renderer, clock: Clock) -> list[tuple[Rendered, Noted | None]]:
    """The views of rows, with what is known of them where they are as nearly all are."""
    with clock.stage("render"):
        staged = [renderer.stage(row) for row in batch]
        renderer.foresee(staged)
        for one in staged:
            for stage in one.stages:
                stage.texts()
    with clock.stage("tokenise"):
        renderer.encode_ahead(staged)
    with clock.stage("weights"):
        together = renderer.weigh_ahead()
    ready: Iterator[tuple[bool, Rendered, Noted]] = iter(())
    if together is not None:
        with clock.stage("check"):
            sound = sound_rows(together, renderer)
        with clock.stage("pack"):
            notes = noted(together, renderer)
        with clock.stage("weights"):
            ready = iter(list(zip(sound, together.views(), notes, strict=True)))
    kept: list[tuple[Rendered, Noted | None]] = []
    for one in staged:
        known = next(ready, None) if isinstance(one.ready, Filled) else None
        if known is not None and known[0]:
            kept.append(known[1:])
            continue
        with clock.stage("weights"):
            made = renderer.finish(one)
        if isinstance(made, DataError):
            continue
        with clock.stage("check"):
            whole = not any(check_rendered(view, renderer, one.row) for view in made)
        kept += [(view, None) for view in made] if whole else []
    return kept


def _process_seconds(renderer: Renderer) -> float:
    """Processor seconds of the template's process so far; 0 where there is no /proc, or no process."""
    pid = renderer.template.pid
    try:
        after_name = Path(f"/proc/{pid}/schedstat").read_text("ascii").split()
    except OSError:
        return 0.0
    return int(after_name[0]) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seedling", help="whose tokenizer: a folder or a hub id")
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="data files of conversations")
    parser.add_argument("--templates", nargs="+", default=["instruction", "chatml"], help="names, or .jinja files")
    parser.add_argument("--repetitions", type=count, default=1, help="the best of so many is shown")
    args = parser.parse_args()
    folder = Path(sys.modules["luthier"].__path__[0]) / "assets" / "seedling"
    tokenizer = Tokenizer.load(folder if args.model == "seedling" else args.model)
    columns = ("file", "template", "rows", "kept", "alike", "text_mb", *STAGES, "whole", "alone", "share")
    print("  ".join(f"{name:>9}" for name in columns))
    for path in args.files:
        for template in args.templates:
            lines = [measured(path, template, tokenizer) for _ in range(args.repetitions)]
            best = {name: max(line[name] for line in lines) for name in columns}
            print("  ".join(f"{str(best[name])[-24:]:>9}" for name in columns), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
