"""Digests of rows, by which copies are found."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import numpy as np

from luthier.data.findings import digests
from tests import forests


def test_a_row_of_many_views_has_the_digests_of_all_its_bytes() -> None:
    """Breaks when a view is left out of a row's digest, or the place where one ends."""
    views = [
        replace(view, text="Aa \n bÉ  "[: len(view.tokens)].ljust(len(view.tokens), "z"),
                weights=np.float32(np.arange(len(view.tokens)) % 2))
        for view in forests.views(5, shortest=3, longest=12)
    ]  # fmt: skip
    end = b"\xff" * 4
    whole = (
        b"".join(view.tokens.tobytes() + end for view in views),
        b"".join(" ".join(view.text.casefold().split()).encode() + b"\xff" for view in views),
        b"".join(view.tokens[view.weights > 0].tobytes() + end for view in views),
    )
    expected = tuple(int.from_bytes(blake2b(part, digest_size=8).digest(), "little") for part in whole)
    assert digests(views) == expected
    assert digests(views[:2]) != digests([views[1], views[0]])
