"""The page of probes: everything is in it, nothing is loaded, and no text can become markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from luthier.store import pictures
from luthier.store.probe_page import page, value_text

CURVES = {"title": "Counts <b>", "across": "epsilon", "up": "how many", "logarithmic": False,
          "lines": {"this": [[0.1, 0], [0.5, 3], [0.9, 40]], "random": [[0.1, 0], [0.9, 20]]}}  # fmt: skip
GRID = {"title": "By layer & role", "rows": ["layer 0", "layer 1"], "columns": ["q", "k"],
        "values": [[1.0, None], [-0.5, 0.25]], "signed": True}  # fmt: skip
TABLE = {"title": "Rows", "heads": ["name", "value"], "rows": [["<script>alert(1)</script>", 0.12345], ["b", None]]}
REPORT = {"verdict": ["All <i>fine</i>."], "numbers": {}, "tables": [TABLE], "curves": [CURVES], "grids": [GRID]}


def test_the_page_says_all_and_loads_nothing() -> None:
    """Breaks when a part of a report is left out, a text is taken as markup, or something is fetched."""
    bare = {"numbers": {}, "tables": [], "curves": [], "grids": []}
    nothing = {"verdict": ["Nothing to see."], "measured": False, **bare}
    text = page("a <run>", "x, beside y", {"b_first": nothing, "drift": REPORT}, {"spectrum": "about 2 minutes"})
    for part in ("a &lt;run&gt;", "All &lt;i&gt;fine&lt;/i&gt;.", "&lt;script&gt;", "0.1235", "Nothing to see.",
                 "Left out: spectrum (about 2 minutes)"):  # fmt: skip
        assert part in text
    assert "<script" not in text and "http" not in text.replace("http-equiv", "") and "url(" not in text
    assert text.index("Drift") < text.index("B first"), "what was not measured comes last"


def test_the_page_begins_with_what_each_probe_says_in_a_sentence() -> None:
    """Breaks when a reader has to scroll through all pictures to hear what was found, or a link leads nowhere."""
    more = {**REPORT, "verdict": ["Nothing <b>lost</b>.", "And more."]}
    blind = {**REPORT, "verdict": ["Nothing to see."], "measured": False}
    text = page("a", "b", {"drift": REPORT, "effective_rank": more, "spectrum": blind})
    short = text[text.index("<dl") : text.index("</dl>")]
    assert re.findall(r'href="#(\w+)"', short) == ["drift", "effective_rank"] and "Nothing to see" not in short
    assert "Nothing &lt;b&gt;lost&lt;/b&gt;." in short and "And more." not in short
    assert all(f'<section id="{name}">' in text for name in ("drift", "effective_rank"))
    assert "<dl" not in page("a", "b", {"drift": REPORT})


@pytest.mark.parametrize(("draw", "picture"), [(pictures.curves, CURVES), (pictures.grid, GRID)])
def test_pictures_are_well_formed_and_stay_inside(draw: object, picture: dict[str, object]) -> None:
    """Breaks when a value falls out of the frame, or the markup of a picture is broken."""
    root = ElementTree.fromstring(draw(picture))  # type: ignore[operator]
    svg = root.find("svg")
    assert svg is not None
    wide, tall = (float(each) for each in svg.attrib["viewBox"].split()[2:])
    for node in svg.iter():
        assert 0 <= float(node.attrib.get("x", node.attrib.get("cx", 0))) <= wide
        assert 0 <= float(node.attrib.get("y", node.attrib.get("cy", 0))) <= tall
    assert root.findtext("h3") == picture["title"]


def test_values_have_their_place_and_their_colour() -> None:
    """Breaks when a larger value is drawn lower or paler, or a negative one like a positive."""
    dots = re.findall(r'class="dot c0" cx="([\d.]+)" cy="([\d.]+)"', pictures.curves(CURVES))
    assert [float(x) for x, _ in dots] == sorted(float(x) for x, _ in dots) and len(dots) == 3
    assert [float(y) for _, y in dots] == sorted((float(y) for _, y in dots), reverse=True)
    cells = re.findall(r'class="(more|less)"[^>]*fill-opacity="([\d.]+)"', pictures.grid(GRID))
    assert cells == [("more", "1.000"), ("less", "0.500"), ("more", "0.250")]
    wide = {**GRID, "columns": [str(n) for n in range(30)], "rows": ["a"], "values": [[0.5] * 30], "signed": False}
    assert pictures.grid(wide).count("<rect") == 60 and ">0.5</text>" not in pictures.grid(wide)


def test_long_numbers_stay_in_their_cells_and_counts_of_nothing_are_above_it() -> None:
    """Breaks when cells are narrower than what stands in them, or an axis of counts shows negative ones."""
    cells = pictures.grid({**GRID, "values": [[-8.82e-05, 0.000199]] * 2})
    wide = min(float(each) for each in re.findall(r'<rect[^>]* width="([\d.]+)"', cells))
    assert "-8.82e-05</text>" in cells and wide >= 6.2 * len("-8.82e-05")
    none = pictures.curves({**CURVES, "lines": {"this": [[0.1, 0.0], [0.9, 0.0]]}})
    assert "-0." not in re.sub(r"<title>.*?</title>", "", none)


def test_nothing_to_draw_is_nothing_and_numbers_are_short() -> None:
    """Breaks when an empty series makes a picture, or a cell shows seventeen digits."""
    assert pictures.curves({**CURVES, "lines": {"a": []}}) == ""
    assert pictures.grid({**GRID, "values": [[None, None]] * 2}) == ""
    assert [value_text(each) for each in (None, 3, 12345, 2.0, 0.123456, "x")] == ["-", "3", "12,345", "2", "0.1235",
                                                                                   "x"]  # fmt: skip
    flat = {**CURVES, "lines": {"a": [[1.0, 2.0]]}, "logarithmic": True}
    assert 'class="dot c0"' in pictures.curves(flat)
