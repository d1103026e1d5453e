"""The page of a comparison: what it says, what it escapes, and what it does not make up."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from luthier.store.comparison import MARKDOWN, PAGE, heads, markdown, page, scatter, table, write_comparison


def one(method: str, quality: float, trained: int, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "quality": quality, "loss": 1.0, "trained_parameters": trained, "file_bytes": 10,
        "peak_memory_bytes": 10**8, "seconds": 3.0, "forgetting": None, "training_flops": 1e9, "query_flops": 1e6,
        "held_out_rows": 7, **more,
    }  # fmt: skip


FOUND = {
    "model": "m<b>", "data": "rows.jsonl", "set": ["budget.epochs=1"],
    "methods": [
        one("ia3", 0.3, 900), one("lora", 0.5, 326_000, forgetting=0.25),
        {"method": "full", "error": "no <memory> | left"},
        one("in_context", 0.1, 0, training_flops=0.0, query_flops=3e6),
    ],
}  # fmt: skip


HEADS = heads(FOUND)
PAYS = HEADS.index("pays after")


def test_the_best_comes_first_and_what_failed_says_why() -> None:
    """Breaks when a failed method is left out, or figures are put where none are."""
    rows = table(FOUND)
    assert [row[0] for row in rows] == ["lora", "ia3", "in_context", "full"]
    assert rows[3][1] == "no <memory> | left" and all(len(row) == len(HEADS) for row in rows[:3])
    named = dict(zip(HEADS, rows[0], strict=True))
    # A query saves 2e6 FLOPs, and training took 1e9.
    assert named["forgetting"] == "+0.2500" and named["pays after"] == "500 queries"
    assert rows[1][HEADS.index("forgetting")] == "not measured" and rows[2][PAYS] == "-"


def test_without_in_context_nothing_pays() -> None:
    """Breaks when a saving is told beside nothing, or a method that costs more at each query is said to pay."""
    alone = {**FOUND, "methods": FOUND["methods"][:1]}
    assert table(alone)[0][PAYS] == "-"
    dear = {**FOUND, "methods": [one("ia3", 0.3, 9, query_flops=4e6), FOUND["methods"][3]]}
    assert table(dear)[0][PAYS] == "never"


def test_markdown_has_a_cell_for_every_head() -> None:
    """Breaks when a bar or a line break in an error ends a cell."""
    lines = [line for line in markdown(FOUND).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and {line.count("|") for line in lines} == {len(HEADS) + 1}


def test_the_page_escapes_and_its_picture_is_well_formed(tmp_path: Path) -> None:
    """Breaks when a name is taken for markup, or a point lies outside of the picture."""
    text = page(FOUND)
    assert "m&lt;b&gt;" in text and "no &lt;memory&gt;" in text and "<b>" not in text
    picture = ET.fromstring(scatter(FOUND["methods"]))
    dots = picture.findall("circle")
    assert len(dots) == 3
    for dot in dots:
        assert 0 < float(dot.attrib["cx"]) < 720 and 0 < float(dot.attrib["cy"]) < 360
    heights = [float(dot.attrib["cy"]) for dot in dots]
    assert heights == sorted(heights, reverse=True)
    assert scatter([{"method": "full", "error": "x"}]) == ""
    assert write_comparison(tmp_path, FOUND) == tmp_path / PAGE and (tmp_path / MARKDOWN).is_file()


def test_labels_do_not_lie_on_each_other() -> None:
    """Breaks when methods that are equally good cannot be told apart."""
    picture = scatter([one(name, 0.5, 1000) for name in ("a", "b", "c", "d")])
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">[abcd]</text>', picture)
    assert len(places) == 4 and len({y for _, y in places}) == 4


def test_one_method_that_trains_nothing_has_a_picture() -> None:
    """Breaks when the logarithm of no parameter is taken."""
    assert "circle" in scatter([one("in_context", 0.5, 0)])


def test_quality_goes_by_the_name_of_what_judged_it() -> None:
    """Breaks when accuracy, or a metric of answers, is told as a likelihood."""
    chosen = {**FOUND, "methods": [one("lora", 0.9, 10, judged_by="accuracy")]}
    assert heads(chosen)[1] == "accuracy" and "the share of right choices" in markdown(chosen)
    asked = {**FOUND, "measures": {"metric": {"method": "bleu"}}, "methods": [one("lora", 31.0, 10)]}
    assert heads(asked)[1] == "bleu" and table(asked)[0][1] == "31.00"
    assert heads(FOUND)[1] == "quality"
