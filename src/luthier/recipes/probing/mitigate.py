"""Mitigation: intruder dimensions of a tuned model scaled down, and what that does to the task and to what was kept.

Idea: a direction that is like none of the base's is scaled by lambda; 1 leaves it, 0 takes it out. Whether that was the
right thing to cut is only told by a control: the whole change, made smaller until it has the same norm. Where both
forget as little, the intruders were not what forgot.
Equation: W = W0 + dW + sum_i (lambda - 1) u_i sigma_i v_i^T over the intruders; control: W0 + c dW, with c such that
    ||c dW||_F is the norm of that change, in every matrix.
Source: Shuttleworth et al., arXiv 2410.21228, section 5; the control is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, final

import torch
from pydantic import Field, field_validator

from luthier.adapters.lora import LoRA, LowRank
from luthier.core.errors import GateError, RecipeError
from luthier.core.knobs import Knobs
from luthier.maths.intruders import correction, likeness, norm_of_factors
from luthier.model.comparing.pair import Change, Factors, Pair
from luthier.model.editing.edits import Edit
from luthier.model.editing.sites import Sites
from luthier.model.files.adapter_config import read_config, read_extras
from luthier.model.files.adapter_files import save_adapter
from luthier.model.language_model import LanguageModel
from luthier.model.running.probing import tolerance
from luthier.probes import Curves, Report, Table, Value
from luthier.recipes.opening.opened import put_on
from luthier.recipes.probing.probe import written
from luthier.recipes.probing.probed import Probed
from luthier.store.folder import write_folder

NAME: Final = "mitigation"
SAME: Final = 1e-3
"""Losses that differ by less are told as equal."""


@final
class Scaling(Knobs):
    """By what intruders are scaled, and what is one. The defaults of the latter are the paper's."""

    factors: Annotated[tuple[Annotated[float, Field(ge=0, le=10)], ...], Field(strict=False, min_length=1)] = Field(
        description="values of lambda, each once: 1 leaves intruders as they are, 0 takes them out"
    )
    k: int = Field(10, ge=1, description="strongest directions of each matrix that are looked at")
    epsilon: float = Field(0.5, gt=0, lt=1, description="a direction whose cosines are all below this is an intruder")

    @field_validator("factors", mode="after")
    @classmethod
    def _each_once(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(factors)) < len(factors):
            raise RecipeError(f"{', '.join(format(each, 'g') for each in factors)}", allowed="each lambda once",
                              do="leave out what is there twice")  # fmt: skip
        return factors


@dataclass(frozen=True)
class Scaled:
    """What one lambda means at one matrix: factors to add, and how much of the whole change has the same norm."""

    change: Change
    term: Factors
    intruders: int
    share: float


def mitigate(probed: Probed, scaling: Scaling, *, out: Path | None = None) -> Report:
    """Losses over lambda, with the control beside them; with `out` the adapter of the one lambda that is given."""
    pair, factors = probed.pair, scaling.factors
    if out is not None:
        _require_writable(probed, factors)
    if not pair.texts:
        raise RecipeError(f"{probed.after}: no text is known to measure mitigation on", do="name some: --keep FILE")
    if probed.apart and any(change.factors is None for change in pair.changes):
        raise RecipeError(
            f"{probed.after} is an adapter that is no low-rank update", allowed="low-rank adapters and whole models"
        )
    scaled = _scaled(pair, scaling)
    count = sum(one.intruders for one in scaled[factors[0]])
    if not count:
        where = f"at epsilon {scaling.epsilon:g} among the leading {scaling.k} directions"
        sentence = f"There is no intruder {where}: nothing to scale."
        return Report(verdict=(sentence,), numbers={"intruders": 0})
    rows: list[list[Value]] = [["before tuning", None, None, *_losses_before(pair)]]
    for done, factor in enumerate(factors):
        pair.tell("mitigation", done, len(factors))
        own, norm = scaled[factor], _norm(scaled[factor])
        with pair.after() as model:
            with _with_terms(model, {one.change.name: one.term for one in own}):
                rows.append(["intruders scaled", factor, norm, *(text.loss(model) for text in pair.texts)])
            with _with_shares(model, own):
                rows.append(["whole change scaled", factor, norm, *(text.loss(model) for text in pair.texts)])
    if out is not None:
        _write(probed, scaled[factors[0]], rows[1][3:], out)
    return _report(pair, rows, count, scaling)


def mitigated(probed: Probed, scaling: Scaling, folder: Path, *, out: Path | None = None) -> dict[str, Any]:
    """The same with its report written into a folder of probes; what `--json` prints."""
    report = mitigate(probed, scaling, out=out)
    told = {"probe": NAME, "knobs": scaling.model_dump(mode="json"), **report.as_dict()}
    found = written(probed, {NAME: told}, folder, left_out={})
    return {**found, "out": None if out is None or not out.is_dir() else str(out)}


def _scaled(pair: Pair, scaling: Scaling) -> dict[float, list[Scaled]]:
    """What each lambda means at every matrix that has changed."""
    found: dict[float, list[Scaled]] = {each: [] for each in scaling.factors}
    for change in pair.matrices("mitigation"):
        size = change.norm()
        if not size:
            continue
        weight = change.base()
        like = likeness(pair.spectra.of(weight), weight, change.after(), scaling.k, gap=0.0)
        which = like.intruders("left", scaling.epsilon)
        for factor in scaling.factors:
            term = correction(like.tuned, which, factor)
            found[factor].append(Scaled(change, term, int(which.sum()), _norm_with(change, term) / size))
    return found


def _norm_with(change: Change, term: Factors) -> float:
    """The norm of a change with something added to it."""
    if change.factors is None:
        return float((change.delta() + term[1] @ term[0]).norm())
    return norm_of_factors(torch.cat([change.factors[0], term[0]]), torch.cat([change.factors[1], term[1]], 1))


def _norm(scaled: Sequence[Scaled]) -> float:
    """The norm of all changes together, beside what it was."""
    before = sum(one.change.norm() ** 2 for one in scaled)
    after = sum((one.share * one.change.norm()) ** 2 for one in scaled)
    return float((after / before) ** 0.5)


def _losses_before(pair: Pair) -> list[float]:
    with pair.before() as model:
        return [text.loss(model) for text in pair.texts]


@contextmanager
def _with_terms(model: LanguageModel, terms: Mapping[str, Factors]) -> Iterator[None]:
    """A model with low-rank terms added to some of its matrices."""
    kept = {name: term for name, term in terms.items() if len(term[0])}
    if not kept:
        yield
        return
    model.attach(_edits(model.sites, kept)[1], name=NAME)
    try:
        yield
    finally:
        model.detach(NAME)


@contextmanager
def _with_shares(model: LanguageModel, scaled: Sequence[Scaled]) -> Iterator[None]:
    """A model with only a share of each change: as terms where changes are low-rank, in its weights where not."""
    low = {one.change.name: (one.change.factors[0], (one.share - 1) * one.change.factors[1])
           for one in scaled if one.change.factors is not None}  # fmt: skip
    whole = [one for one in scaled if one.change.factors is None]
    sites = {site.name: site for site in model.sites}
    kept = {one.change.name: sites[one.change.name].weight_parameter.detach().clone() for one in whole}
    with _with_terms(model, low):
        try:
            for one in whole:
                # Everything that is read of a change reads the weights: it is made before they are written.
                moved = one.change.base() + one.share * one.change.delta()
                _put(sites[one.change.name].weight_parameter, moved, transposed=sites[one.change.name].transposed)
            yield
        finally:
            for name, weight in kept.items():
                _put(sites[name].weight_parameter, weight, transposed=False)


@torch.no_grad()
def _put(parameter: torch.nn.Parameter, weight: torch.Tensor, *, transposed: bool) -> None:
    parameter.copy_(weight.t() if transposed else weight)


def _edits(sites: Sites, terms: Mapping[str, Factors]) -> tuple[LoRA, list[Edit]]:
    """A LoRA whose update at each site is the term there, whatever their ranks: what is left of one is zeros."""
    rank = max(len(down) for down, _ in terms.values())
    whole = LoRA(rank=rank, alpha=float(rank), targets=tuple(sorted(terms)))
    made: list[Edit] = []
    for site in sites.select(whole.targets):
        edit = LowRank(site, whole)
        down, up = terms[site.name]
        with torch.no_grad():
            edit.down.zero_()
            edit.down[: len(down)] = down
            edit.up[:, : len(down)] = up
        made.append(edit)
    return whole, made


def _report(pair: Pair, rows: Sequence[Sequence[Value]], count: int, scaling: Scaling) -> Report:
    names = [text.name for text in pair.texts]
    table = Table(title="Losses over lambda", heads=("what", "lambda", "norm of the change", *names), rows=rows)
    curves = []
    for place, name in enumerate(names):
        lines = {what: [(float(row[1] or 0.0), float(row[3 + place] or 0.0)) for row in rows if row[0] == what]
                 for what in ("intruders scaled", "whole change scaled")}  # fmt: skip
        ordered = {what: sorted(points) for what, points in lines.items()}
        curves.append(Curves(title=f"Loss on {name}", across="lambda", up="loss, nats", lines=ordered))
    said, numbers = _verdict(pair, rows)
    which = f"cosines below {scaling.epsilon:g}, leading {scaling.k} directions"
    start = f"{count} intruders ({which}) were scaled by each lambda."
    return Report(verdict=(start, *said), numbers={"intruders": count, **numbers}, tables=(table,),
                  curves=tuple(curves))  # fmt: skip


def _verdict(pair: Pair, rows: Sequence[Sequence[Value]]) -> tuple[list[str], dict[str, Value]]:
    """At which lambda the loss on each text is least, beside the tuned model and the control of equal norm."""
    said: list[str] = []
    numbers: dict[str, Value] = {}
    for place, text in enumerate(pair.texts):
        with pair.after() as model:
            tuned = text.loss(model)
        moved = {what: {float(row[1] or 0.0): float(row[3 + place] or 0.0) - tuned for row in rows if row[0] == what}
                 for what in ("intruders scaled", "whole change scaled")}  # fmt: skip
        own, control = moved["intruders scaled"], moved["whole change scaled"]
        best = min(own, key=own.__getitem__)
        name, least = text.name, min(own)
        numbers |= {f"{name}_lambda": best, f"{name}_change": own[best], f"{name}_control": control[best]}
        if own[best] > -SAME:
            said.append(
                f"No lambda lowers the loss on {name}; at {least:g} it moves by {own[least]:+.4f}, and by "
                f"{control[least]:+.4f} with the whole change at the same norm."
            )
            continue
        more = "" if own[best] < control[best] - SAME else "no "
        said.append(
            f"The loss on {name} is least at lambda {best:g}: {own[best]:+.4f}. The whole change at the same norm "
            f"moves it by {control[best]:+.4f}, so the intruders are {more}better to cut than the rest."
        )
    return said, numbers


def _require_writable(probed: Probed, factors: Sequence[float]) -> None:
    if len(factors) != 1:
        do = "name the one to write: --mitigate 0.5"
        raise RecipeError(f"--out with {len(factors)} lambdas", allowed="one", do=do)
    if probed.adapter is None or any(change.factors is None for change in probed.pair.changes) or probed.pair.beside:
        beside = ", ".join(probed.pair.beside) or "whole matrices"
        raise RecipeError(
            f"{probed.after} is no low-rank adapter alone (it has {beside})",
            allowed="an adapter of low-rank terms, whose correction is low-rank too",
        )


def _write(probed: Probed, scaled: Sequence[Scaled], losses: Sequence[Value], out: Path) -> None:
    """The adapter with its correction in it, of as many more ranks as it has intruders; read back and asked again."""
    model, source = probed.opened.model, Path(probed.adapter or "")
    terms = {one.change.name: one.change.factors or one.term for one in scaled}
    for one in scaled:
        down, up = terms[one.change.name]
        terms[one.change.name] = (torch.cat([down, one.term[0]]), torch.cat([up, one.term[1]], 1))
    method, edits = _edits(model.sites, terms)
    names = list(model.attachments)
    old = [model.detach(name) for name in names]
    config = method.peft_config(model.sites)
    base = str(read_config(source)["base_model_name_or_path"])
    made = model.attach(edits)

    def write(place: Path) -> None:
        save_adapter(place, made, peft_type="LORA", config=config, base=base, task=model.task,
                     extras={"base_digest": model.digest, **read_extras(source)})  # fmt: skip

    try:
        write_folder(out, write, {"base": base, "base_digest": model.digest, "made_from": str(source)})
        model.detach()
        put_on(model, out)
        found = [text.loss(model) for text in probed.pair.texts]
    finally:
        for name in list(model.attachments):
            model.detach(name)
        for each in old:
            model.attach(each.edits, name=each.name)
    if any(abs(new - float(was or 0.0)) > tolerance(model.dtype) for new, was in zip(found, losses, strict=True)):
        raise GateError(f"read back, {out} gives losses {found}, and {list(losses)} were measured",
                        do="report this: it should not happen")  # fmt: skip
