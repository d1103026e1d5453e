"""Merging: the edits of an attachment folded into the base weights, and out of them again.

Idea: each edit is added to its weight in float32, and the sum is rounded once into the form the weight was in: to its
dtype, or into the codes of whatever packed it. What rounding costs is measured, and told. What stood there before is
kept, so that undoing a merge is putting the very objects back: the base returns bit for bit, and so does the adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.core.units import percent_text
from luthier.model.editing import attachment as surgery
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import (
    Edit,
    EditedModule,
    LearnedPrompt,
    LearnedRoot,
    SiteEdit,
    TrainedParameters,
    module_at,
)
from luthier.model.packed import PackedWeight
from luthier.model.zoo import is_conv1d

_BESIDE: Final = "keep the adapter beside them"


@final
@dataclass
class Rounding:
    """What rounding has taken from merged weights: sums of squares over all of them."""

    weights: int = 0
    packed: int = 0
    error: float = 0.0
    whole: float = 0.0
    change: float = 0.0

    @property
    def relative_error(self) -> float:
        """The norm of what was lost, as a share of that of the weights."""
        return math.sqrt(self.error / self.whole) if self.whole else 0.0

    @property
    def of_change(self) -> float:
        """The norm of what was lost, as a share of that of what the edits change."""
        return math.sqrt(self.error / self.change) if self.change else 0.0

    def notice(self, name: str) -> str:
        """One line for a user; empty where nothing was lost."""
        if not self.error:
            return ""
        form = "packed again" if self.packed else "rounded"
        lost = f"{percent_text(self.relative_error)} of their norm"
        return (
            f"merge: {self.packed or self.weights} weights were {form} with {name!r} in them; that takes {lost}, and "
            f"{percent_text(self.of_change)} of the norm of what {name!r} changes"
        )


@final
@dataclass(frozen=True)
class Merged:
    """A merge that can be undone: the attachment, and what stood where its edits were folded in."""

    attachment: Attachment
    enabled: bool
    digest: str
    trained: tuple[nn.Parameter, ...]
    replaced: tuple[tuple[nn.Module, Mapping[str, nn.Parameter]], ...]
    beside: frozenset[str]
    rounding: Rounding = field(default_factory=Rounding)


@torch.no_grad()
def merge(
    model: nn.Module, attachment: Attachment, *, digest: str, beside: frozenset[str] = frozenset(), keep: bool = True
) -> Merged:
    """Fold the edits into the base weights and take the attachment off.

    `digest` is that of the base, `beside` names the other attachments. Where nobody wants to `keep` what stood there,
    it goes weight by weight, and no two copies of the model are held. Raises RecipeError when an edit cannot be folded
    (a learned root, an inserted layer, an edit around that of an earlier attachment), before anything has changed.
    """
    rounding = Rounding()
    _require_innermost(model, attachment)
    if not keep and (part := unmergeable(model, attachment)):
        raise RecipeError(f"{part} cannot be merged into weights", do=_BESIDE)
    folding = _folding(model, attachment, rounding)
    folded = list(folding) if keep else []
    kept = tuple((module, dict(module._parameters)) for module, _ in folded)
    trained = tuple(attachment.named_parameters().values())
    found = Merged(attachment, attachment.enabled, digest, trained, _present(kept), beside, rounding)
    for module, parameters in folded if keep else folding:
        for name, parameter in parameters.items():
            module.register_parameter(name, parameter)
    if not attachment.enabled:
        surgery.switch(model, attachment, on=True)
    # Trained parameters, of the base or of a new head, stay where they are.
    surgery.take_off_sites(model, attachment)
    for parameter in trained:
        parameter.requires_grad_(False)
    return found


@torch.no_grad()
def unmerge(model: nn.Module, merged: Merged) -> None:
    """Put back what stood in the weights before `merge`, and the attachment beside it, on or off as it was."""
    for module, parameters in merged.replaced:
        for name, parameter in parameters.items():
            module.register_parameter(name, parameter)
    attachment = merged.attachment
    for parameter in merged.trained:
        parameter.requires_grad_(True)
    surgery.put_on_sites(model, attachment, first=True)
    if not merged.enabled:
        surgery.switch(model, attachment, on=False)


def merged_digest(base: str, attachment: Attachment) -> str:
    """What identifies a base with an attachment folded in: the two of them, in that order."""
    return hashlib.sha256(f"{base} with {attachment.digest()}".encode()).hexdigest()


@torch.no_grad()
def unmergeable(model: nn.Module, attachment: Attachment) -> str:
    """What of an attachment no weight can hold, in words; empty where all of it can be merged. Nothing is changed.

    Of each kind of edit one is tried.
    """
    tried: set[type[Edit]] = set()
    for edit in attachment.edits:
        if isinstance(edit, LearnedRoot):
            return "a learned prompt" if isinstance(edit, LearnedPrompt) else "learned keys and values"
        if not isinstance(edit, SiteEdit) or type(edit) in tried:
            continue
        tried.add(type(edit))
        module = module_at(model, edit.site_name)
        base = module.base if isinstance(module, EditedModule) else module
        old, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if old is None or edit.merged(_matrix(old, base), None if bias is None else bias.float()) is None:
            return "layers of its own between those of the base"
    return ""


def _require_innermost(model: nn.Module, attachment: Attachment) -> None:
    """Raise RecipeError for an edit that computes on top of another attachment's."""
    for edit in attachment.edits:
        module = module_at(model, edit.site_name) if isinstance(edit, SiteEdit) else None
        if isinstance(module, EditedModule) and (first := next(iter(module.edits))) != attachment.name:
            raise RecipeError(
                f"{attachment.name!r} computes on top of {first!r} at {edit.site_name}",
                do=f"merge or detach {first!r} first",
            )


def _folding(
    model: nn.Module, attachment: Attachment, rounding: Rounding
) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """New parameters for every module with an edit, in the form of the old ones; only one is float32 at a time."""
    # What several modules share is kept until the end: another tensor could get its id.
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}
    shared = _shared_weights(model, attachment)
    for edit in attachment.edits:
        if isinstance(edit, TrainedParameters):
            continue
        module = module_at(model, edit.site_name) if isinstance(edit, SiteEdit) else None
        result = None
        if isinstance(edit, SiteEdit) and isinstance(module, EditedModule):
            result = _with_edit(edit, module.base, rounding)
        if result is None or not isinstance(module, EditedModule):
            raise RecipeError(f"{type(edit).__name__} cannot be merged into weights", do=_BESIDE)
        if id(module.weight) in shared:
            # A tied head and embedding that were changed alike stay one parameter.
            _, twin = made.setdefault(id(module.weight), (module.weight, result["weight"]))
            if torch.equal(twin, result["weight"]):
                result["weight"] = twin
        yield module.base, result


def _shared_weights(model: nn.Module, attachment: Attachment) -> set[int]:
    """The ids of weights that more than one module with an edit has."""
    modules = [module_at(model, edit.site_name) for edit in attachment.edits if isinstance(edit, SiteEdit)]
    counts = Counter(id(module.weight) for module in modules if isinstance(module, EditedModule))
    return {number for number, count in counts.items() if count > 1}


def _with_edit(edit: SiteEdit, module: nn.Module, rounding: Rounding) -> dict[str, nn.Parameter] | None:
    """A module's parameters with an edit folded in, each rounded once; None where that cannot be."""
    old, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if old is None:
        return None
    before = _matrix(old, module)
    changed = edit.merged(before, None if bias is None else bias.float())
    if changed is None:
        return None
    matrix, moved = changed[0].float(), changed[1]
    new = _in_form_of(old, matrix, module)
    _count(rounding, before, matrix, _matrix(new, module), packed=isinstance(old, PackedWeight))
    result = {"weight": nn.Parameter(new, requires_grad=False)}
    if moved is not None and bias is not None:
        result["bias"] = nn.Parameter(moved.to(bias.dtype), requires_grad=False)
    return result


def _matrix(weight: Tensor, module: nn.Module) -> Float[Tensor, "out in"]:
    """A weight as (out, in) in float32."""
    if isinstance(weight, PackedWeight):
        return weight.matrix(torch.float32)
    return weight.float().t() if is_conv1d(module) else weight.float()


def _in_form_of(old: Tensor, matrix: Float[Tensor, "out in"], module: nn.Module) -> Tensor:
    if isinstance(old, PackedWeight):
        return old.packed_again(matrix)
    return (matrix.t() if is_conv1d(module) else matrix).contiguous().to(old.dtype)


def _count(rounding: Rounding, before: Tensor, wanted: Tensor, found: Tensor, *, packed: bool) -> None:
    rounding.weights += 1
    rounding.packed += packed
    rounding.error += float((found - wanted).square().sum())
    rounding.whole += float(wanted.square().sum())
    rounding.change += float((wanted - before).square().sum())


def _present(
    kept: tuple[tuple[nn.Module, dict[str, nn.Parameter | None]], ...],
) -> tuple[tuple[nn.Module, Mapping[str, nn.Parameter]], ...]:
    return tuple((module, {name: each for name, each in held.items() if each is not None}) for module, held in kept)
