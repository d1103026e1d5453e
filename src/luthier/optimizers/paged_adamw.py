"""Paged AdamW: moments that lie where memory is cheap, and come near for their part of a step.

Idea: a step looks at each moment once. So they may lie in a file that is mapped into memory (on a CPU) or in the host's
pinned memory (on a GPU), and be worked on piece by piece; what was worked on is given back at once. The system writes
pages of such a file out when somebody else needs the memory, which it cannot do with a tensor.
Equation: AdamW's (see adamw), to the same numbers within float32's rounding.
Source: Dettmers et al., arXiv 2305.14314, section 3, "paged optimizers", there by CUDA's unified memory.
Cost: 8 bytes of disk or host memory a parameter, which a step reads and writes once; on the device the moments of a
    quarter of a million numbers.
Use when: the moments of a fully tuned model do not fit beside it.
Not when: they do; or the folder of pages lies in memory itself (tmpfs), which is refused.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from luthier.core.errors import RecipeError
from luthier.maths import moments
from luthier.optimizers import Optimizer, PerTensor, decay_groups

PIECE: Final = 2**18
"""Numbers that are worked on at once."""
MOMENTS: Final = ("first", "second")


@final
class PagedAdamW(Optimizer):
    """AdamW whose moments lie in a mapped file or in the host's memory; weight decay on matrices only."""

    learning_rate: float = Field(2.0e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors never decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the running mean of squared gradients")
    epsilon: float = Field(1.0e-8, gt=0, description="added to the root mean square")
    folder: str = Field("", description="a folder on a disk for pages, on a CPU; empty is that of temporary files")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate

    def build(self, parameters: Mapping[str, Tensor]) -> TorchOptimizer:
        folder = Path(self.folder or tempfile.gettempdir())
        if all(tensor.device.type == "cpu" for tensor in parameters.values()):
            require_disk_folder(folder)
        knobs = {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self.epsilon}
        groups = decay_groups(parameters, self.weight_decay)
        return _Paged(groups, {"lr": self.learning_rate, **knobs}, folder=folder)

    def state_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 8 * sum(map(math.prod, shapes.values()))

    def resident_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return 8 * min(PIECE, max(map(math.prod, shapes.values()), default=0))


@final
class _Paged(PerTensor):
    """Each tensor has two rows of pages: its first moments and its second ones."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], *, folder: Path) -> None:
        super().__init__(groups, defaults)
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        self.pages = {id(tensor): Pages(tensor, folder) for tensor in tensors}

    def update(
        self, tensor: Tensor, gradient: Tensor, state: MutableMapping[str, Any], group: Mapping[str, Any]
    ) -> None:
        state["step"] = step = state.get("step", 0) + 1
        pages = self.pages[id(tensor)]
        # After a resume they are tensors like any other.
        pages.take(state)
        betas = {"beta1": group["beta1"], "beta2": group["beta2"]}
        epsilon = group["epsilon"] * math.sqrt(1 - group["beta2"] ** step)
        rate = group["lr"] * moments.correction(step, **betas)
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        flat, flat_gradient = tensor.reshape(-1), gradient.reshape(-1)
        for start in range(0, len(flat), PIECE):
            own = slice(start, start + PIECE)
            near = {name: state[name].view(-1)[own].to(tensor.device, non_blocking=True) for name in MOMENTS}
            direction = moments.direction(near, flat_gradient[own], **betas, epsilon=epsilon, eight_bit=False)
            flat[own].sub_(direction, alpha=rate)
            for name in MOMENTS:
                if tensor.device.type != "cpu":
                    state[name].view(-1)[own].copy_(near[name])
            # Piece by piece: the moments of one large tensor would be most of what is saved.
            pages.give_back()
        if not tensor.is_contiguous():
            tensor.copy_(flat.view_as(tensor))


@final
class Pages:
    """Memory for the moments of one tensor: a mapped file without a name beside a CPU, pinned beside a GPU."""

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        self.shape = tensor.shape
        self.maps: list[mmap.mmap] = []
        self.moments = [self._mapped(folder) if tensor.device.type == "cpu" else self._pinned() for _ in MOMENTS]

    def take(self, state: MutableMapping[str, Any]) -> None:
        """Let `state` hold the pages, with what it held before; zeros if it held nothing."""
        for name, own in zip(MOMENTS, self.moments, strict=True):
            if name in state and state[name] is not own:
                own.copy_(state[name])
            state[name] = own

    def give_back(self) -> None:
        """What was read and written leaves this process's memory; the file keeps it."""
        for each in self.maps:
            each.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, folder: Path) -> Float[Tensor, ...]:
        size = 4 * self.shape.numel()
        if not size:
            return torch.zeros(self.shape)
        with tempfile.TemporaryFile(dir=folder, prefix="luthier-moments-") as file:
            file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
        self.maps.append(pages)
        return torch.frombuffer(pages, dtype=torch.float32).view(self.shape)

    def _pinned(self) -> Float[Tensor, ...]:
        return torch.zeros(self.shape, pin_memory=True)


def require_disk_folder(folder: Path) -> None:
    """Raise RecipeError unless `folder` is there and on a disk: pages in a file system of memory would save none."""
    if not folder.is_dir():
        raise RecipeError(f"optimizer.folder: {folder} is no folder", do="name one on a disk with room for the moments")
    if kind_of_file_system(folder) in ("tmpfs", "ramfs"):
        raise RecipeError(
            f"optimizer.folder: {folder} lies in memory, so moments there take as much of it as anywhere",
            allowed="a folder on a disk",
            do="set optimizer.folder, or TMPDIR, to one",
        )


def kind_of_file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that `folder` is on, "" where that cannot be known."""
    if not mounts.is_file():
        return ""
    place, best, kind = folder.resolve(), -1, ""
    for line in mounts.read_text("utf-8", errors="replace").splitlines():
        _, root, name, *_ = line.split(" ")
        # Of mounts at one place the last covers the others.
        if place.is_relative_to(root) and len(root) >= best:
            best, kind = len(root), name
    return kind
