"""A row as the model sees it: tokens, and for each token its role, its loss weight and where in the text it stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.data.forest import Floats, Ints

TOKEN_ROLES: tuple[str, ...] = ("template", "system", "user", "assistant", "tool", "text", "pair", "wrong")
"""Whose words a token belongs to; "template" is what no message owns, such as a BOS token.

"pair" is the second text of a pair, "wrong" a wrong answer of a choice, a rejected or a bad one.
"""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One view of one data row.

    `tokens` and `weights` are (n,), `roles` (n,) indexes TOKEN_ROLES, `spans` (n, 2) are character offsets into `text`
    (empty spans for tokens that no character stands for). A row whose template rewrites history has several views.

    `labels` (n,) is the class at each token, -1 where there is none, and None where rows have no classes. `types` (n,)
    are the token types of an encoder, 0 for the first text and 1 for the second, and None where all are 0.

    `answers` (n,) says which of several answers to one prompt a token belongs to, from 1 on, and 0 for the prompt; None
    where rows are one text. `scores` (n,) say how good that answer is, and are None where nothing says so.
    """

    row: int
    text: str
    tokens: Ints
    weights: Floats
    roles: NDArray[np.uint8]
    spans: Ints
    labels: Ints | None = None
    types: NDArray[np.uint8] | None = None
    answers: NDArray[np.uint8] | None = None
    scores: Floats | None = None

    @property
    def trained_count(self) -> int:
        """How many tokens carry loss."""
        return int(np.count_nonzero(self.weights))
