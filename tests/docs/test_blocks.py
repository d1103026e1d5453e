"""Generated tables are fresh, links lead somewhere, and what a table names exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.snippets import HOME, PAGES

LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#]*)(?:#([^)]+))?\)")


def renew_docs() -> ModuleType:
    """The script that makes the generated blocks."""
    spec = importlib.util.spec_from_file_location("renew_docs", HOME / "scripts" / "renew_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_generated_blocks_are_fresh(page: Path) -> None:
    text = page.read_text("utf-8")
    assert renew_docs().renewed(text) == text, f"{page.name} is out of date; run: python scripts/renew_docs.py"


def test_every_block_is_used_and_closed() -> None:
    script = renew_docs()
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    assert {match[2] for match in script.MARKED.finditer(text)} == set(script.BLOCKS)
    assert text.count("<!-- begin ") == text.count("<!-- end ") == len(script.MARKED.findall(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    # Programs have brackets too.
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for path, anchor in LINK.findall(prose):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{page.name} links to #{anchor}; {target.name} has {sorted(anchors)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|src|scripts|benchmarks)/[\w./-]+\.(?:py|md))`", page.read_text("utf-8"))
    missing = [name for name in named if not (HOME / name).exists() and "mine" not in name]
    assert not missing, f"{page.name} names {missing}"
