"""Drift: how far each matrix has moved from the base, and how much it has turned.

Idea: before anything is said about directions, the plain sizes: the norm of a change beside that of the matrix, and the
angle between the two matrices as vectors. A layer or role that moved many times as far as the others is where tuning
took place; one that did not move at all may have been frozen by mistake.
Equation: relative change = ||dW||_F / ||W0||_F; angle = arccos(<W0, W0 + dW> / (||W0||_F ||W0 + dW||_F)).
Source: the norms of low-rank updates: Hu et al., arXiv 2106.09685, section 7.3.
Cost: one pass over the weights; low-rank changes are not multiplied out for their norm, but for their angle.
Use when: always; it costs next to nothing.
Not when: the question is what the model now does: look at forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from pydantic import Field

from luthier.core.units import percent_text
from luthier.model.comparing.pair import Change, Pair, by_layer_and_role
from luthier.probes import Grid, Probe, Report, Table


@final
class Drift(Probe):
    """Norms and angles of changes, by role and layer."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    rows: int = Field(10, ge=1, description="matrices that are listed, those that moved farthest first")

    def look(self, pair: Pair) -> Report:
        found: list[tuple[Change, float, float]] = []
        for done, change in enumerate(pair.changes):
            pair.tell("drift", done, len(pair.changes))
            found.append((change, *_moved(change)))
        far, relative, angle = max(found, key=lambda one: one[1])
        middle = sorted(each for _, each, _ in found)[len(found) // 2]
        still = [change.name for change, each, _ in found if not each]
        verdict = [
            f"Matrices moved by {percent_text(middle)} of their norm (the middle one of {len(found)}); farthest is "
            f"{far.name} with {percent_text(relative)}, turned by {angle:.3g} degrees.",
        ]
        if still:
            verdict.append(f"{len(still)} of {len(found)} did not move at all, such as {still[0]}.")
        if pair.beside:
            verdict.append(f"Not among them, as they are no matrices of the base: {', '.join(pair.beside[:4])}.")
        listed = sorted(found, key=lambda one: -one[1])[: self.rows]
        table = Table(
            title="Matrices that moved farthest",
            heads=("matrix", "change / norm", "angle, degrees"),
            rows=[(change.name, relative, angle) for change, relative, angle in listed],
        )
        return Report(
            verdict=tuple(verdict),
            numbers={
                "middle_relative_change": middle,
                "largest_relative_change": relative,
                "largest_angle_degrees": max(each for _, _, each in found),
                "changed_matrices": len(found) - len(still),
            },
            tables=(table,),
            grids=_grids(found),
        )


@torch.no_grad()
def _moved(change: Change) -> tuple[float, float]:
    """The relative change of a matrix, and the angle in degrees."""
    base, delta = change.base().double(), change.delta().double()
    size, moved = float(base.norm()), float(delta.norm())
    # From the part of the change across the base: the cosine of a small angle is one in any precision.
    along = float((base * delta).sum()) / size if size else 0.0
    across = math.sqrt(max(0.0, moved**2 - along**2))
    return (moved / size if size else float(moved > 0)), math.degrees(math.atan2(across, size + along))


def _grids(found: Sequence[tuple[Change, float, float]]) -> tuple[Grid, ...]:
    """Relative changes by layer and role, where there are layers."""
    rows, columns, values = by_layer_and_role([(change, relative) for change, relative, _ in found])
    return (Grid(title="Change / norm, by layer and role", rows=rows, columns=columns, values=values),) if rows else ()
