"""Hand a run over to an engine that serves at scale: vLLM, SGLang or llama.cpp, which runs somewhere and answers HTTP.

The story: what the engine would refuse or compute otherwise is told before anything is sent; the adapter is loaded into
it, unless its name is there already; then a sync probe asks for log-probabilities and holds them against ours. Only an
engine that computes what was trained is told of as ready. A model without an adapter is probed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import GateError, RecipeError
from luthier.core.knobs import validate
from luthier.data.forest import Ints
from luthier.infer.dialects import Dialect
from luthier.infer.remote import RemoteSpeaker
from luthier.infer.request import Request
from luthier.infer.sync import TOLERANCE, Score, Sync, probe
from luthier.model.speaker import Sampling
from luthier.recipes.evaluate import held_out_of
from luthier.recipes.kinds import kind_of_recipe
from luthier.recipes.lint import lint
from luthier.recipes.opened import Opened, open_named, result_of
from luthier.recipes.places import located, of_policy, started_in
from luthier.store.runs import RunDirectory, is_run
from luthier.train.result import ADAPTER

ROWS: Final = 8
"""Held-out rows that are compared."""
LONGEST: Final = 96
"""Tokens of a row."""
_WORDS: Final = (
    "The ship left the harbour at dawn, and nobody on the quay said a word.",
    "def add(first, second):\n    return first + second\n",
    "Question: What is 17 + 25?\nAnswer: 42",
    "Water boils at 100 degrees Celsius at sea level; higher up, it boils sooner.",
)
"""Texts for a model that brings no rows of its own."""


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
    name, loaded = wanted.model, False
    if folder is not None:
        name = name or _own_name(wanted)
        loaded = _load(engine, name, wanted.path or str(folder.resolve()), there=name in served, replace=wanted.replace)
        told(f"{'loaded' if loaded else 'found'} {name}, computing its log-probabilities here")
    else:
        name = _whole(served, name)
    opened = open_named(wanted.name, adapter=wanted.adapter)
    ours, base = scores_of(opened), scores_of(opened, bare=True) if folder is not None else None
    fine = False
    try:
        sync = probe(engine, name, texts_of(wanted, opened), ours=ours, base=base, tolerance=wanted.tolerance)
        fine = sync.fine
    finally:
        if loaded and not fine:
            # Nobody shall find a wrong model under a good name.
            engine.unload(name)
    sync.require()
    return HandedOver(engine, name, sync, loaded)


def adapter_of(wanted: Wanted) -> Path | None:
    """The folder of the adapter that is handed over; None for a model that has none."""
    if wanted.adapter is not None:
        return Path(wanted.adapter)
    if not is_run(Path(wanted.name)):
        return None
    folder, _ = result_of(RunDirectory.open(Path(wanted.name)))
    return folder if folder.name == ADAPTER else None


def require_clean(folder: Path, engine: str, *, max_rank: int) -> None:
    """Raise GateError for an adapter that an engine refuses, or computes otherwise."""
    if found := lint(str(folder), (engine,), max_rank=max_rank):
        raise GateError("; ".join(f"{engine} {each.kind} {each.what}" for each in found),
                        do=found[0].do, where=str(folder))  # fmt: skip


def scores_of(opened: Opened, *, bare: bool = False) -> Score:
    """Log-probabilities by our own model, `bare` without what is attached to it."""

    def score(texts: Sequence[Ints]) -> list[list[float]]:
        engine = opened.engine
        # The token that it says is not asked for; an answer has at least one.
        sampling = Sampling(max_new_tokens=1, prompt_log_probs=True)
        without: AbstractContextManager[None] = opened.model.without_attachments() if bare else nullcontext()
        opened.model.train(False)
        with without:
            numbers = [engine.add(Request(prompt=text, sampling=sampling)) for text in texts]
            found: dict[int, list[float]] = {}
            while engine.busy:
                for news in engine.step():
                    if news.failure is not None:
                        raise news.failure
                    if news.prompt is not None:
                        found[news.request] = [said.log_prob for said in news.prompt]
        return [found[number] for number in numbers]

    return score


def texts_of(wanted: Wanted, opened: Opened) -> list[Ints]:
    """What is compared: held-out rows of a run, its rows where nothing was held out, and otherwise some sentences."""
    if not is_run(Path(wanted.name)):
        return [opened.prompt(text, raw=True)[:LONGEST] for text in _WORDS]
    run = of_policy(RunDirectory.open(Path(wanted.name)))
    values = run.read_recipe()
    recipe = located(validate(kind_of_recipe(values), values), started_in(run))
    prepared, _ = held_out_of(recipe)
    views = prepared.held_out if len(prepared.held_out) else prepared.train
    return [views[index].tokens[:LONGEST] for index in range(min(ROWS, len(views)))]


def _own_name(wanted: Wanted) -> str:
    return Path(wanted.adapter or wanted.name).resolve().name


def _load(engine: Dialect, name: str, path: str, *, there: bool, replace: bool) -> bool:
    """Whether it was loaded: a name that is served already is probed as it is, unless it is to be replaced."""
    if there and not replace:
        return False
    if there:
        engine.unload(name)
    engine.load(name, path)
    return True


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
