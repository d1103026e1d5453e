"""Diagnosis: after a step with a number that is not finite, which number it was and which rows made it.

Idea: weights first, because everything downstream of a bad one is bad. Then the step is repeated micro-batch by
micro-batch, as it was cut and with the random numbers it had, under hooks that note the first module whose output and
the first parameter whose gradient is not finite. The micro-batches that show it are then repeated tree by tree to find
the rows. Slow, and only ever run after a bad step; all it leaves behind is that the gradients are cleared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from luthier.data.forest import Forest, Tree
from luthier.model.editing.edits import EditedModule, base_parameters
from luthier.train.random_state import RandomState
from luthier.train.stepper import Stepper, not_finite

What = Literal["loss", "gradient", "activation", "weight", "unknown"]


@dataclass(frozen=True)
class BadNumber:
    """The first number that is not finite: where it stands, its `value`, and the data rows that lead to it.

    A weight is no row's fault, so its `rows` are empty. `what` is "unknown" when the repeated step was finite.
    """

    what: What
    tensor: str
    rows: tuple[int, ...]
    value: float


def find_bad_number(stepper: Stepper, trees: Sequence[Tree]) -> BadNumber:
    """What was not finite in the step over `trees` that has just been made or refused; its gradients are cleared."""
    with _left_as_it_was(stepper), torch.enable_grad():
        return _bad_weight(stepper) or _bad_pass(stepper, trees)


def _bad_weight(stepper: Stepper) -> BadNumber | None:
    """The first weight that is not finite: trained ones first, then the base's own."""
    module = stepper.model.module
    # Masks among the buffers may hold infinities on purpose, but never NaN.
    buffers = {name: buffer for name, buffer in module.named_buffers() if bool(torch.isnan(buffer).any())}
    tables: list[Mapping[str, Tensor]] = [stepper.parameters, stepper.masters, base_parameters(module), buffers]
    for table in tables:
        numbers = {name: tensor.detach() for name, tensor in table.items() if tensor.is_floating_point()}
        for name in not_finite(numbers):
            return BadNumber("weight", name, (), _first_bad(numbers[name]))
    return None


def _bad_pass(stepper: Stepper, trees: Sequence[Tree]) -> BadNumber:
    """The first bad number of the repeated step, and the rows of every micro-batch that shows one."""
    stepper.zero_grad()
    stepper.model.train()
    stepper.began.restore()
    forests = stepper.micro_batches(trees)
    # All of them before any tree runs alone: the random numbers of each are those that the ones before it left.
    found = [_run(stepper, forest) for forest in forests]
    first = next((bad for bad in found if bad is not None), None)
    if first is None:
        return _bad_sum(stepper, sum(forest.weight for forest in forests), _rows(trees))
    shown = [forest for forest, bad in zip(forests, found, strict=True) if bad is not None]
    guilty = [tree for forest in shown for tree in _guilty(stepper, forest)]
    return BadNumber(first[0], first[1], _rows(guilty), first[2])


def _guilty(stepper: Stepper, forest: Forest) -> Sequence[Tree]:
    """The trees of a bad micro-batch that are bad alone; all of it when none is (other dropout, or only together)."""
    alone = []
    for tree in forest.trees:
        stepper.zero_grad()
        if _run(stepper, Forest((tree,))) is not None:
            alone.append(tree)
    return alone or forest.trees


def _bad_sum(stepper: Stepper, weight: float, rows: tuple[int, ...]) -> BadNumber:
    """Gradients that are finite row by row, but not when they are added up, or whose norm is not."""
    gradients = {name: master.grad for name, master in stepper.masters.items() if master.grad is not None}
    for name in not_finite(gradients):
        return BadNumber("gradient", name, rows, _first_bad(gradients[name]))
    norms = {name: float(torch.linalg.vector_norm(each)) / (weight or 1.0) for name, each in gradients.items()}
    if math.isfinite(math.hypot(*norms.values())):
        return BadNumber("unknown", "", rows, math.nan)
    largest = max(norms, key=lambda name: norms[name])
    return BadNumber("gradient", largest, rows, norms[largest])


def _run(stepper: Stepper, forest: Forest) -> tuple[What, str, float] | None:
    """Add the gradients of one micro-batch; what was not finite on the way, the most telling thing of it."""
    log_probs = loss = None
    with _witness(stepper) as seen:
        for _, outputs, report in stepper.passes(forest):
            log_probs = log_probs or _bad_in(_head_name(stepper), outputs.log_probs)
            loss = loss or _bad_in(stepper.objective.method_name(), report.sum)
    gradient = seen.gradient
    if log_probs is None and loss is None and gradient is None:
        # Whatever a module gave out, nothing came of it: some mask with infinities.
        return None
    if (activation := seen.activation or log_probs) is not None:
        return ("activation", *activation)
    if loss is not None:
        return ("loss", *loss)
    return None if gradient is None else ("gradient", *gradient)


@final
class _Seen:
    """The first output of a module, and the first gradient of a parameter, that was not finite."""

    def __init__(self) -> None:
        self.activation: tuple[str, float] | None = None
        self.gradient: tuple[str, float] | None = None

    def output_of(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def look(_module: nn.Module, _given: object, output: object) -> None:
            for tensor in _tensors(output):
                self.activation = self.activation or _bad_in(name, tensor)

        return look

    def gradient_of(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            self.gradient = self.gradient or _bad_in(name, gradient)

        return look


@contextmanager
def _witness(stepper: Stepper) -> Iterator[_Seen]:
    """Hooks for the length of a block. An inner module ends before the outer one, so the first is the innermost."""
    seen = _Seen()
    with ExitStack() as hooks:
        for name, module in stepper.model.module.named_modules():
            plain = _plain_name(stepper.model.module, name) or type(module).__name__
            hooks.callback(module.register_forward_hook(seen.output_of(plain)).remove)
        for name, parameter in stepper.parameters.items():
            hooks.callback(parameter.register_hook(seen.gradient_of(name)).remove)
        yield seen


@contextmanager
def _left_as_it_was(stepper: Stepper) -> Iterator[None]:
    """Random generators and mode come back after the block; gradients are cleared."""
    random, training = RandomState.now(stepper.model.device), stepper.model.module.training
    try:
        yield
    finally:
        stepper.zero_grad()
        stepper.model.train(training)
        random.restore()


def _plain_name(root: nn.Module, name: str) -> str:
    """The name a module has when nothing is attached: an adapter's wrapping is left out."""
    holder, kept = root, list[str]()
    for part in name.split("."):
        if not (isinstance(holder, EditedModule) and part == "base"):
            kept.append(part)
        holder = holder.get_submodule(part)
    return ".".join(kept)


def _head_name(stepper: Stepper) -> str:
    """The name of the output head, whose product is computed here and not by the module."""
    module = stepper.model.module
    head = module.get_output_embeddings()
    return next((name for name, each in module.named_modules() if each is head), "output head")


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _bad_in(name: str, tensor: Tensor) -> tuple[str, float] | None:
    numbers = tensor.detach()
    if not numbers.is_floating_point() or bool(torch.isfinite(numbers).all()):
        return None
    return name, _first_bad(numbers)


def _first_bad(tensor: Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    return float(flat[~torch.isfinite(flat)][0])


def _rows(trees: Sequence[Tree]) -> tuple[int, ...]:
    return tuple(sorted({tree.row for tree in trees}))
