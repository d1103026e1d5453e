"""The low-rank terms of the adapters on a model, kept in the form in which passes without gradients take them.

Idea: what an adapter adds at a site stays the same from token to token, so its factors are laid out once
(kernels/thin.py). An adapter is laid out anew when one of its parameters has changed in place, which torch counts, and
forgotten when it leaves the model or another stands under its name.
Cost: the factors of each adapter that was used, once more in the model's precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import final

import torch
from torch import nn

from luthier.kernels.backend import Backend
from luthier.kernels.thin import ThinFactors, ThinRows, ThinTerms
from luthier.kernels.thin_pass import ThinPass
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import SiteEdit
from luthier.model.routes import Routes

_VERSION = attrgetter("_version")


@dataclass
class _Laid:
    """An attachment that was laid out: under which number, and how often its parameters had changed by then."""

    attachment: Attachment
    number: int
    parameters: list[nn.Parameter]
    changes: int
    sites: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


@final
class TermKeeper:
    """Lays out terms when they are asked for, and keeps them."""

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self.backend = backend
        self.dtype = dtype
        self.sites: dict[str, ThinTerms] = {}
        self.odd: dict[str, frozenset[str]] = {}
        self._laid: dict[str, _Laid] = {}
        self._free: list[int] = []

    def over(self, routes: Routes, attachments: Mapping[str, Attachment]) -> ThinPass:
        """The terms for the rows of a pass."""
        for name in routes.attachments:
            self._lay(name, attachments[name])
        ranges = tuple(
            (run.start, run.stop, tuple((self._laid[name].number, weight) for name, weight in parts))
            for run in routes.runs
            if (parts := routes.parts(run.adapter))
        )
        numbers = {name: self._laid[name].number for name in routes.attachments}
        return ThinPass(self.sites, self.odd, numbers, ThinRows(ranges), self.backend, self.dtype)

    def sites_of(self, name: str, attachment: Attachment) -> Sequence[str] | None:
        """The sites of an attachment whose edits at sites are low-rank terms, and which trains nothing of the model
        beside them; None for any other."""
        self._lay(name, attachment)
        laid = self._laid[name]
        return None if laid.odd or (laid.sites and attachment.trained) else laid.sites

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Let go of what was laid out of these attachments, or of all."""
        for name in list(self._laid if names is None else names):
            laid = self._laid.pop(name, None)
            if laid is None:
                continue
            for site in laid.sites:
                self.sites[site].drop(laid.number)
                if not self.sites[site].terms:
                    del self.sites[site]
            for site in laid.odd:
                self.odd[site] = self.odd[site] - {name}
            self._free.append(laid.number)

    def _lay(self, name: str, attachment: Attachment) -> None:
        laid = self._laid.get(name)
        if laid is not None and laid.attachment is attachment and laid.changes == _changes(laid.parameters):
            return
        self.forget([name])
        parameters = [each for edit in attachment.edits if isinstance(edit, SiteEdit) for each in edit.parameters()]
        number = self._free.pop() if self._free else len(self._laid)
        laid = self._laid[name] = _Laid(attachment, number, parameters, _changes(parameters))
        for edit in attachment.edits:
            if not isinstance(edit, SiteEdit):
                continue
            term = edit.low_rank()
            if term is None:
                laid.odd.append(edit.site_name)
                self.odd[edit.site_name] = self.odd.get(edit.site_name, frozenset()) | {name}
                continue
            factors = ThinFactors.of(term.down, term.up, term.scale, self.dtype)
            self.sites.setdefault(edit.site_name, ThinTerms()).put(number, factors)
            laid.sites.append(edit.site_name)


def _changes(parameters: Iterable[nn.Parameter]) -> int:
    """How often they were changed in place, all together."""
    return sum(map(_VERSION, parameters))
