"""Write the table of the latest run of `sft.py` as Markdown: to standard output, or into a document.

    python benchmarks/report.py --home bench-home
    python benchmarks/report.py --home bench-home --report docs/performance.md

In a document only the text between two marker lines is replaced; a document without them gets them at its end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import results

BEGIN, END = "<!-- benchmarks/sft.py: begin -->", "<!-- benchmarks/sft.py: end -->"


def place(document: str, text: str) -> str:
    """`document` with `text` between the markers."""
    if (BEGIN in document) != (END in document):
        raise SystemExit(f"the document has only one of {BEGIN!r} and {END!r}")
    if BEGIN not in document:
        document = document.rstrip("\n") + ("\n\n" if document.strip() else "") + f"{BEGIN}\n{END}\n"
    before, _, rest = document.partition(BEGIN)
    old, found, after = rest.partition(END)
    if not found or BEGIN in old:
        raise SystemExit(f"{BEGIN!r} must stand once, before {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder of results.jsonl")
    parser.add_argument("--baseline", default="trl-stock", help="the system that ratios refer to")
    parser.add_argument("--report", type=Path, help="Markdown document to write into")
    args = parser.parse_args()
    path = args.home / "results.jsonl"
    if not path.exists():
        parser.error(f"{path} does not exist; run sft.py first")
    text = results.markdown(results.latest_run(results.read_lines(path)), baseline=args.baseline)
    if args.report is None:
        print(text)
        return 0
    document = args.report.read_text("utf-8") if args.report.exists() else ""
    args.report.write_text(place(document, text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
