"""Training rows as an objective may ask about all of them before the first step: what they are, and what they lack.

Idea: a row that lacks what an objective is set to learn from is valid, and so is a file in which there is only one of
two kinds; what is odd shows in counts alone. They are made of the stored tokens when they are asked for, since most
objectives ask for none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from luthier.data.rendering.rendered import TOKEN_ROLES

if TYPE_CHECKING:
    from luthier.data.prepare import Views

Mask = NDArray[np.bool_]
_WRONG = TOKEN_ROLES.index("wrong")


@final
@dataclass(frozen=True)
class TrainingRows:
    """The `views` that are trained, the address of a row by its number, and the rows of a step where it is so measured.

    Masks have an entry for each view.
    """

    views: Views
    where: Callable[[int], str]
    step_rows: int | None = None

    def __len__(self) -> int:
        return len(self.views)

    def of(self, mask: Mask) -> TrainingRows:
        """Those of a mask alone."""
        return replace(self, views=replace(self.views, indices=self.views.indices[mask]))

    def first(self, mask: Mask) -> str:
        """The address of the first row of a mask."""
        return self.where(int(self.views.store.rows[self.views.indices[np.flatnonzero(mask)[0]]]))

    @property
    def answered(self) -> Mask:
        """Those with answers that were compared or judged."""
        answers = self.views.store.more.get("answers")
        return np.zeros(len(self), np.bool_) if answers is None else self._any(answers > 0)

    @property
    def trained(self) -> Mask:
        """Those of which something is trained as it stands; the others are prompts."""
        return self._any(self.views.store.weights > 0)

    @property
    def wrong(self) -> Mask:
        """Those with an answer that is bad."""
        return self._any(self.views.store.roles == _WRONG)

    @property
    def scored(self) -> Mask:
        """Those whose answers have scores."""
        scores = self.views.store.more.get("scores")
        # NaN stands for every token of a row without.
        return np.zeros(len(self), np.bool_) if scores is None else self._any(~np.isnan(scores))

    def _any(self, tokens: NDArray[Any]) -> Mask:
        """The views that have a token of a mask."""
        found: Mask = np.logical_or.reduceat(tokens, self.views.store.offsets[:-1])[self.views.indices]
        return found
