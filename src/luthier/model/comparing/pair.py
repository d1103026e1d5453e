"""Before and after: what a tuned model is made of, beside what it was tuned from.

Idea: whoever looks at what tuning did needs the matrices that changed, as they were and as a change, and perhaps the
two models to ask. A change is kept as what it is: two thin factors for a low-rank adapter, and a whole matrix only
where it is one. Nothing here is copied before somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from luthier.data.forest import Ints
from luthier.maths.intruders import norm_of_factors
from luthier.maths.spectra import Summed
from luthier.model.comparing.base_spectra import BaseSpectra
from luthier.model.editing.edits import SiteEdit, TrainedParameters
from luthier.model.editing.sites import Site
from luthier.model.language_model import LanguageModel
from luthier.model.packed import PackedWeight

Factors = tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]
"""A and B of a change B A, the scale in B."""


@dataclass(frozen=True)
class Change:
    """One matrix before and after: its base, and either the thin factors of its change or the tuned matrix."""

    name: str
    roles: tuple[str, ...]
    layer: int | None
    linear: bool
    shape: tuple[int, int]
    base: Callable[[], Float[Tensor, "out in"]]
    factors: Factors | None = None
    tuned: Callable[[], Float[Tensor, "out in"]] | None = None

    @property
    def role(self) -> str:
        """The roles in one word: a fused projection has several."""
        return "+".join(self.roles)

    def delta(self) -> Float[Tensor, "out in"]:
        """The change as a whole matrix."""
        if self.factors is not None:
            down, up = self.factors
            return up @ down
        return self._tuned() - self.base()

    def after(self) -> Summed:
        """The tuned matrix; low-rank changes stay beside their base."""
        if self.factors is not None:
            return Summed(self.base(), *self.factors)
        return Summed(self._tuned())

    def norm(self) -> float:
        """The Frobenius norm of the change."""
        return norm_of_factors(*self.factors) if self.factors is not None else float(self.delta().norm())

    def _tuned(self) -> Float[Tensor, "out in"]:
        return self.base() if self.tuned is None else self.tuned()


@dataclass(frozen=True)
class Text:
    """Something whose loss is looked at before and after: `kind` is task, kept, other, or said by one of the two."""

    name: str
    kind: str
    loss: Callable[[LanguageModel], float]


@dataclass(frozen=True)
class Gradients:
    """Gradients of single micro-batches at the tuned model, each flat, of the summed loss divided by the rows.

    `rows` is how many rows one of them holds, `step_rows` how many an optimizer step of the run has had, and
    `row_tokens` how many tokens a row has on average.
    """

    each: Callable[[int], Iterator[Float[Tensor, " n"]]]
    rows: int
    step_rows: float
    row_tokens: float


def _say_nothing(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Pair:
    """A model before and after tuning.

    `settings` are those of the adapter as a recipe writes them; `beside` says what of a change is no matrix; `texts`
    and `samples` are what the two models can be asked about.
    """

    changes: tuple[Change, ...]
    before: Callable[[], AbstractContextManager[LanguageModel]]
    after: Callable[[], AbstractContextManager[LanguageModel]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    texts: tuple[Text, ...] = ()
    samples: tuple[Ints, ...] = ()
    gradients: Gradients | None = None
    spectra: BaseSpectra = field(default_factory=lambda: BaseSpectra(None))
    tell: Callable[[str, int, int], None] = _say_nothing

    def matrices(self, what: str) -> Iterator[Change]:
        """The linear layers that changed, one after another, with progress."""
        chosen = [change for change in self.changes if change.linear]
        for done, change in enumerate(chosen):
            self.tell(what, done, len(chosen))
            yield change


def changes_of(model: LanguageModel) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    """What the adapters on a model change, and what of them changes no matrix."""
    sites = {site.name: site for site in model.sites}
    found, beside = [], []
    for attachment in model.attachments.values():
        for edit in attachment.edits:
            if isinstance(edit, TrainedParameters) and not edit.new:
                trained = _of_trained(sites, edit)
                found += trained
                beside += ["TrainedParameters"] * (not trained)
                continue
            site = sites.get(edit.site_name) if isinstance(edit, SiteEdit) else None
            change = _of_edit(site, edit) if site is not None and isinstance(edit, SiteEdit) else None
            if change is None:
                beside.append(type(edit).__name__)
            else:
                found.append(change)
    return tuple(found), tuple(dict.fromkeys(beside))


def changes_between(before: LanguageModel, after: LanguageModel) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    """The matrices that two models of one architecture have both, and what only one of them has or is shaped anew."""
    new = {site.name: site for site in after.sites}
    found, beside, seen = [], [], set()
    for site in before.sites:
        if not (site.is_linear or "embed" in site.roles) or id(site.weight_parameter) in seen:
            continue
        seen.add(id(site.weight_parameter))
        other = new.get(site.name)
        if other is None or _shape(other) != _shape(site):
            beside.append(site.name)
            continue
        found.append(_change(site, tuned=_reader(other)))
    return tuple(found), tuple(beside)


def pair_of_adapter(model: LanguageModel, **more: Any) -> Pair:
    """The base of a model, and the model with what is attached to it."""
    changes, beside = changes_of(model)

    @contextmanager
    def before() -> Iterator[LanguageModel]:
        with model.without_attachments():
            yield model

    return Pair(changes=changes, before=before, after=_as_it_is(model), beside=beside, **more)


def pair_of_models(before: LanguageModel, after: LanguageModel, **more: Any) -> Pair:
    """Two models that lie apart."""
    changes, beside = changes_between(before, after)
    return Pair(changes=changes, before=_as_it_is(before), after=_as_it_is(after), beside=beside, **more)


def _as_it_is(model: LanguageModel) -> Callable[[], AbstractContextManager[LanguageModel]]:
    @contextmanager
    def whole() -> Iterator[LanguageModel]:
        yield model

    return whole


def _of_edit(site: Site, edit: SiteEdit) -> Change | None:
    """The change of a matrix that an edit stands for, without whatever it does to a bias; None where it is none."""
    if not (site.is_linear or "embed" in site.roles):
        return None
    term = edit.low_rank()
    if term is not None:
        return _change(site, factors=(term.down.detach().float(), term.scale * term.up.detach().float()))
    read = _reader(site)
    bias = None if site.bias is None else site.bias.float()
    with torch.no_grad():
        if edit.merged(read(), bias) is None:
            return None

    def tuned() -> Float[Tensor, "out in"]:
        with torch.no_grad():
            merged = edit.merged(read(), bias)
        return read() if merged is None else merged[0].float()

    return _change(site, tuned=tuned)


def _of_trained(sites: Mapping[str, Site], edit: TrainedParameters) -> list[Change]:
    """The matrices that an edit trains in place, beside their originals."""
    found = []
    for name in edit.names:
        owner, _, leaf = name.rpartition(".")
        site = sites.get(".".join(part for part in (edit.site_name, owner) if part))
        if leaf == "weight" and site is not None and (site.is_linear or "embed" in site.roles):
            base, tuned = (_read(site, each) for each in (edit.originals[name], edit.trained(name)))
            found.append(replace(_change(site, tuned=tuned), base=base))
    return found


def _change(
    site: Site, *, factors: Factors | None = None, tuned: Callable[[], Float[Tensor, "out in"]] | None = None
) -> Change:
    linear = site.is_linear and "head" not in site.roles
    return Change(site.name, site.roles, site.layer, linear, _shape(site), _reader(site), factors, tuned)


def _reader(site: Site) -> Callable[[], Float[Tensor, "out in"]]:
    """What reads the weight that a site has then in float32, unpacked where it is packed."""
    return lambda: _read(site, site.weight_parameter)()


def _read(site: Site, parameter: Tensor) -> Callable[[], Float[Tensor, "out in"]]:
    def read() -> Float[Tensor, "out in"]:
        weight = parameter.detach()
        if isinstance(weight, PackedWeight):
            return weight.matrix(torch.float32)
        return (weight.t() if site.transposed else weight).float()

    return read


def _shape(site: Site) -> tuple[int, int]:
    """The shape of a weight as (out, in); a table of tokens has a row for each."""
    sizes = (site.out_features, site.in_features)
    return sizes if site.is_linear else sizes[::-1]


def by_layer_and_role(
    values: Sequence[tuple[Change, float]],
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Values as a grid: names of layers, names of roles, and the largest value of each place; empty without layers."""
    inside = [(change.layer, change.role, value) for change, value in values if change.layer is not None]
    layers, roles = sorted({layer for layer, _, _ in inside}), list(dict.fromkeys(role for _, role, _ in inside))
    known: dict[tuple[int, str], float] = {}
    for layer, role, value in inside:
        known[layer, role] = max(value, known.get((layer, role), value))
    return [f"layer {layer}" for layer in layers], roles, [[known.get((layer, role)) for role in roles]
                                                           for layer in layers]  # fmt: skip
