"""Edits: surgery as data.

An adapter describes what it changes as a list of edits. An edit is one of a small closed set of kinds, holds its own
parameters, and knows its site; everything that is done *with* edits (applying, disabling, undoing, merging, counting,
saving) is written once, in `attachment.py`. Kinds:

- `SiteEdit`: works on what goes into or comes out of a module (low-rank updates, rescaling, inserted layers).
- `TrainedParameters`: trains a module's own parameters.
- `LearnedRoot`: a learned ancestor of every tree, given as keys and values of each layer (`LearnedKeysValues`) or as
  embeddings that go through the model like those of tokens (`LearnedPrompt`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.kernels.products import LowRankTerm
from luthier.kernels.thin_pass import Around, Layer, ThinTerm
from luthier.model.editing.sites import Site
from luthier.model.routes import Parts, Routes


class Edit(nn.Module, ABC):
    """A change to the model with its own parameters, which are all trained unless they say otherwise."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters under the names the adapter's file format uses, relative to the site."""

    def base_tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the base that a file of somebody else's may repeat, named in the same way: they must be equal."""
        return {}

    def rate_factors(self) -> Mapping[str, float]:
        """What the learning rate of a parameter is multiplied by, by the parameter's own name, where it is not one."""
        return {}


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a token for an edit, beside what the base model keeps: the input of its site, the output
    before the edit, and numbers of its own."""

    input: bool = False
    output: bool = False
    own: int = 0


class Switch:
    """Whether an attachment is on. All of its edits at sites look at the one it has, so switching is one assignment.

    One that is `named_only` computes rows that name it, alone or in a mix, and no others.
    """

    def __init__(self, *, named_only: bool = False) -> None:
        self.on = True
        self.named_only = named_only

    @property
    def always(self) -> bool:
        """Whether it computes rows that name nobody."""
        return self.on and not self.named_only


class SiteEdit(Edit):
    """A change at one site: `before` sees the input, `after` the input and the output."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site_name = site.name
        self.switch = Switch()

    @abstractmethod
    def before(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """The input as the module shall see it."""

    @abstractmethod
    def after(self, x: Float[Tensor, "*batch in"], y: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        """The output as the rest of the model shall see it; `x` is what came in, before this edit."""

    def weighted(self, x: Tensor, y: Float[Tensor, "*batch out"], weight: float) -> Float[Tensor, "*batch out"]:
        """`after`, with what it changes multiplied by a weight."""
        return y + weight * (self.after(x, y) - y)

    @abstractmethod
    def keeps(self) -> Kept:
        """What autograd keeps for it where it is computed as `before` and `after` say; a memory plan counts with it."""

    def low_rank(self) -> LowRankTerm | None:
        """This edit as a low-rank term of a linear layer, as it stands now; None when it is something else."""
        return None

    @abstractmethod
    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The module's float32 weight and bias with this edit folded in, or None when it cannot be folded."""


class TrainedParameters(Edit):
    """Trains parameters of the module at a site itself; the originals are kept aside and come back on undo.

    Parameters of a `new` head had nothing to learn from before: they belong to the adapter, and are saved in its file.
    """

    def __init__(self, site: Site, names: tuple[str, ...], *, new: bool = False) -> None:
        super().__init__()
        self.site_name = site.name
        self.names = names
        self.new = new
        present = base_parameters(site.module)
        self.originals = {name: present[name] for name in names}
        for name, original in self.originals.items():
            self.share(name, nn.Parameter(original.detach().clone()))

    def trained(self, name: str) -> nn.Parameter:
        """The trained parameter that stands in for the original `name`."""
        return self.get_parameter(_key(name))

    def share(self, name: str, parameter: nn.Parameter) -> None:
        """Train `parameter` for `name`: tied parameters stay tied by sharing one."""
        self.register_parameter(_key(name), parameter)

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: self.trained(name) for name in self.names}


def _key(name: str) -> str:
    # A parameter's own name may not hold a dot.
    return name.replace(".", "/")


class LearnedRoot(Edit):
    """A learned ancestor of every tree; one of the two kinds below."""

    @property
    @abstractmethod
    def token_count(self) -> int:
        """How many positions the root takes; the trees' own positions start after it."""


class LearnedPrompt(LearnedRoot):
    """A root that stands where the embeddings of tokens would: each layer makes its keys and values of it."""

    @abstractmethod
    def embeddings(self, dtype: torch.dtype) -> Float[Tensor, "root d"]:
        """What stands in the place of token embeddings, before whatever the model does with those."""


class LearnedKeysValues(LearnedRoot):
    """A root whose keys and values are learned for each layer; they are taken after any rotation."""

    @abstractmethod
    def keys_values(self, dtype: torch.dtype) -> Float[Tensor, "layers 2 heads root size"]:
        """Keys, then values, of every layer, with as many heads as the model has key-value heads."""


Weighted = tuple[SiteEdit, float]
"""An edit, and what its change is multiplied by."""


class EditedModule(nn.Module):
    """A module with edits around it. The module inside is the original object, untouched.

    With `routes`, rows belong to adapters, and each row sees the edits of its own ones only.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.edits = nn.ModuleDict()
        self.routes: Routes | None = None

    @property
    def disabled(self) -> frozenset[str]:
        """The names of attachments that do not compute rows that name nobody."""
        return frozenset(
            name for name, edit in self.edits.items() if isinstance(edit, SiteEdit) and not edit.switch.always
        )

    @property
    def site_name(self) -> str:
        """The site whose edits these are."""
        return str(next(iter(self.edits.values())).site_name)

    @property
    def weight(self) -> Tensor:
        """The base weight: model code of the zoo reads it for its dtype."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.base._parameters.get("bias")

    def own(self, parts: Parts) -> list[Weighted]:
        """The edits here of these attachments, as far as they are switched on, with their weights."""
        found = ((self.edits._modules.get(name), weight) for name, weight in parts)
        return [(edit, weight) for edit, weight in found if isinstance(edit, SiteEdit) and edit.switch.on]

    def forward(self, x: Tensor, *args: object) -> Tensor:
        if self.routes is not None:
            return self._by_rows(x, self.routes, *args)
        edits = [edit for edit in self.edits.values() if isinstance(edit, SiteEdit) and edit.switch.always]
        return self.through(x, [(edit, 1.0) for edit in edits], *args)

    def through(self, x: Tensor, edits: Sequence[Weighted], *args: object) -> Tensor:
        """The module with just these of its edits around it."""
        seen = _inwards(x, edits)
        y: Tensor = self.base(seen[-1], *args)
        return _outwards(seen, y, edits)

    def around(self, routes: Routes, dtype: torch.dtype) -> Around | None:
        """What is around rows of `dtype` that belong to adapters, in a pass without gradients; None for nothing."""
        terms, site = routes.thin, self.site_name
        thin = None if terms is None or dtype != terms.dtype else terms.at(site)
        if thin is not None and terms is not None and terms.only_terms(site):
            return thin
        ranges, apart = [], set()
        for run in routes.runs:
            parts = routes.parts(run.adapter)
            edits = self.own(parts)
            terms_here = sum(thin is not None and terms is not None and terms.has(site, name) for name, _ in parts)
            if terms_here < len(edits):
                # Beside other edits a term has to see what they make of the rows.
                ranges.append((slice(run.start, run.stop), edits))
                apart.add((run.start, run.stop))
        thin = None if thin is None else thin.without(apart)
        return RowEdits(tuple(ranges), thin) if ranges else thin

    def _by_rows(self, x: Tensor, routes: Routes, *args: object) -> Tensor:
        """The module once over all rows, each edit around its own."""
        if routes.thin is None and len(routes.runs) == 1:
            # Nobody has to tell rows apart: they may come as the model likes.
            return self.through(x, self.own(routes.parts(routes.runs[0].adapter)), *args)
        axis = routes.axis_of(x)
        if routes.thin is not None and axis == 1:
            around = self.around(routes, x.dtype)
            if around is None:
                return self.base(x, *args)  # type: ignore[no-any-return]
            # A copy: whoever watches the module inside keeps what it has said.
            return around.through(x[0], lambda rows: self.base(rows[None], *args)[0].clone())[None]
        own = [self.own(routes.parts(run.adapter)) for run in routes.runs]
        if not any(own):
            return self.base(x, *args)  # type: ignore[no-any-return]
        # split, not slicing: its backward is one concatenation.
        parts = torch.split(x, routes.sizes, axis)
        seen = [_inwards(part, edits) for part, edits in zip(parts, own, strict=True)]
        changed = any(inner[-1] is not part for inner, part in zip(seen, parts, strict=True))
        y = self.base(torch.cat([inner[-1] for inner in seen], axis) if changed else x, *args)
        made = zip(seen, torch.split(y, routes.sizes, axis), own, strict=True)
        return torch.cat([_outwards(inner, out, edits) for inner, out, edits in made], axis)


@final
@dataclass(frozen=True)
class RowEdits(Around):
    """Edits around ranges of rows, and terms that are added to others."""

    ranges: tuple[tuple[slice, list[Weighted]], ...]
    thin: ThinTerm | None

    def through(self, x: Tensor, layer: Layer) -> Tensor:
        parts = [x[rows] for rows, _ in self.ranges]
        seen = [_inwards(part, edits) for part, (_, edits) in zip(parts, self.ranges, strict=True)]
        inner = x
        for part, own, (rows, _) in zip(parts, seen, self.ranges, strict=True):
            if own[-1] is not part:
                inner = x.clone() if inner is x else inner
                inner[rows] = own[-1]
        y = layer(inner)
        for own, (rows, edits) in zip(seen, self.ranges, strict=True):
            out = y[rows]
            made = _outwards(own, out, edits)
            if made is not out:
                out.copy_(made)
        if self.thin is not None:
            self.thin.add(x, y)
        return y


def _inwards(x: Tensor, edits: Sequence[Weighted]) -> list[Tensor]:
    """What each edit sees of an input, from the outermost in, and at last what the module inside sees.

    Edits nest: each one wraps what was there before it came, so the first can be folded into the weight exactly.
    """
    seen = [x]
    for edit, weight in reversed(edits):
        made = edit.before(seen[-1])
        plain = weight == 1 or made is seen[-1]
        seen.append(made if plain else seen[-1] + weight * (made - seen[-1]))
    return seen


def _outwards(seen: list[Tensor], y: Tensor, edits: Sequence[Weighted]) -> Tensor:
    """What all edits make of an output, given what each has seen of the input."""
    for place, (edit, weight) in enumerate(edits):
        x = seen[len(edits) - 1 - place]
        y = edit.after(x, y) if weight == 1 else edit.weighted(x, y, weight)
    return y


def edited_modules(module: nn.Module) -> Iterator[EditedModule]:
    """The modules at and below `module` that have edits; the edits themselves are not walked."""
    for each in base_modules(module):
        if isinstance(each, EditedModule):
            yield each


def base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules at and below `module`, without those of edits: of many adapters these are most."""
    yield module
    below = (module.base,) if isinstance(module, EditedModule) else module._modules.values()
    for each in below:
        if each is not None:
            yield from base_modules(each)


@contextmanager
def routed(module: nn.Module, routes: Routes | None) -> Iterator[None]:
    """Within the block every edit at and below `module` sees its own adapter's rows only, if there are `routes`."""
    edited = [] if routes is None else list(edited_modules(module))
    for each in edited:
        each.routes = routes
    try:
        yield
    finally:
        for each in edited:
            each.routes = None


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module that `name` meant before anything was attached, with the edits around it if it has some."""
    module = model
    for part in name.split(".") if name else ():
        module = (module.base if isinstance(module, EditedModule) else module).get_submodule(part)
    return module


def inner_module(model: nn.Module, name: str) -> nn.Module:
    """The module that `name` meant before anything was attached, without what is around it."""
    found = module_at(model, name)
    return found.base if isinstance(found, EditedModule) else found


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters at and below `module` by the names they have when nothing is attached, without those of edits."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        holder, path, edited = module, [], False
        *parts, leaf = name.split(".")
        for part in parts:
            edited = edited or (isinstance(holder, EditedModule) and part == "edits")
            if not isinstance(holder, EditedModule):
                path.append(part)
            holder = holder.get_submodule(part)
        if not edited:
            found[".".join([*path, leaf])] = parameter
    return found
