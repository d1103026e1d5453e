"""Opening what a name stands for: a base model, or a run with its base, its result and its way of rendering.

Every later verb takes just the run. What the run trained on decides how prompts are rendered and where answers stop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from luthier.adapters import saved_adapter
from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Content, Labelled, Message, Row, Tagged
from luthier.data.forest import Ints, pack
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.infer.drafts import Drafting, from_the_text
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.infer.text import TextStream
from luthier.kernels import pool
from luthier.model.files.adapter_config import read_config, read_extras
from luthier.model.files.adapter_files import check_base, fill
from luthier.model.files.generation_files import read_stop_ids
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, resolve_source
from luthier.model.packed import packing_of
from luthier.model.tasks import SCORES, Task
from luthier.model.text_model import LocalTextScorer
from luthier.objectives.classification import Classification
from luthier.quantizers import Quantizer
from luthier.recipes.opening.purpose import SOME, kept_task, read_as
from luthier.recipes.opening.quantized import kept_quantizer, load_base, quantize
from luthier.recipes.opening.results import model_from, of_policy, result_of, started_in, template_from
from luthier.store.runs import MODEL, RunDirectory, is_run

AT_ONCE = 4096
"""Tokens that are classified at once."""


@dataclass(frozen=True)
class Classes:
    """The probability of each class, `names` in order, for a text or for each of its words."""

    names: tuple[str, ...]
    scores: tuple[Float[np.ndarray, " C"], ...]

    @property
    def best(self) -> tuple[str, ...]:
        """The likeliest class of the text, or of each word."""
        return tuple(self.names[int(each.argmax())] for each in self.scores)


@dataclass(frozen=True)
class Opened:
    """A model that can be asked: with its tokenizer, its renderer and the ids at which it stops."""

    model: LanguageModel
    tokenizer: Tokenizer
    renderer: Renderer
    stop_ids: tuple[int, ...]
    drafting: Drafting = from_the_text

    @property
    def engine(self) -> Engine:
        """A new engine for this model."""
        return Engine(self.model, decode=self.tokenizer.decode, drafting=self.drafting)

    def stream(self, request: Request, engine: Engine | None = None) -> Iterator[str]:
        """The text of an answer as it grows, from an engine with nothing else to do. Raises what the request has failed
        with."""
        engine = engine or self.engine
        engine.add(request)
        text = self._text_stream(request.sampling.stop)
        while engine.busy:
            for news in engine.step():
                if news.failure is not None:
                    raise news.failure
                yield from filter(None, (text.push(said.token) for said in news.said))
        yield text.end()

    def prompt(self, text: str, *, system: str = "", raw: bool = False) -> Ints:
        """A user's text as the model expects it: through the chat template, or `raw` as plain text to continue.

        Raises RecipeError for a model that says no text.
        """
        if not self.model.task.speaks:
            raise RecipeError(
                f"{self.model.source} was loaded to classify or to fill in, and says no text",
                do="ask a classifier with: luthier classify RUN TEXT",
            )
        if raw:
            ids, _ = self.tokenizer.encode(text)
            begins = self.tokenizer.bos_id is not None and self.tokenizer.adds_bos
            return np.concatenate([np.array([self.tokenizer.bos_id] * begins, np.int32), ids])
        messages = [Message("system", system)] * bool(system) + [Message("user", text)]
        return self.renderer.prompt_ids(messages)

    def classify(self, texts: Sequence[Content]) -> list[Classes]:
        """The classes of texts, of pairs, or of the words of texts. What class a content says it has does not matter.

        Raises RecipeError for a model that was not trained to classify.
        """
        task = self.model.task
        if task == SCORES:
            raise RecipeError(
                f"{self.model.source} was trained to score answers, and knows no classes",
                allowed="a run with objective classification",
                do='score an answer with: luthier classify RUN "PROMPT" --pair "ANSWER"',
            )
        if not task.classifies:
            raise RecipeError(
                f"{self.model.source} was not loaded to classify",
                allowed="a run with objective classification",
                do="ask it with: luthier generate",
            )
        objective = Classification(level="text" if task.name == "sequence_classes" else "word")
        rows = [Row(index, f"text {index + 1}", _with_some(text, task)) for index, text in enumerate(texts)]
        views = [self.renderer.render(row) for row in rows]
        trees = [tree for parts in views for view in parts for tree in objective.trees(view)]
        require_room(np.array([tree.token_count for tree in trees]), self.model)
        found: list[list[Float[np.ndarray, " C"]]] = [[] for _ in texts]
        for forest in pack(trees, max_tokens=AT_ONCE):
            with torch.no_grad():
                outputs = self.model.token_outputs(forest)
            if outputs.classes is not None:
                for row, scores in zip(outputs.rows.tolist(), outputs.classes.exp().cpu().numpy(), strict=True):
                    found[row].append(scores)
        return [Classes(task.classes, tuple(each)) for each in found]

    def scores(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """How good the last message of each conversation is as an answer: what a reward model says of it.

        Raises RecipeError for a model that was not trained to score answers.
        """
        found = LocalTextScorer(self.model, self.renderer).scores(conversations)
        if missing := [index for index, score in enumerate(found) if math.isnan(score)]:
            raise DataError(f"conversation {missing[0] + 1} is longer than the model's context")
        return found

    def text(self, tokens: Ints, stop: Sequence[str] = ()) -> str:
        """What was said, without control tokens, up to the first of the strings `stop`."""
        stream = self._text_stream(stop)
        return "".join([*(stream.push(int(token)) for token in tokens), stream.end()])

    def _text_stream(self, stop: Sequence[str]) -> TextStream:
        skip = frozenset(self.tokenizer.special_ids | set(self.stop_ids))
        return TextStream(self.tokenizer.decode, stop, skip=skip)


def _with_some(text: Content, task: Task) -> Content:
    """A text with a class that the model knows, where one is asked for."""
    if isinstance(text, Labelled):
        return replace(text, label=task.classes[0])
    return replace(text, tags=(task.classes[0],) * len(text.words)) if isinstance(text, Tagged) else text


def open_named(
    name: str,
    *,
    adapter: str | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    quantizer: Quantizer | None = None,
    speaks: bool = False,
    own_modules: bool = True,
) -> Opened:
    """What `name` stands for: a run directory, or a model folder or id; `adapter` is put on top of a model.

    Its weights are packed as they were when it was trained, or by `quantizer`, the head included, to speak faster in
    less memory. With `speaks` it is opened to make text, and `precision` auto may be bfloat16 where it was trained in
    float32 (`model/spoken.py`). Without `own_modules` it is made of the zoo's modules (`model/load.py`), for whoever
    asks these for more than to be run. Raises RecipeError when an adapter is named beside a run, which has its own.
    """
    speaks = speaks and precision == "auto"
    # Weights that lie in large pages are read faster; where there is no pool they lie as they would.
    pooled = device != "cuda" and not pool.install()
    opened = _open(name, adapter, _Asked(precision, device, quantizer, speaks, own_modules))
    if pooled and any(packing_of(each) is not None for each in opened.model.module.parameters()):
        # What was packed is freed, and nobody will ask for as much again.
        pool.release()
    return opened


@dataclass(frozen=True)
class _Asked:
    """How a base is to be loaded and packed, where what it was trained with does not decide."""

    precision: Precision
    device: str
    quantizer: Quantizer | None
    speaks: bool
    own_modules: bool

    def base(self, source: str, extras: dict[str, Any], task: Task) -> LanguageModel:
        """A base model as the `extras` of a result want it."""
        return load_base(
            source, precision=kept_precision(extras, self.precision), device=self.device, task=task,
            seed=int(extras.get("base_seed", 0)), speaks=self.speaks, own_modules=self.own_modules,
        )  # fmt: skip


def _open(name: str, adapter: str | None, asked: _Asked) -> Opened:
    if is_run(Path(name)):
        if adapter is not None:
            raise RecipeError(f"{name} is a run and has its own result", do="name the base model to use --adapter")
        run = of_policy(RunDirectory.open(Path(name)))
        return _open_run(run, replace(asked, speaks=asked.speaks and not _asked_float32(run)))
    extras = read_extras(Path(adapter or name))
    config = {} if adapter is None else read_config(Path(adapter))
    task = kept_task(extras, config=config, folder=None if adapter is None else Path(adapter))
    model = asked.base(name, extras, task)
    if adapter is None:
        _pack(model, {}, asked.quantizer)
        return _opened(model, resolve_source(name), {})
    _pack(model, extras, asked.quantizer)
    put_on(model, Path(adapter))
    return _opened(model, resolve_source(name), extras, stops=read_stop_ids(Path(adapter)))


def _pack(model: LanguageModel, extras: dict[str, object], asked: Quantizer | None) -> None:
    kept = kept_quantizer(extras)
    if asked is None:
        quantize(model, kept)
    elif "packed-weights" in kept.provides:
        raise RecipeError(
            f"quantizer is {asked.method_name()}, and the adapter was trained on weights that were packed another way",
            allowed=kept.method_name(),
            do="leave the quantizer out",
        )
    else:
        quantize(model, asked, head=True)


def open_encoder(name: str, *, precision: Precision = "auto", device: str = "auto") -> Opened:
    """An encoder for its states, whatever head it has or lacks: a model folder or id."""
    return _opened(load_base(name, precision=precision, device=device, task=Task("sequence_classes", SOME)),
                   resolve_source(name), {})  # fmt: skip


def put_on(model: LanguageModel, folder: Path, *, name: str = "default", named_only: bool = False) -> None:
    """Load the adapter in `folder` (PEFT's format) onto `model`, strictly, after checking its base.

    Where it cannot be filled, the model is left as it was.
    """
    check_base(folder, model)
    method = saved_adapter(folder, model.sites)
    attachment = model.attach(method.attach(model.sites), name=name, named_only=named_only)
    try:
        fill(attachment, folder)
    except BaseException:
        model.detach(name)
        raise


def require_room(lengths: Ints | NDArray[np.int64], model: LanguageModel) -> None:
    """Raise RecipeError when the longest row and a learned root before it are more than the model's positions.

    RoBERTa's first positions stand for padding, so its rows are shorter than its table of positions.
    """
    first = model.executor.entry.first_position
    root = 0 if model.active_root is None else model.active_root.token_count
    longest = int(max(lengths, default=0))
    room = None if model.context_tokens is None else model.context_tokens - first
    if (root or first) and room is not None and longest + root > room:
        raise RecipeError(
            f"the longest row has {longest} tokens and the learned prefix {root}",
            allowed=f"the model's {room} positions for both",
            do=f"set data.max_tokens to {room - root} and data.over_length to drop or truncate",
        )


def kept_precision(extras: dict[str, object], precision: Precision) -> Precision:
    """The precision that a result was trained in, as was written beside it, unless another is asked for."""
    known: tuple[Precision, ...] = ("float32", "bfloat16")
    return next((kept for kept in known if precision == "auto" and extras.get("precision") == kept), precision)


def _asked_float32(run: RunDirectory) -> bool:
    """Whether a run's recipe names the precision that it was trained in."""
    return run.read_recipe().get("precision") == "float32"


def _open_run(run: RunDirectory, asked: _Asked) -> Opened:
    folder, _ = result_of(run)
    if (state := run.status().state) != "finished":
        raise RecipeError(
            f"the result of {run.folder} is not proved yet (its status is {state})", do=f"luthier resume {run.folder}"
        )
    extras = read_extras(folder)
    place = started_in(run)
    if folder.name == MODEL:
        whole = asked.base(str(folder), extras, kept_task(extras))
        _pack(whole, {}, asked.quantizer)
        return _opened(whole, folder, extras, place)
    base = model_from(str(read_config(folder)["base_model_name_or_path"]), place)
    model = asked.base(base, extras, kept_task(extras))
    _pack(model, extras, asked.quantizer)
    put_on(model, folder)
    return _opened(model, resolve_source(base), extras, place, stops=read_stop_ids(folder))


def _opened(
    model: LanguageModel,
    source: str | Path,
    extras: dict[str, object],
    folder: Path | None = None,
    *,
    stops: frozenset[int] = frozenset(),
) -> Opened:
    tokenizer = Tokenizer.load(source)
    reading = Reading(template=template_from(str(extras.get("template", "auto")), folder))
    reading = read_as(reading, model)
    renderer, _ = make_renderer(tokenizer, reading, context_tokens=model.context_tokens)
    recorded = extras.get("stop_ids")
    learned = [int(token) for token in recorded] if isinstance(recorded, list) else []
    return Opened(model, tokenizer, renderer, tuple(sorted({*tokenizer.stop_ids, *learned, *stops})))
