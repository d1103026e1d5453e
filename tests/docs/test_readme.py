"""What README and the page of methods say is what the catalog holds, checked apart from the script that writes it."""

from __future__ import annotations

import re

from luthier.core import catalog
from tests.docs.snippets import HOME


def test_the_table_of_methods_is_the_catalog() -> None:
    text = (HOME / "docs" / "methods.md").read_text("utf-8")
    block = text.partition("<!-- begin methods -->")[2].partition("<!-- end methods -->")[0]
    named = re.findall(r"^\| (\w+) \| `(\w+)` \|", block, re.MULTILINE)
    assert named == [(family, name) for family in catalog.families() for name in catalog.names(family)]


def test_readme_names_every_method_in_the_row_of_its_family() -> None:
    text = (HOME / "README.md").read_text("utf-8")
    for family in catalog.families():
        row = re.search(rf"^\| `{family}` \| .+ \| (.+) \|$", text, re.MULTILINE)
        assert row is not None and re.findall(r"`(\w+)`", row[1]) == catalog.names(family)


def test_a_family_that_is_there_is_not_called_not_yet() -> None:
    text = (HOME / "README.md").read_text("utf-8")
    planned = re.search(r"not yet: (.*?)\.\n", text, re.DOTALL)
    assert planned is not None
    words = set(re.split(r",\s+|\s+and\s+", planned[1]))
    assert not words & set(catalog.families())


def test_every_family_folder_has_a_method() -> None:
    assert all(catalog.names(family) for family in catalog.families())
