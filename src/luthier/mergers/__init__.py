"""Mergers: several models of one shape as one, tensor by tensor.

The contract: a merger is a pure function of numbers. It sees the same rows of one tensor in every model, as arrays in
float32, and gives those rows of the merged one. What it must know of a whole tensor first (an angle, a threshold) it
gathers in `look`, as sums over rows; so tensors may be larger than memory. It never sees a model class, a file or a
layer: which knobs hold for which tensor is the machine's to say (`merge/`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final

import numpy as np
from jaxtyping import Float, Num

from luthier.core.errors import RecipeError
from luthier.core.knobs import Method
from luthier.kernels.vectors import combined, gram

Rows = Float[np.ndarray, "rows columns"]
Sums = Mapping[str, Num[np.ndarray, "..."]]
"""What a look at some rows gives; those of two pieces are added, name by name."""
GRAM: Final = "gram"
"""What inner products are called among the sums of a look."""
BASE: Final = "base"
"""What a merger requires that works on changes: the model that all others come from."""


@final
@dataclass(frozen=True)
class Part:
    """The same rows of one tensor in each model, and in the base where there is one.

    `weights` has a number for each model. `first` numbers of the tensor lie before these rows, and it has `size` in
    all; `key` names the tensor to whoever draws random numbers.
    """

    models: tuple[Rows, ...]
    base: Rows | None
    weights: tuple[float, ...]
    first: int = 0
    size: int = 0
    key: int = 0

    @property
    def origin(self) -> Rows:
        """The base. Raises RecipeError where there is none."""
        if self.base is None:
            raise no_base()
        return self.base

    @property
    def changes(self) -> tuple[Rows, ...]:
        """What each model has changed: its rows less the base's."""
        return tuple(rows - self.origin for rows in self.models)


class Merger(Method):
    """A way to make one tensor of several. Of its knobs all but switches may differ from tensor to tensor."""

    passes: ClassVar[int] = 0
    """How often all rows are looked at before any of them are merged."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models that it merges, besides the base."""
    ordered: ClassVar[bool] = False
    """Whether it matters which model comes first, weights being equal."""

    def look(self, part: Part, seen: Sequence[Sums]) -> Sums:
        """What has to be known of these rows before any are merged; `seen` has the sums of earlier passes."""
        raise NotImplementedError(f"{self.method_name()} looks at nothing")

    @abstractmethod
    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        """The merged rows, new ones: those of the models are left as they are."""

    def told(self, weights: Sequence[float], seen: Sequence[Sums]) -> dict[str, Any]:
        """What a user should know of how one tensor was merged; plain values."""
        return {}

    @final
    def whole(self, part: Part) -> Rows:
        """A whole tensor at once: all looks, then the merge."""
        seen: list[Sums] = []
        for _ in range(self.passes):
            seen.append(self.look(part, seen))
        return self.merge(part, seen)

    @final
    def require(self, count: int, *, base: bool) -> None:
        """Raise RecipeError for a number of models, or a lack of a base, that this merger cannot work with."""
        fewest, most = self.models
        if count < fewest or (most is not None and count > most):
            wanted = f"exactly {most}" if fewest == most else f"at least {fewest}" if most is None else f"up to {most}"
            raise RecipeError(f"{self.method_name()} was given {count} model{'s' * (count != 1)}", allowed=wanted,
                              do="name as many, or choose another --method: luthier describe lists them")  # fmt: skip
        if BASE in self.requires and not base:
            raise RecipeError(f"{self.method_name()} merges what models have changed, and there is no base",
                              allowed="the model that all of them come from", do="name it: --base MODEL")  # fmt: skip


class WeightedSum(Merger):
    """A way that makes each tensor a weighted sum of the models' and the base's: their inner products say how much of
    each. It looks at nothing else and computes nothing else, so a machine may do both without this class.
    """

    @property
    def looks_at(self) -> Literal["weights", "changes"]:
        """Whose inner products it has to know, where it has a look."""
        return "weights"

    @abstractmethod
    def shares(self, weights: Sequence[float], seen: Sequence[Sums]) -> tuple[float, ...]:
        """How much of each model is taken, and behind these of the base where it takes any."""

    @final
    def look(self, part: Part, seen: Sequence[Sums]) -> Sums:
        return {GRAM: gram(part.models if self.looks_at == "weights" else part.changes)}

    @final
    def merge(self, part: Part, seen: Sequence[Sums]) -> Rows:
        shares = self.shares(part.weights, seen)
        return combined(part.models if len(shares) == len(part.models) else (*part.models, part.origin), shares)


def no_base() -> RecipeError:
    """What is wrong where changes are asked for, and nothing says of what."""
    return RecipeError("no base was given to a merger of changes", allowed="a base model", do="name it: --base")
