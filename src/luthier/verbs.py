"""What comes before and after a fine-tune, as calls: plan; evaluate, probe, merge, export; and compare.

Each function does what the command of its name does, by the same recipe. What the command prints with `--json` is in
`figures`, and the foremost of it in fields. A model is named as on the command line: a run, a folder, a hub id, or
`seedling`; the `Run` that `luthier.finetune` gives back is a run too. `settings` are what `--set` sets, as a mapping of
dotted keys to values. Whatever takes long tells its progress on stderr.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.chosen import choose
from luthier.core.knobs import validate
from luthier.core.units import bytes_from
from luthier.exporters import Exporter
from luthier.mergers import Merger
from luthier.metrics import Metric
from luthier.model.load import Precision
from luthier.probes import Probe
from luthier.recipes.comparing import compare as comparing
from luthier.recipes.evaluating import evaluate as evaluating
from luthier.recipes.exporting import export as exporting
from luthier.recipes.merging import adapters as merging_adapters
from luthier.recipes.merging import merge as merging
from luthier.recipes.merging.gate import gate_of
from luthier.recipes.merging.recipe import from_flags, read_recipe
from luthier.recipes.planning.asked import answered, asked, packed_bytes
from luthier.recipes.planning.inference import plan_inference as plan_answering
from luthier.recipes.planning.of_recipe import plan_file
from luthier.recipes.planning.plan import Machine
from luthier.recipes.probing.diagnose import Asked, diagnose
from luthier.recipes.probing.mitigate import Scaling
from luthier.recipes.progress import progress, teller
from luthier.store.runs import RunDirectory

Named = str | os.PathLike[str]
"""A run, a folder or a file; for models also a hub id or `seedling`."""
Settings = Mapping[str, Any]
Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures of base and tuned model on the same rows or prompts, by name; `loss` is always among those of rows."""

    base: Mapping[str, float]
    tuned: Mapping[str, float]
    figures: Figures


def evaluate(run: Named, *, data: Named | None = None) -> Evaluation:
    """The run's result on its held-out rows or prompts, or on another file, computed anew: `luthier eval`."""
    found = evaluating.evaluate_run(RunDirectory.open(Path(run)), data=None if data is None else Path(data))
    return Evaluation(base=found["base"], tuned=found["tuned"], figures=found)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What probes found: for each its verdict and numbers, those left out with the reason, and the page of all."""

    reports: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]
    page: Path
    figures: Figures


def probe(
    run: Named | None = None,
    *,
    before: Named | None = None,
    after: Named | None = None,
    probes: Sequence[Probe | str | Settings] = (),
    keep: Sequence[Named] = (),
    mitigate: Sequence[float] | Settings | None = None,
    out: Named | None = None,
    report: Named | None = None,
    quiet: bool = False,
) -> Diagnosis:
    """What tuning did to a run's model, or to `after` beside `before`: `luthier probe`.

    Without `probes` those are made that cost little. `mitigate`, the lambdas (or a mapping of `factors`, `k` and
    `epsilon`), scales intruders instead; with `out` the adapter of a single lambda is written.
    """
    wanted = Asked(
        run=_path(run), before=_name(before), after=_name(after), keep=[os.fspath(file) for file in keep],
        probes=[choose("probes", Probe, each) for each in probes], named=bool(probes), scaling=_scaling(mitigate),
        out=_path(out), report=_path(report),
    )  # fmt: skip
    with progress(quiet=quiet) as recorder:
        found = diagnose(wanted, recorder=recorder)
    return Diagnosis(
        reports=found["probes"], left_out=found["left_out"], page=Path(found["page"]), figures=found
    )


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merged model or adapter: its folder, what the gate measured (None without data), and what to know of it."""

    folder: Path
    evaluation: Mapping[str, Any] | None
    notices: tuple[str, ...]
    figures: Figures


def merge_models(
    models: Sequence[Named] | Named,
    out: Named,
    *,
    method: Merger | str | Settings = "slerp",
    base: Named | None = None,
    weights: Sequence[float] = (),
    data: Named | None = None,
    metric: Metric | str | None = None,
    allow_worse: bool = False,
    settings: Settings | None = None,
) -> Merge:
    """Several models as one, or a recipe of a merge carried out, in the new folder `out`: `luthier merge`.

    With `data` the result has to be as good on these rows as the best of its parents, or GateError is raised.
    """
    if isinstance(models, (str, os.PathLike)):
        recipe, notes = read_recipe(Path(models), sets=settings or {})
    else:
        knobs = _knobs(method)
        recipe, notes = from_flags(
            [os.fspath(model) for model in models], str(knobs.pop("method")), base=_name(base) or None,
            weights=list(weights), knobs=knobs, sets=settings or {},
        ), ()  # fmt: skip
    gate = gate_of(_path(data), metric, allow_worse=allow_worse)
    found = merging.merge_models(recipe, Path(out), gate=gate)
    found["notices"] = [*notes, *found["notices"]]
    return Merge(folder=Path(out), evaluation=found["evaluation"], notices=tuple(found["notices"]), figures=found)


def merge_adapters(
    adapters: Sequence[Named],
    out: Named,
    *,
    method: str = "cat",
    weights: Sequence[float] = (),
    settings: Settings | None = None,
) -> Merge:
    """Several LoRA adapters of one base as one adapter, in the new folder `out`: `luthier merge --adapters`."""
    names = [os.fspath(adapter) for adapter in adapters]
    knobs = merging_adapters.AdapterKnobs.from_flags(names, method, list(weights), settings or {})
    found = merging_adapters.merge_adapters(knobs, Path(out))
    return Merge(folder=Path(out), evaluation=None, notices=(), figures=found)


@dataclass(frozen=True, kw_only=True)
class Export:
    """An artefact that is its source: its folder, the parity that was measured, and what to know of it."""

    folder: Path
    parity: Mapping[str, Any]
    notices: tuple[str, ...]
    figures: Figures


def export(
    source: Named,
    out: Named,
    *,
    to: Exporter | str | Settings = "merged",
    adapter: Named | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> Export:
    """A model in the form that another program reads, in the new folder `out`: `luthier export`.

    Raises GateError, with nothing left there, where what was written is another model than its source.
    """
    named = exporting.Source(
        name=os.fspath(source), adapter=_name(adapter) or None, precision=precision, device=device
    )
    found = exporting.export(named, choose("exporters", Exporter, to), Path(out), told=teller(quiet=quiet))
    return Export(folder=Path(out), parity=found["parity"], notices=tuple(found["notices"]), figures=found)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What each method came to, by its name (`error` where it failed), and the folder with the page and the runs."""

    methods: Mapping[str, Mapping[str, Any]]
    folder: Path
    figures: Figures


def compare(
    methods: Sequence[str],
    *,
    model: Named,
    data: Named,
    run: Named,
    measures: comparing.Measures | Settings | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
) -> Comparison:
    """Several methods trained on the same data with the same budget, below the new folder `run`: `luthier compare`."""
    how = measures if isinstance(measures, comparing.Measures) else validate(comparing.Measures, measures or {})
    with progress(quiet=quiet) as recorder:
        found = comparing.compare(
            os.fspath(model), os.fspath(data), list(methods), folder=Path(run), sets=_sets(settings), measures=how,
            recorder=recorder,
        )  # fmt: skip
    by_name = {each["method"]: each for each in found["methods"]}
    return Comparison(methods=by_name, folder=Path(run), figures=found)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What training or answering takes. `memory` is in bytes, by part; None is what is not known here."""

    parameters: Mapping[str, int]
    memory: Mapping[str, int]
    flops_per_token: float
    seconds_per_1k_tokens: float | None
    fits: bool | None
    figures: Figures


def plan(recipe: Named, *, settings: Settings | None = None) -> Plan:
    """What a run of a recipe file would take, before it is trained: `luthier plan RECIPE`."""
    return _plan(plan_file(Path(recipe), _sets(settings)))


def plan_training(
    model_config: Named,
    *,
    method: str = "lora",
    settings: Settings | None = None,
    memory: float | str | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    efficiency: float = 1.0,
    tokens: float | None = None,
    price: float | None = None,
) -> Plan:
    """What a fine-tune of a model would take, by its config.json alone: `luthier plan --model-config`.

    `settings` are the knobs of the plan (`sequence`, `batch`, `device`, `sharding`, ...) and those of the method.
    """
    knobs = asked(method, _sets(settings), _bytes(memory))
    machine = Machine.of(tflops, bandwidth, efficiency)
    return _plan(answered(Path(model_config), knobs, machine, tokens=tokens, price=price))


def plan_inference(
    model_config: Named,
    *,
    clients: int = 1,
    context: int = 2048,
    precision: str = "bfloat16",
    quantizer: str | None = None,
    memory: float | str | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """What answering so many clients would take, by a config.json alone: `luthier plan --inference`."""
    machine = Machine.of(tflops, bandwidth)
    packed = None if quantizer is None else packed_bytes(quantizer)
    return _plan(plan_answering(
        Path(model_config), clients=clients, context=context, precision=precision, packed=packed,
        memory=_bytes(memory), flops=machine.flops, bandwidth=machine.bytes,
    ))  # fmt: skip


def _plan(found: dict[str, Any]) -> Plan:
    names = ("parameters", "memory", "flops_per_token", "seconds_per_1k_tokens", "fits")
    return Plan(**{name: found[name] for name in names}, figures=found)


def _path(name: Named | None) -> Path | None:
    return None if name is None else Path(name)


def _name(name: Named | None) -> str:
    return "" if name is None else os.fspath(name)


def _bytes(memory: float | str | None) -> float | None:
    """Bytes that were said with a unit, or as a number, which is as small as a text may be without one."""
    return None if memory is None else bytes_from(memory if isinstance(memory, str) else f"{memory:.0f}")


def _sets(settings: Settings | None) -> list[str]:
    """Settings as `--set` has them; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]


def _knobs(method: Merger | str | Settings) -> dict[str, Any]:
    """A method as a recipe writes it."""
    if isinstance(method, str):
        return {"method": method}
    return method.as_recipe() if isinstance(method, Merger) else dict(method)


def _scaling(mitigate: Sequence[float] | Settings | None) -> Scaling | None:
    if mitigate is None:
        return None
    return validate(Scaling, mitigate if isinstance(mitigate, Mapping) else {"factors": tuple(mitigate)})
