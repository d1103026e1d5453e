"""Probe: what tuning did to a model, told in sentences, kept as JSON, and drawn on a page.

Read top to bottom: choose the probes (those that cost little, or those that are named), let each look at the pair,
write what it found, and put all of it on one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import CorruptError, RecipeError
from luthier.core.events import Event, Recorder, plain
from luthier.core.nearest import choice
from luthier.core.units import rate_text
from luthier.core.yaml_text import parse_value
from luthier.model.comparing.pair import Pair
from luthier.probes import Concern, Probe
from luthier.recipes.probing.probed import Probed
from luthier.store.files import read_json, write_json, write_text
from luthier.store.probe_page import PAGE, page

CHEAP: Final = 2e12
"""FLOPs of a probe that is made without being asked for: about a minute on two cores."""
PROBES: Final = "probes"
"""The folder of a run that holds what its probes have found."""


def chosen_probes(names: Sequence[str], sets: Sequence[str]) -> list[Probe]:
    """The probes of these names, or all, with `--set probe.knob=value`. Raises RecipeError for unknown ones.

    They stand in the order in which people ask: what may be lost, what is different, what to set next time.
    """
    known = catalog.names("probes")
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no probe {name!r}", do=choice(name, known))
    if len(set(names)) < len(names):
        raise RecipeError(f"--probe names {', '.join(names)}", allowed="each probe once")
    knobs = knobs_of(sets, list(names) or known)
    probes = [choose("probes", Probe, {"method": name, **knobs.get(name, {})}) for name in names or known]
    return sorted(probes, key=lambda probe: _place(probe.concern))


def split_by_cost(probes: Sequence[Probe], pair: Pair, *, named: bool) -> tuple[list[Probe], dict[str, str]]:
    """Those that are made, and why the others are not: without being `named` only cheap ones are."""
    made, left_out = [], {}
    for probe in probes:
        work = 0.0 if named else probe.flops(pair)
        if not named and (probe.by_name_only or work > CHEAP):
            cost = f"about {rate_text(work).removesuffix('/s')}" if work else "it is made by name only"
            left_out[probe.method_name()] = f"{cost}; --probe {probe.method_name()}"
        else:
            made.append(probe)
    return made, left_out


def probe_pair(
    probed: Probed, probes: Sequence[Probe], folder: Path, *, left_out: Mapping[str, str], recorder: Recorder
) -> dict[str, Any]:
    """Let each probe look, and write a JSON file for each and a page for all into `folder`; what was found."""
    reports: dict[str, dict[str, Any]] = {}
    for probe in probes:
        name = probe.method_name()
        recorder.record(Event("doing", {"what": f"{name} ({len(reports) + 1} of {len(probes)})"}))
        report = probe.of(probed.pair)
        reports[name] = {"probe": name, "knobs": probe.model_dump(mode="json"), **report.as_dict()}
    return written(probed, reports, folder, left_out=left_out)


def written(
    probed: Probed, reports: Mapping[str, Mapping[str, Any]], folder: Path, *, left_out: Mapping[str, str]
) -> dict[str, Any]:
    """The reports as files of a folder, with a page for all of them; what `--json` prints."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = {"before": probed.before, "after": probed.after}
    for name, report in reports.items():
        write_json(folder / f"{name}.json", plain({**pair, **report}))
    every = _ordered({**_found_before(folder, pair), **reports})
    missing = {name: why for name, why in left_out.items() if name not in every}
    about = f"{probed.after}, beside {probed.before}"
    write_text(folder / PAGE, page(Path(probed.after).name or probed.after, about, every, missing))
    return {
        "before": probed.before,
        "after": probed.after,
        "probes": dict(reports),
        "left_out": dict(left_out),
        "folder": str(folder),
        "page": str(folder / PAGE),
        "cache": probed.pair.spectra.kept(),
    }


def _found_before(folder: Path, pair: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What other probes have found of the same pair, so that the page shows all of it."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            held = read_json(path)
        except CorruptError:
            continue
        if all(held.get(key) == value for key, value in pair.items()) and "verdict" in held:
            found[path.stem] = held
    return found


def _ordered(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The reports in the order of their probes; those of a probe that is no longer there at the end."""
    known = catalog.names("probes")

    def place(name: str) -> tuple[int, str]:
        kind = catalog.load("probes", name) if name in known else None
        return (_place(kind.concern) if kind is not None and issubclass(kind, Probe) else len(known), name)

    return {name: reports[name] for name in sorted(reports, key=place)}


def _place(concern: Concern) -> int:
    return get_args(Concern).index(concern)


def knobs_of(sets: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`probe.knob=value` as the knobs of each probe. Raises RecipeError for any other name."""
    found: dict[str, dict[str, Any]] = {}
    for one in sets:
        key, equals, value = one.partition("=")
        name, dot, knob = key.strip().partition(".")
        if not equals or not dot or not knob:
            raise RecipeError(f"--set {one!r}", allowed="PROBE.KNOB=VALUE, such as intruder_dimensions.k=5")
        if name not in names:
            raise RecipeError(f"--set {one!r} is for a probe that is not made", do=choice(name, names))
        found.setdefault(name, {})[knob] = parse_value(value, name=f"--set {key}")
    return found
