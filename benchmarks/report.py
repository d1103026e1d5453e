"""Write the tables of the latest runs of `sft.py` as Markdown: to standard output, or into a document.

    python benchmarks/report.py --home bench-home
    python benchmarks/report.py --home bench-home --report docs/performance.md

Each workload has a table of its own. In a document only the text between its two marker lines is replaced; a document
without them gets them at its end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import results


def place(document: str, text: str, workload: str) -> str:
    """`document` with `text` between the markers of the workload."""
    begin, end = (f"<!-- benchmarks/sft.py: {workload} {word} -->" for word in ("begin", "end"))
    if (begin in document) != (end in document):
        raise SystemExit(f"the document has only one of {begin!r} and {end!r}")
    if begin not in document:
        document = document.rstrip("\n") + ("\n\n" if document.strip() else "") + f"{begin}\n{end}\n"
    before, _, rest = document.partition(begin)
    old, found, after = rest.partition(end)
    if not found or begin in old:
        raise SystemExit(f"{begin!r} must stand once, before {end!r}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder of results.jsonl")
    parser.add_argument("--baseline", default="trl-stock", help="the system that ratios refer to")
    parser.add_argument("--report", type=Path, help="Markdown document to write into")
    args = parser.parse_args()
    path = args.home / "results.jsonl"
    if not path.exists():
        parser.error(f"{path} does not exist; run sft.py first")
    lines = results.read_lines(path)
    document = args.report.read_text("utf-8") if args.report is not None and args.report.exists() else ""
    for workload in results.workloads(lines):
        latest = results.latest_run(lines, workload)
        systems = [line["system"] for line in latest]
        # Where the baseline did not run, the last system did: a peer, as systems are named ours first.
        text = results.markdown(latest, baseline=args.baseline if args.baseline in systems else systems[-1])
        document = place(document, text, workload)
        if args.report is None:
            print(f"{workload}\n\n{text}\n")
    if args.report is not None:
        args.report.write_text(document, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
