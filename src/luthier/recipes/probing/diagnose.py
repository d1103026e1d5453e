"""Diagnose: all of `luthier probe`: open what is looked at, let the probes look, or scale what they count.

Read top to bottom: a run, or two models, become a pair with texts; of the probes those are made that were asked for, or
that cost little; what they find is written beside the run. Scaling intruders down is a look of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import RecipeError
from luthier.core.events import Recorder
from luthier.probes import Probe
from luthier.recipes.probing.mitigate import NAME, Scaling, mitigated
from luthier.recipes.probing.probe import PROBES, chosen_probes, probe_pair, split_by_cost
from luthier.recipes.probing.probed import Probed, probed_folders, probed_run
from luthier.store.runs import RunDirectory

NEW: Final = Path(PROBES)
"""Where the reports of two models go."""


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is looked at, a run or two models, and how.

    Of `probes`, or of all, those are made that cost little, unless they were `named`. With `scaling` intruders are
    scaled instead, and with `out` the adapter with them scaled is written. Reports go to the folder `report`, or to
    RUN/probes.
    """

    run: Path | None = None
    before: str = ""
    after: str = ""
    keep: Sequence[str] = ()
    probes: Sequence[Probe] = ()
    named: bool = False
    scaling: Scaling | None = None
    out: Path | None = None
    report: Path | None = None

    @property
    def folder(self) -> Path:
        """Where reports go."""
        return self.report or (NEW if self.run is None else self.run / PROBES)


def diagnose(asked: Asked, *, recorder: Recorder) -> dict[str, Any]:
    """Look, and write what was found into the folder; the same as plain values."""
    _require_clear(asked)
    probed = _opened(asked, recorder)
    if asked.scaling is not None:
        return mitigated(probed, asked.scaling, asked.folder, out=asked.out)
    made, left_out = _chosen(asked, probed)
    return probe_pair(probed, made, asked.folder, left_out=left_out, recorder=recorder)


def planned(asked: Asked, *, recorder: Recorder) -> dict[str, Any]:
    """What would be made, what is left out and why, and where it would go; nothing is written."""
    _require_clear(asked)
    probed = _opened(asked, recorder)
    made, left_out = ([], {}) if asked.scaling is not None else _chosen(asked, probed)
    names = [NAME] if asked.scaling is not None else [probe.method_name() for probe in made]
    return {"probes": names, "left_out": dict(left_out), "folder": str(asked.folder)}


def _require_clear(asked: Asked) -> None:
    """Raise RecipeError for what does not go together."""
    if (asked.run is None) != bool(asked.before and asked.after) or (asked.run and (asked.before or asked.after)):
        named = [str(each) for each in (asked.run, asked.before, asked.after) if each]
        what = f" from {', '.join(named)}" if named else ": nothing is named"
        raise RecipeError(f"what to look at is not clear{what}", allowed="a run, or both of before and after",
                          do="luthier probe RUN, or luthier probe --before MODEL --after MODEL")  # fmt: skip
    if asked.out is not None and asked.scaling is None:
        raise RecipeError(f"--out {asked.out} is given without --mitigate",
                          do="say by what to scale intruders: --mitigate 0.5")  # fmt: skip
    if asked.probes and asked.scaling is not None:
        names = ", ".join(probe.method_name() for probe in asked.probes)
        raise RecipeError(f"--mitigate is given with the probes {names}", allowed="one of the two at a time",
                          do="call luthier probe twice: the page shows both")  # fmt: skip


def _opened(asked: Asked, recorder: Recorder) -> Probed:
    if asked.run is not None:
        return probed_run(RunDirectory.open(asked.run), asked.keep, recorder=recorder)
    return probed_folders(asked.before, asked.after, asked.keep, recorder=recorder)


def _chosen(asked: Asked, probed: Probed) -> tuple[list[Probe], dict[str, str]]:
    return split_by_cost(asked.probes or chosen_probes([], []), probed.pair, named=asked.named)
