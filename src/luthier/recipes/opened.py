"""Opening what a name stands for: a base model, or a run with its base, its result and its way of rendering.

Every later verb takes just the run. What the run trained on decides how prompts are rendered and where answers stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.adapters import adapter_of
from luthier.core.errors import RecipeError
from luthier.data.conversation import Message
from luthier.data.forest import Ints
from luthier.data.prepare import Reading, make_renderer
from luthier.data.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.infer.generator import Generator
from luthier.model.adapter_files import check_base, fill, read_config, read_extras
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, load_model, resolve_source
from luthier.recipes.places import model_from, started_in, template_from
from luthier.store.runs import RunDirectory, is_run
from luthier.train.result import ADAPTER, MODEL


@dataclass(frozen=True)
class Opened:
    """A model that can be asked: with its tokenizer, its renderer and the ids at which it stops."""

    model: LanguageModel
    tokenizer: Tokenizer
    renderer: Renderer
    stop_ids: tuple[int, ...]

    @property
    def generator(self) -> Generator:
        return Generator(self.model, decode=self.tokenizer.decode)

    def prompt(self, text: str, *, system: str = "", raw: bool = False) -> Ints:
        """A user's text as the model expects it: through the chat template, or `raw` as plain text to continue."""
        if raw:
            ids, _ = self.tokenizer.encode(text)
            begins = self.tokenizer.bos_id is not None and self.tokenizer.adds_bos
            return np.concatenate([np.array([self.tokenizer.bos_id] * begins, np.int32), ids])
        messages = [Message("system", system)] * bool(system) + [Message("user", text)]
        return self.renderer.prompt_ids(messages)

    def text(self, tokens: Ints) -> str:
        """What was said, without control tokens."""
        silent = self.tokenizer.special_ids | set(self.stop_ids)
        return self.tokenizer.decode([int(token) for token in tokens if int(token) not in silent])


def open_named(
    name: str, *, adapter: str | None = None, precision: Precision = "auto", device: str = "auto"
) -> Opened:
    """What `name` stands for: a run directory, or a model folder or id; `adapter` is put on top of a model.

    Raises RecipeError when an adapter is named beside a run, which has its own.
    """
    if is_run(Path(name)):
        if adapter is not None:
            raise RecipeError(f"{name} is a run and has its own result", do="name the base model to use --adapter")
        return _open_run(RunDirectory.open(Path(name)), precision, device)
    model = load_model(name, precision=precision, device=device)
    extras = {}
    if adapter is not None:
        put_on(model, Path(adapter))
        extras = read_extras(Path(adapter))
    return _opened(model, resolve_source(name), extras)


def put_on(model: LanguageModel, folder: Path, *, name: str = "default") -> None:
    """Load the adapter in `folder` (PEFT's format) onto `model`, strictly, after checking its base."""
    check_base(folder, model)
    method = adapter_of(read_config(folder))
    fill(model.attach(method.attach(model.sites), name=name), folder)


def require_room(lengths: Ints | NDArray[np.int64], model: LanguageModel) -> None:
    """Raise RecipeError when the longest row and a learned root before it are more than the model's context."""
    root = 0 if model.active_root is None else model.active_root.token_count
    longest = int(max(lengths, default=0))
    if root and model.context_tokens is not None and longest + root > model.context_tokens:
        raise RecipeError(
            f"the longest row has {longest} tokens and the learned prefix {root}",
            allowed=f"the model's {model.context_tokens} positions for both",
            do=f"set data.max_tokens to {model.context_tokens - root} and data.over_length to drop or truncate",
        )


def _open_run(run: RunDirectory, precision: Precision, device: str) -> Opened:
    if (run.folder / MODEL).is_dir():
        extras = read_extras(run.folder / MODEL)
        whole = load_model(str(run.folder / MODEL), precision=_kept(extras, precision), device=device)
        return _opened(whole, run.folder / MODEL, extras, started_in(run))
    folder = run.folder / ADAPTER
    if not folder.is_dir():
        raise RecipeError(
            f"{run.folder} has no result yet (its status is {run.status().state})",
            do=f"luthier resume {run.folder}",
        )
    extras = read_extras(folder)
    place = started_in(run)
    base = model_from(str(read_config(folder)["base_model_name_or_path"]), place)
    model = load_model(base, precision=_kept(extras, precision), device=device, seed=int(extras.get("base_seed", 0)))
    put_on(model, folder)
    return _opened(model, resolve_source(base), extras, place)


def _kept(extras: dict[str, object], precision: Precision) -> Precision:
    """The precision the run was trained in, unless another is asked for."""
    known: tuple[Precision, ...] = ("float32", "bfloat16")
    return next((kept for kept in known if precision == "auto" and extras.get("precision") == kept), precision)


def _opened(
    model: LanguageModel, source: str | Path, extras: dict[str, object], folder: Path | None = None
) -> Opened:
    tokenizer = Tokenizer.load(source)
    reading = Reading(template=template_from(str(extras.get("template", "auto")), folder))
    renderer, _ = make_renderer(tokenizer, reading, context_tokens=model.context_tokens)
    recorded = extras.get("stop_ids")
    learned = [int(token) for token in recorded] if isinstance(recorded, list) else []
    return Opened(model, tokenizer, renderer, tuple(sorted({*tokenizer.stop_ids, *learned})))
