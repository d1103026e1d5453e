"""Opening what is served: the model, its engine with a pool of adapters, and the names they go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from luthier.core.errors import RecipeError
from luthier.data.hub import ModelFiles
from luthier.infer.cache import layers_of
from luthier.infer.engine import Engine
from luthier.infer.reader import Counts, default_room
from luthier.infer.request import MOST_DRAFTED, News, Request
from luthier.infer.scheduler import Room
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, kind_of_source, resolve_source
from luthier.model.tasks import kind_of
from luthier.recipes.drafting import with_draft_model
from luthier.recipes.opening.opened import Opened, open_encoder, open_named
from luthier.recipes.opening.pooled import pool_of
from luthier.recipes.opening.quantized import quantizer_named
from luthier.recipes.opening.results import result_of
from luthier.server.names import Names
from luthier.server.pooling import Pooling
from luthier.server.serving import Serving
from luthier.server.settings import Settings
from luthier.server.worker import Steps, Worker
from luthier.store.runs import ADAPTER, RunDirectory, is_run


@final
class Silent:
    """The engine of a model that says no text."""

    busy = False
    counts = Counts(0, 0)

    def add(self, request: Request) -> int:
        """Refuse."""
        raise RecipeError(f"an encoder was asked to go on with {len(request.prompt)} tokens", do="ask it for vectors")

    def step(self) -> list[News]:
        """Nothing."""
        return []

    def cancel(self, request: int) -> bool:
        """Nothing is under way."""
        return False


@final
@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is served and with how much room: `tokens` of keys (None finds it), continuations that may wait.

    `drafts` tokens are looked ahead, by the `draft_model` or by what a text has said.
    """

    name: str
    adapter: str | None = None
    precision: Precision = "auto"
    quantizer: str = "none"
    tokens: int | None = None
    waiting: int = 256
    drafts: int = 0
    draft_model: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drafts <= MOST_DRAFTED:
            raise RecipeError(f"--drafts is {self.drafts}", allowed=f"0 (off) to {MOST_DRAFTED}")


def open_serving(wanted: Wanted, settings: Settings) -> Serving:
    """Load the model and make its engine; nothing listens yet."""
    if _is_encoder(wanted):
        opened = open_encoder(wanted.name, precision=wanted.precision)
    else:
        packed = quantizer_named(wanted.quantizer)
        opened = open_named(
            wanted.name, adapter=wanted.adapter, precision=wanted.precision, quantizer=packed, speaks=True
        )
    require_drafts(opened, wanted.drafts)
    if wanted.draft_model is not None:
        opened = with_draft_model(opened, wanted.draft_model, precision=wanted.precision)
    return serve_opened(opened, settings, base=base_name(wanted.name), own=own_names(wanted), tokens=wanted.tokens,
                        waiting=wanted.waiting, drafts=wanted.drafts)  # fmt: skip


def require_drafts(opened: Opened, drafts: int) -> None:
    """Raise RecipeError for drafts that no request could have."""
    if drafts and not _has_pages(opened.model):
        raise RecipeError(f"--drafts is {drafts}, and {opened.model.source} has no keys in pages",
                          allowed="decoders of attention, such as those of llama's family",
                          do="leave --drafts and --draft-model out")  # fmt: skip


def serve_opened(
    opened: Opened,
    settings: Settings,
    *,
    base: str,
    own: Sequence[str] = (),
    tokens: int | None = None,
    waiting: int = 256,
    drafts: int = 0,
) -> Serving:
    """What is served of an opened model; `own` are the names of the adapter that is on it."""
    model = opened.model
    engine: Steps = Silent()
    pool, room = None, None
    if model.task.speaks:
        pool = pool_of(model)
        if _has_pages(model):
            room = _room(model, tokens)
        model.train(False)
        engine = Engine(model, room=room, decode=opened.tokenizer.decode, pool=pool, drafting=opened.drafting)
    names = Names(base, pool=pool, folder=settings.adapters)
    for name in own:
        names.add(name, "default")
    worker = Worker(engine, rows=room.rows if room is not None else 1, waiting=waiting)
    pooling = Pooling.of(ModelFiles.of(resolve_source(model.source))) if kind_of(model.config) == "encoder" else None
    most = room.tokens if room is not None else model.context_tokens
    serving = Serving(opened, worker, names, settings, room=most, pooling=pooling, drafts=drafts)
    serving.load_jobs()
    return serving


def base_name(name: str) -> str:
    """What the base is called: a hub id as it is, a folder by its own name, a run by its base."""
    run = Path(name)
    if is_run(run):
        folder, _ = result_of(RunDirectory.open(run))
        if folder.name != ADAPTER:
            return run.resolve().name
        return base_name(str(RunDirectory.open(run).read_recipe()["model"]))
    return Path(name).resolve().name if Path(name).is_dir() else name


def own_names(wanted: Wanted) -> list[str]:
    """What the adapter is called that is on the model from the start."""
    if wanted.adapter is not None:
        return [Path(wanted.adapter).resolve().name]
    run = Path(wanted.name)
    return [run.resolve().name] if is_run(run) and result_of(RunDirectory.open(run))[0].name == ADAPTER else []


def _is_encoder(wanted: Wanted) -> bool:
    """Whether a base is served that reads both ways; runs and adapters say themselves what they are for."""
    plain = wanted.adapter is None and not is_run(Path(wanted.name))
    return plain and kind_of_source(wanted.name) == "encoder"


def _has_pages(model: LanguageModel) -> bool:
    return model.task.speaks and model.executor.kind == "segments" and model.task.name == "causal_lm"


def _room(model: LanguageModel, tokens: int | None) -> Room:
    found = default_room(model, layers_of(model))
    return found if tokens is None else replace(found, tokens=tokens)
