"""Sparse tuning: a small fixed part of the base weights, and no structure.

Idea: most of a tuned model's difference from its base is in few of its weights. So a few are chosen before training, by
their size or by the gradient of the first rows, and only what is added to those is trained; the file holds
    their places and values.
Equation: y = (W + D) x + b, D zero but at the chosen places: those of the largest |W|, |sum_n g_n| (gradient) or
    sum_n g_n^2 (fisher), g_n = dL_n / dW for the loss of row n, a sum over its tokens.
Source: fixed masks as in Sung et al., arXiv 2111.09839, section 3 (FISH: fisher, with the rows' own labels); choice
    by size as in Han et al., arXiv 1506.02626, section 3, turned from pruning to training.
Cost: density x in x out trained parameters a site; the forward pass is a second product of the same size, the backward
    pass two more: they are dense; 12 bytes a parameter in the file. A choice by gradient runs the rows once for each
    GiB of gradients (two for fisher) that the chosen matrices have, and holds so much meanwhile.
Use when: many variants of one model are kept as small differences, or it is asked which weights a task needs.
Not when: speed or memory of training counts: dense matrices are made on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.adapters import Adapter
from luthier.core.errors import NumericError
from luthier.model.editing.edits import Edit, Kept, SiteEdit
from luthier.model.editing.sites import Site, Sites

Targets = str | Annotated[tuple[str, ...], Field(strict=False)]
Choice = Literal["largest", "smallest", "random", "gradient", "fisher"]
BY_GRADIENT = ("gradient", "fisher")
GRADIENT_BYTES = 2**30
"""What gradients may take at once; a matrix whose own are larger is looked at alone."""


@final
class Sparse(Adapter):
    """A fixed few of the base weights."""

    peft_type: ClassVar[str | None] = "SPARSE"
    provides: ClassVar[frozenset[str]] = frozenset({"mergeable", "saves-places"})

    density: float = Field(0.005, gt=0, le=1, description="share of each matrix that is trained")
    choice: Choice = Field(
        "largest", description="which weights: by size, at random, or by the largest gradient or Fisher information"
    )
    rows: int = Field(64, ge=1, description="training rows that a choice by gradient or fisher looks at")
    targets: Targets = Field(
        "all-linear", description="all-linear, roles (q, k, v, o, gate, up, down), module name endings, or a pattern"
    )

    def attach(self, sites: Sites) -> list[Edit]:
        return [Places(site, self) for site in sites.select(self.targets)]

    @property
    def first_look(self) -> int:
        return self.rows if self.choice in BY_GRADIENT else 0

    def settle(self, edits: Sequence[Edit], look: Callable[[], Iterator[None]]) -> None:
        if self.choice not in BY_GRADIENT:
            return
        for group in _groups([edit for edit in edits if isinstance(edit, Places)], squares=self.choice == "fisher"):
            for edit in group:
                edit.watch(squares=self.choice == "fisher")
            for _ in look():
                for edit in group:
                    edit.end_row()
            for edit in group:
                edit.choose()

    def parameter_count(self, sites: Sites) -> int:
        return sum(self.count(site) for site in sites.select(self.targets))

    def count(self, site: Site) -> int:
        """How many weights of a site are trained: at least one."""
        return max(1, round(self.density * site.in_features * site.out_features))

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        chosen = sites.shortest_names(sites.select(self.targets))
        return {"density": self.density, "choice": self.choice, "rows": self.rows, "target_modules": chosen}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        targets = config["target_modules"]
        return cls(
            density=float(config["density"]),
            choice=config["choice"],
            rows=int(config.get("rows", cls.model_fields["rows"].default)),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        )


@final
class Places(SiteEdit):
    """The chosen places of one site and what is added there, in float32."""

    rows: Int[Tensor, " k"]
    columns: Int[Tensor, " k"]

    def __init__(self, site: Site, method: Sparse) -> None:
        super().__init__(site)
        self.shape = (site.out_features, site.in_features)
        flat = _chosen(site.weight(), method.count(site), method.choice)
        # Rows and columns apart: adapter files hold float32, in which a place in a whole matrix may not be exact.
        self.register_buffer("rows", flat // self.shape[1])
        self.register_buffer("columns", flat % self.shape[1])
        self.values = nn.Parameter(torch.zeros(len(flat), device=site.device))
        self._seen: Tensor | None = None
        self._squares: Tensor | None = None

    def watch(self, *, squares: bool) -> None:
        """Add up the gradient of the whole weight from now on, or the squares of those of single rows."""
        self._seen = torch.zeros(self.shape, device=self.values.device)
        self._squares = torch.zeros_like(self._seen) if squares else None

    def end_row(self) -> None:
        """What comes now is of another row."""
        if self._squares is not None and self._seen is not None:
            self._squares.addcmul_(self._seen, self._seen)
            self._seen.zero_()

    def choose(self) -> None:
        """Take the places where most was seen, and watch no longer. Raises NumericError for what is not finite."""
        scores, self._seen, self._squares = self._seen if self._squares is None else self._squares, None, None
        if scores is None or not bool(torch.isfinite(scores).all()):
            raise NumericError(
                f"the gradient of {self.site_name} holds numbers that are not finite, so it chooses no weights",
                do="look at the first rows with: luthier data show; or use precision float32",
            )
        flat = _chosen(scores, len(self.values), "largest")
        self.rows.copy_(flat // self.shape[1])
        self.columns.copy_(flat % self.shape[1])

    def before(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return x

    def after(self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        added: Tensor = _SparseProduct.apply(x, self.values, self.rows, self.columns, self._seen, self.shape)
        return y + added.to(y.dtype)

    def keeps(self) -> Kept:
        return Kept(input=True)

    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        return weight + _dense(self.values.detach(), self.rows, self.columns, self.shape, weight.dtype), bias

    def tensors(self) -> Mapping[str, Tensor]:
        return {"sparse_values": self.values, "sparse_rows": self.rows, "sparse_columns": self.columns}


class _SparseProduct(torch.autograd.Function):
    """x D^T that keeps neither D nor anything of its size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        rows: Tensor,
        columns: Tensor,
        seen: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.shape, ctx.seen = shape, seen
        ctx.save_for_backward(x, values, rows, columns)
        return F.linear(x, _dense(values, rows, columns, shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, rows, columns = ctx.saved_tensors
        grad_x = grad @ _dense(values, rows, columns, ctx.shape, grad.dtype) if ctx.needs_input_grad[0] else None
        whole = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.seen is not None:
            ctx.seen.add_(whole)
        return grad_x, whole[rows, columns].to(values.dtype), None, None, None, None


def _groups(edits: Sequence[Places], *, squares: bool) -> Iterator[list[Places]]:
    """Edits whose gradients may be held together."""
    group: list[Places] = []
    held = 0
    for edit in edits:
        needed = 4 * math.prod(edit.shape) * (2 if squares else 1)
        if group and held + needed > GRADIENT_BYTES:
            yield group
            group, held = [], 0
        group.append(edit)
        held += needed
    if group:
        yield group


def _chosen(weight: Float[Tensor, "out in"], count: int, choice: Choice) -> Int[Tensor, " k"]:
    """Flat places, ascending; among equals the first."""
    flat = weight.reshape(-1).float()
    if choice in BY_GRADIENT:
        # Any will do: they are chosen once there is a gradient, or read from a file.
        return torch.arange(count, device=weight.device)
    if choice == "random":
        return torch.randperm(len(flat))[:count].sort().values.to(flat.device)
    order = flat.abs().sort(descending=choice == "largest", stable=True).indices
    return order[:count].sort().values


def _dense(
    values: Float[Tensor, " k"],
    rows: Int[Tensor, " k"],
    columns: Int[Tensor, " k"],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Float[Tensor, "out in"]:
    found = torch.zeros(shape, dtype=dtype, device=values.device)
    found[rows, columns] = values.to(dtype)
    return found
