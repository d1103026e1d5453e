"""Hand a run over to an engine that serves at scale: vLLM, SGLang or llama.cpp, which runs somewhere and answers HTTP.

The story: what the engine would refuse or compute otherwise is told before anything is sent; the adapter is loaded into
it, unless its name is there already; then a sync probe asks for log-probabilities and holds them against ours. Only an
engine that computes what was trained is told of as ready. A model without an adapter is probed as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.infer.dialects import Dialect
from luthier.infer.remote import RemoteSpeaker, loaded
from luthier.infer.sync import TOLERANCE, Sync, probe
from luthier.recipes.exporting.questions import questions_for
from luthier.recipes.lint import require_clean
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.opening.results import of_policy, result_of
from luthier.recipes.own_scores import scores_by
from luthier.store.runs import ADAPTER, RunDirectory, is_run


@final
@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is handed over: a run, or a model with or without an `adapter` folder.

    `model` is the name it gets there (that of the run or the folder when left out), `path` where the adapter lies on
    the engine's machine, `max_rank` what vLLM was started with. `replace` takes a name that is in use already.
    """

    name: str
    adapter: str | None = None
    model: str = ""
    path: str = ""
    max_rank: int = 16
    tolerance: float = TOLERANCE
    replace: bool = False


@final
@dataclass(frozen=True)
class HandedOver:
    """An engine that serves what was trained: what it is called there, what a probe found, and what was not loaded."""

    engine: Dialect
    model: str
    sync: Sync
    loaded: bool

    @property
    def speaker(self) -> RemoteSpeaker:
        """The engine as a speaker."""
        return RemoteSpeaker(self.engine, self.sync)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"engine": self.engine.name, "url": self.engine.wire.shown, "model": self.model, "loaded": self.loaded,
                "request": self.engine.use(self.model), "sync": self.sync.as_dict()}  # fmt: skip


def hand_over(wanted: Wanted, engine: Dialect, *, told: Callable[[str], None] = lambda _line: None) -> HandedOver:
    """Let an engine serve what was trained; `told` hears what is being done.

    Raises GateError for an adapter that the engine takes amiss and for an engine that computes something else, and
    RemoteError for one that does not answer.
    """
    folder = adapter_of(wanted)
    if folder is not None:
        require_clean(folder, engine.name, max_rank=wanted.max_rank)
    served = engine.models()
    name = _whole(served, wanted.model) if folder is None else wanted.model or _own_name(wanted)
    loads = folder is not None and (wanted.replace or name not in served)
    told(f"{'loading' if loads else 'found'} {name or 'the base'}, computing its log-probabilities here")
    opened = open_named(wanted.name, adapter=wanted.adapter)
    ours = scores_by(opened.model)
    base = scores_by(opened.model, bare=True) if folder is not None else None
    texts = texts_of(wanted, opened, told)
    if folder is not None and loads:
        sync = loaded(engine, name, wanted.path or str(folder.resolve()), texts, ours=ours, base=base,
                      tolerance=wanted.tolerance)  # fmt: skip
    else:
        sync = probe(engine, name, texts, ours=ours, base=base, tolerance=wanted.tolerance)
        sync.require()
    return HandedOver(engine, name, sync, loads)


def adapter_of(wanted: Wanted) -> Path | None:
    """The folder of the adapter that is handed over; None for a model that has none."""
    if wanted.adapter is not None:
        return Path(wanted.adapter)
    if not is_run(Path(wanted.name)):
        return None
    folder, _ = result_of(RunDirectory.open(Path(wanted.name)))
    return folder if folder.name == ADAPTER else None


def texts_of(wanted: Wanted, opened: Opened, told: Callable[[str], None]) -> tuple[Ints, ...]:
    """What is compared: held-out rows of a run, its rows where nothing was held out, and otherwise some sentences."""
    run = of_policy(RunDirectory.open(Path(wanted.name))) if is_run(Path(wanted.name)) else None
    return questions_for(opened.tokenizer, run, noticed=told).prompts


def _own_name(wanted: Wanted) -> str:
    return Path(wanted.adapter or wanted.name).resolve().name


def _whole(served: dict[str, str | None], name: str) -> str:
    """The name of a whole model that the engine was started with. Raises RecipeError where it is not clear which."""
    plain = [each for each, parent in served.items() if parent is None]
    if name in served:
        return name
    if name or len(plain) != 1:
        wanted = repr(name)[:80] if name else "one model"
        raise RecipeError(f"the engine serves {', '.join(served) or 'nothing'}, and {wanted} was asked for",
                          do="name one of them: --as NAME")  # fmt: skip
    return plain[0]
