"""A session: the four primitives for people who write their own loop.

`forward_backward` adds gradients of rows, `optim_step` applies them, `sample` asks the model as it is now, `save` and
`load` write and read what was trained. Everything a recipe does beyond these is convenience.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch

from luthier.adapters import Adapter, saved_adapter
from luthier.core.chosen import choose
from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Message, Row
from luthier.data.forest import Tree
from luthier.data.formats import detect
from luthier.data.prepare import MEANINGS, Reading, make_renderer
from luthier.data.rendering.renderer import OverLength, Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.infer.engine import Engine
from luthier.kernels.pool import bound_caches
from luthier.model.files.adapter_config import CONFIG, read_config, read_extras
from luthier.model.files.adapter_files import check_base, fill
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, resolve_source
from luthier.model.speaker import Sampling
from luthier.objectives import Objective
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.control_tokens import save_stops, with_token_ids
from luthier.recipes.opening import purpose
from luthier.recipes.opening.opened import kept_precision
from luthier.recipes.opening.purpose import bound, edits_for, kept_task, read_as
from luthier.recipes.opening.quantized import KEY, kept_quantizer, load_base, quantize
from luthier.train.batcher import Batcher
from luthier.train.first_look import look
from luthier.train.pass_report import PassReport
from luthier.train.result import save_result
from luthier.train.stepper import Stepper, StepReport

RowLike = Mapping[str, Any]


@final
class Session:
    """A model with an adapter on it, ready to be trained by hand. Make one with `luthier.load`."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        renderer: Renderer,
        *,
        quantizer: Quantizer,
        adapter: Adapter,
        objective: Objective,
        optimizer: Optimizer,
        micro_tokens: int = 4096,
        name: str = "default",
        batcher: Batcher | None = None,
    ) -> None:
        self.model = model
        self.quantizer = quantizer
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.adapter = with_token_ids(adapter, tokenizer, renderer.stop_ids)
        self.objective = objective
        if objective.taught:
            raise RecipeError(
                f"the objective {objective.method_name()} learns from a teacher, and a session has none",
                do="train it with a recipe that names a teacher",
            )
        self.attachment = model.attach(edits_for(self.adapter, objective, model), name=name)
        self.stepper = Stepper(
            model, self.attachment, objective, optimizer, micro_tokens=micro_tokens, batcher=batcher
        )
        self.settled = not self.adapter.first_look

    def forward_backward(self, rows: Sequence[RowLike]) -> PassReport:
        """Add the gradient of these rows (mappings in any of luthier's data formats); nothing is stepped."""
        if not self.settled:
            # An adapter that has to look at data looks at the first that there is.
            first = [self.trees([row]) for row in rows[: self.adapter.first_look]]
            self.adapter.settle(self.attachment.edits, lambda: look(self.stepper, first))
            self.settled = True
        return self.stepper.forward_backward(self.trees(rows))

    def optim_step(self, *, factor: float = 1.0) -> StepReport:
        """Divide by the weight of all rows since the last step, clip, and step."""
        return self.stepper.optim_step(factor=factor)

    def loss(self, rows: Sequence[RowLike]) -> float:
        """The mean loss over the trained tokens of these rows, without dropout."""
        return self.stepper.evaluate(self.trees(rows)).loss

    def sample(
        self, prompts: Sequence[str], *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model answers to these user messages now."""
        ids = [self.renderer.prompt_ids([Message("user", prompt)]) for prompt in prompts]
        stops = tuple(sorted(self.renderer.stop_ids))
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_ids=stops)
        with self.model.only(self.attachment.name):
            spoken = Engine(self.model, decode=self.tokenizer.decode).speak(ids, sampling)
        silent = self.tokenizer.special_ids | set(stops)
        return [self.tokenizer.decode([int(t) for t in answer.tokens if int(t) not in silent]) for answer in spoken]

    def save(self, folder: str | Path) -> Path:
        """Write the adapter (in PEFT's format) or the trained model into a new folder; `luthier.load` reads it."""
        extras = {
            "stop_ids": sorted(self.renderer.stop_ids),
            "precision": str(self.model.dtype).removeprefix("torch."),
            KEY: self.quantizer.as_recipe(),
            purpose.KEY: purpose.as_kept(self.model.task),
        }
        place = Path(folder)
        if place.exists() and any(place.iterdir()):
            raise RecipeError(f"{place} is not empty", do="name a new folder")

        def beside(saved: Path) -> None:
            self.tokenizer.save(saved, chat_template=self.renderer.template.source or None)
            if self.model.task.speaks:
                save_stops(saved, self.model, self.tokenizer, self.renderer.stop_ids)

        return save_result(place, self.model, self.attachment, self.adapter, extras, beside=beside)

    def trees(self, rows: Sequence[RowLike]) -> list[Tree]:
        """The rows as the trees that the objective trains."""
        if not rows:
            raise DataError("no row was given", allowed="at least one mapping in a format luthier reads")
        format = detect(rows, wanted=self.objective.meanings or MEANINGS[self.renderer.kind]).format
        trees: list[Tree] = []
        for number, values in enumerate(rows):
            where = f"row {number}"
            row = Row(number, where, format.read(values, where))
            views = self.renderer.render(row)
            for view in views:
                self.model.require_rows(view.tokens)
            trees += [tree for view in views for tree in self.objective.trees(view)]
        return trees


def load(
    model: str | Path,
    *,
    adapter: Adapter | str = "lora",
    objective: Objective | str = "sft",
    optimizer: Optimizer | str = "adamw",
    quantizer: Quantizer | str = "none",
    template: str = "auto",
    max_tokens: int | None = None,
    over_length: OverLength = "raise",
    micro_tokens: int = 4096,
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
    classes: Sequence[str] = (),
) -> Session:
    """A session on a base model with a fresh adapter, or on a folder that `Session.save` wrote, with the saved one.

    `classes` are the names that rows call them by, for an objective that classifies; a saved session has kept its own.
    """
    bound_caches()
    saved = Path(model) if (Path(model) / CONFIG).is_file() else None
    config = read_config(saved) if saved is not None else {}
    source = str(config.get("base_model_name_or_path", model))
    extras = read_extras(Path(model))
    tokenizer = Tokenizer.load(saved if saved is not None else resolve_source(source))
    aim = bound(choose("objectives", Objective, objective), source, tokenizer)
    task = aim.task(tuple(classes)) if saved is None else kept_task(extras, config=config, folder=saved)
    kept = kept_precision(extras, precision)
    base = load_base(source, precision=kept, device=device, seed=seed, task=task)
    own = choose("quantizers", Quantizer, quantizer)
    if saved is not None and own == choose("quantizers", Quantizer, "none"):
        own = kept_quantizer(extras)
    quantize(base, own)
    reading = read_as(Reading(template=template, max_tokens=max_tokens, over_length=over_length), base)
    reading = replace(reading, wanted=aim.meanings or reading.wanted)
    renderer, _ = make_renderer(tokenizer, reading, context_tokens=base.context_tokens)
    # The adapter's first weights come from torch's default generator.
    torch.manual_seed(seed)
    session = Session(
        base,
        tokenizer,
        renderer,
        quantizer=own,
        adapter=saved_adapter(saved, base.sites) if saved is not None else choose("adapters", Adapter, adapter),
        objective=aim,
        optimizer=choose("optimizers", Optimizer, optimizer),
        micro_tokens=micro_tokens,
    )
    if saved is not None:
        check_base(saved, base)
        fill(session.attachment, saved)
        session.settled = True
    return session
