"""Attachments: the edits of one adapter on a model, and everything that is done with them.

An attachment is put on, switched off and on, and taken off; taking it off gives back the very module and parameter
objects that were there, so the base model returns bit for bit. Several attachments may be on at once; at one site
their edits apply in the order in which they came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.model.editing.edits import (
    Edit,
    EditedModule,
    LearnedRoot,
    SiteEdit,
    Switch,
    TrainedParameters,
    inner_module,
    module_at,
)
from luthier.model.packed import packing_of

PEFT_PREFIX = "base_model.model."
ROOT_PREFIX = "base_model."


@final
class Attachment:
    """The edits of one adapter, under a name, on one model; `named_only` computes for rows that name it alone."""

    def __init__(self, name: str, edits: list[Edit], *, named_only: bool = False) -> None:
        if not edits:
            raise RecipeError(f"the adapter {name!r} changes nothing", do="check its targets")
        _require_one_edit_a_site(edits)
        self.name = name
        self.edits = edits
        self.trained = [edit for edit in edits if isinstance(edit, TrainedParameters)]
        self.active = Switch(named_only=named_only)
        _share_tied(edits)

    @property
    def enabled(self) -> bool:
        """Whether the model computes with it, for all rows or for those that name it."""
        return self.active.on

    @property
    def root(self) -> LearnedRoot | None:
        """The learned ancestor of every tree, if the adapter has one."""
        return next((edit for edit in self.edits if isinstance(edit, LearnedRoot)), None)

    @property
    def trains_base(self) -> bool:
        """Whether the model's own parameters are trained, so that the result is a model and not an adapter file."""
        return any(not edit.new for edit in self.trained)

    @property
    def new_parts(self) -> list[str]:
        """The modules of a new head that are trained with the adapter."""
        return [edit.site_name for edit in self.trained if edit.new]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the attachment under its name in the adapter file, in a stable order."""
        named: dict[str, Tensor] = {}
        for edit in self.edits:
            if isinstance(edit, (SiteEdit, TrainedParameters)):
                # Where nothing but a root is learned, PEFT wraps the model once less, and a new head's name shows it.
                prefix = ROOT_PREFIX if self.root is not None and edit in self.trained else PEFT_PREFIX
                named.update({f"{prefix}{edit.site_name}.{key}": value for key, value in edit.tensors().items()})
            else:
                named.update(edit.tensors())
        return named

    def named_base_tensors(self) -> dict[str, Tensor]:
        """Tensors of the base that an adapter file may repeat, under their names there."""
        return {f"{PEFT_PREFIX}{where}.{key}": tensor for where, edit in self._named_edits()
                for key, tensor in edit.base_tensors().items()}  # fmt: skip

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, each once, by a stable name."""
        named: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for where, edit in self._named_edits():
            for key, parameter in edit.named_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    named[f"{where}.{key}"] = parameter
        return named

    def rate_factors(self) -> dict[str, float]:
        """What the learning rate of each trained parameter is multiplied by, under the names of these."""
        said = {f"{where}.{key}": value for where, edit in self._named_edits()
                for key, value in edit.rate_factors().items()}  # fmt: skip
        return {name: said.get(name, 1.0) for name in self.named_parameters()}

    def named_constants(self) -> dict[str, Tensor]:
        """What edits have found at their start and training leaves as it is, by a stable name: persistent buffers.

        A checkpoint holds it, since attaching again may find something else.
        """
        named: dict[str, Tensor] = {}
        for where, edit in self._named_edits():
            parameters = dict(edit.named_parameters(remove_duplicate=False))
            kept = edit.state_dict().items()
            named.update({f"{where}.{key}": tensor for key, tensor in kept if key not in parameters})
        return named

    def _named_edits(self) -> Iterator[tuple[str, Edit]]:
        for index, edit in enumerate(self.edits):
            yield edit.site_name if isinstance(edit, (SiteEdit, TrainedParameters)) else f"root{index}", edit

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.named_parameters().values())

    def digest(self) -> str:
        """sha256 over names, shapes and bytes of all tensors: equal exactly when the attachment computes the same."""
        return _digest(self.named_tensors())

    def trained_digest(self) -> str:
        """The same of the tensors that training changes: all but those that an edit has found at its start."""
        constants = {tensor.data_ptr() for tensor in self.named_constants().values()}
        return _digest({name: each for name, each in self.named_tensors().items() if each.data_ptr() not in constants})


def _digest(named: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in named.items():
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def require_apart(attachment: Attachment, others: Iterable[Attachment], model: nn.Module) -> None:
    """Raise RecipeError unless `attachment` can train beside `others`, and what it trains of `model` can be trained."""
    name, trains_base = attachment.name, attachment.trains_base
    if attachment.active.named_only and trains_base:
        raise RecipeError(
            f"{name!r} trains the model's own weights, which are the same for all rows",
            allowed="adapters beside the weights for rows that name them",
        )
    for other in others:
        if (trains_base and other.trains_base) or set(attachment.new_parts) & set(other.new_parts):
            raise RecipeError(
                f"{name!r} and {other.name!r} would train the same parameters of the model",
                allowed="one at a time",
            )
    if trains_base and any(packing_of(each) is not None for each in model.parameters()):
        raise RecipeError(
            f"{name!r} trains the model's own parameters, and its weights are packed",
            allowed="adapters beside the weights, such as lora",
            do="use a model that is not quantized",
        )


def put_on(model: nn.Module, attachment: Attachment) -> None:
    """Apply all edits of `attachment` to `model`."""
    put_on_sites(model, attachment)
    for edit in attachment.trained:
        _swap_parameters(model, edit, trained=True)


def put_on_sites(model: nn.Module, attachment: Attachment, *, first: bool = False) -> None:
    """Apply its edits at sites: around those that are there, or inside them when it comes `first`."""
    for edit in attachment.edits:
        if isinstance(edit, SiteEdit):
            edit.switch = attachment.active
            edits = _edited(model, edit.site_name).edits
            outer = dict(edits.items()) if first else {}
            edits[attachment.name] = edit
            for name, module in outer.items():
                # What is set again comes last.
                del edits[name]
                edits[name] = module


def take_off(model: nn.Module, attachment: Attachment) -> None:
    """Undo all edits of `attachment`; the base objects come back as they were."""
    take_off_sites(model, attachment)
    for edit in attachment.trained:
        _swap_parameters(model, edit, trained=False)


def take_off_sites(model: nn.Module, attachment: Attachment) -> None:
    """Undo its edits at sites; what it trains of the model itself stays as it is."""
    for edit in attachment.edits:
        if isinstance(edit, SiteEdit):
            edited = module_at(model, edit.site_name)
            if not isinstance(edited, EditedModule):
                raise RecipeError(f"{attachment.name!r} is not on {edit.site_name}", do="attach it first")
            del edited.edits[attachment.name]
            if not edited.edits:
                _set_module(model, edit.site_name, edited.base)


def switch(model: nn.Module, attachment: Attachment, *, on: bool) -> None:
    """Let the model compute with (`on`) or without the attachment; nothing is copied, however many sites it has."""
    attachment.active.on = on
    for edit in attachment.trained:
        _swap_parameters(model, edit, trained=on)


@contextmanager
def switched_off(model: nn.Module, attachments: list[Attachment]) -> Iterator[None]:
    """The model without these attachments: the reference policy, and the "before" of a comparison."""
    active = [attachment for attachment in attachments if attachment.enabled]
    for attachment in active:
        switch(model, attachment, on=False)
    try:
        yield
    finally:
        for attachment in active:
            switch(model, attachment, on=True)


def _require_one_edit_a_site(edits: list[Edit]) -> None:
    """At a site the edits of a model go by the attachment's name, so a second one would take the first one's place."""
    names = [edit.site_name for edit in edits if isinstance(edit, SiteEdit)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"the adapter changes {', '.join(twice[:3])} in two ways at once",
            allowed="one change at a site",
            do="take the head or the embedding out of adapter.targets, or out of the sites of the trained tokens",
        )


def _share_tied(edits: list[Edit]) -> None:
    """Let edits of one original parameter (a tied head and embedding) train one new parameter: it stays tied."""
    shared: dict[int, nn.Parameter] = {}
    for edit in edits:
        if isinstance(edit, TrainedParameters):
            for name, original in edit.originals.items():
                edit.share(name, shared.setdefault(id(original), edit.trained(name)))


def _edited(model: nn.Module, name: str) -> EditedModule:
    module = module_at(model, name)
    if isinstance(module, EditedModule):
        return module
    edited = EditedModule(module)
    edited.train(module.training)
    _set_module(model, name, edited)
    return edited


def _swap_parameters(model: nn.Module, edit: TrainedParameters, *, trained: bool) -> None:
    module = module_at(model, edit.site_name)
    target = module.base if isinstance(module, EditedModule) else module
    for name, original in edit.originals.items():
        *owners, leaf = name.split(".")
        holder = target
        for owner in owners:
            holder = holder.get_submodule(owner)
            holder = holder.base if isinstance(holder, EditedModule) else holder
        holder.register_parameter(leaf, edit.trained(name) if trained else original)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    inner_module(model, parent).register_module(leaf, module)
