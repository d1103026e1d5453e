"""GaLore: Adam in a low-rank subspace of the gradient.

Idea: the gradient of a matrix lies mostly in few directions. Adam's moments are kept for the gradient as seen from its
strongest singular vectors, which are found anew now and then; its step is projected back. All weights are trained.
Equation: for G (m x n) with m >= n: P = the r first right singular vectors, R = G P^T; N = Adam's direction of R;
    W = W - lr c_t scale N P, c_t = sqrt(1-b2^t) / (1-b1^t). For m < n the same from the left. P every T steps.
Source: Zhao et al., arXiv 2403.03507, algorithm 2, and the authors' code: moments are not turned with the subspace,
    epsilon is added before the correction, decay comes after the step and is not scaled.
Cost: for a matrix 4 r min(m, n) bytes for P and 8 r max(m, n) for the moments (2.03 r max(m, n) in eight bits) instead
    of 8 m n; a singular value decomposition each T steps. With `per_layer` gradients of one layer instead of all.
Use when: all weights shall be trained and Adam's moments do not fit.
Not when: an adapter is trained, whose matrices are already thin; or a projection each 200 steps costs more than memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.maths import moments
from luthier.optimizers import Optimizer, PerTensor

Side = Literal["std", "reverse_std", "left", "right"]


@final
class GaLore(Optimizer):
    """Adam's moments in the gradient's strongest directions; what is no matrix of a target gets plain Adam."""

    learning_rate: float = Field(1.0e-2, gt=0, description="peak learning rate, before scale")
    rank: int = Field(128, ge=1, description="directions of a matrix; one with no more of them gets plain Adam")
    update_every: int = Field(200, ge=1, description="steps after which directions are found anew")
    scale: float = Field(0.25, gt=0, description="factor of a projected step")
    side: Side = Field("std", description="std projects the shorter side away, reverse_std the longer; or left, right")
    targets: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        ("attn", "attention", "mlp"), description="parts of names whose matrices are projected, whatever their capitals"
    )
    bits: Literal[8, 32] = Field(32, description="of a moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors never decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the running mean of squared gradients")
    epsilon: float = Field(1.0e-6, gt=0, description="added to the root mean square, before it is corrected")
    per_layer: bool = Field(
        False,
        description="step each tensor in the backward pass and let its gradient go; "
        "needs steps of one micro-batch and no max_grad_norm",
    )

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        knobs = {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self.epsilon, "eight_bit": self.bits == 8}
        projected = {"rank": self.rank, "update_every": self.update_every, "scale": self.scale, "side": self.side}
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, tensor in parameters.items():
            key = (self._projects(name, tuple(tensor.shape)), tensor.ndim > 1)
            groups.setdefault(key, []).append(tensor)
        return _Projected(
            [
                {"params": tensors, "weight_decay": self.weight_decay * decays, **(projected if projects else {})}
                for (projects, decays), tensors in groups.items()
            ],
            {"lr": self.learning_rate, **knobs},
        )

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        total = 0
        for name, shape in shapes.items():
            numbers = math.prod(shape)
            if self._projects(name, shape):
                away = shape[1] if _from_right(shape, self.side) else shape[0]
                numbers = self.rank * (numbers // away)
                total += 4 * self.rank * away
            total += moments.state_bytes(numbers, eight_bit=self.bits == 8)
        return total

    @property
    def steps_in_backward(self) -> bool:
        return self.per_layer

    def update_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        widest = super().update_bytes(shapes)
        for name, shape in shapes.items():
            if self._projects(name, shape):
                # The decomposition's copy, its two results, and what it works in.
                most, least = max(shape), min(shape)
                widest = max(widest, 4 * (2 * most * least + 5 * least * least))
        return widest

    def _projects(self, name: str, shape: tuple[int, ...]) -> bool:
        meant = any(target.lower() in name.lower() for target in self.targets)
        return meant and len(shape) == 2 and min(shape) > self.rank


@final
class _Projected(PerTensor):
    def update(
        self, tensor: Tensor, gradient: Tensor, state: MutableMapping[str, Any], group: Mapping[str, Any]
    ) -> None:
        projects, done = "rank" in group, state.get("step", 0)
        right = projects and _from_right(tuple(tensor.shape), group["side"])
        if projects and done % group["update_every"] == 0:
            state["basis"] = strongest(gradient, group["rank"], right=right)
        state["step"] = done + 1
        if projects:
            gradient = gradient @ state["basis"].t() if right else state["basis"].t() @ gradient
        betas = {"beta1": group["beta1"], "beta2": group["beta2"]}
        step = moments.direction(state, gradient, **betas, epsilon=group["epsilon"], eight_bit=group["eight_bit"])
        if projects:
            step = (step @ state["basis"] if right else state["basis"] @ step).mul_(group["scale"])
        tensor.sub_(step, alpha=group["lr"] * moments.correction(done + 1, **betas))
        tensor.mul_(1 - group["lr"] * group["weight_decay"])


def strongest(gradient: Float[Tensor, "m n"], rank: int, *, right: bool) -> Float[Tensor, ...]:
    """The singular vectors of the largest singular values: (rank, n) from the right, else (m, rank)."""
    left, _, turned = torch.linalg.svd(gradient.float(), full_matrices=False)
    return (turned[:rank] if right else left[:, :rank]).contiguous()


def _from_right(shape: tuple[int, ...], side: Side) -> bool:
    tall = shape[0] >= shape[1]
    return {"std": tall, "reverse_std": not tall, "right": True, "left": False}[side]
