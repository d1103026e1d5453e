"""Tables in Markdown, and the places of a document that are written by a script."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    parts = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*parts, *("| " + " | ".join(row) + " |" for row in rows[1:])])


def place(document: str, text: str, name: str) -> str:
    """`document` with `text` between the markers of that name; they are put at its end where there are none."""
    begin, end = (f"<!-- {name} {word} -->" for word in ("begin", "end"))
    if (begin in document) != (end in document):
        raise SystemExit(f"the document has only one of {begin!r} and {end!r}")
    if begin not in document:
        document = document.rstrip("\n") + ("\n\n" if document.strip() else "") + f"{begin}\n{end}\n"
    before, _, rest = document.partition(begin)
    old, found, after = rest.partition(end)
    if not found or begin in old:
        raise SystemExit(f"{begin!r} must stand once, before {end!r}")
    return f"{before}{begin}\n{text}\n{end}{after}"
