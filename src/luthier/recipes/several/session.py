"""A session of several adapters on one base: the same primitives, and one pass for the rows of all of them.

Each adapter is trained as in a session of its own: by its own rows, divided by its own weight, clipped by its own norm,
stepped by its own optimizer. What is shared is the base, and its products over all rows at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import torch

from luthier.adapters import Adapter
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.renderer import OverLength
from luthier.data.tokenizer import Tokenizer
from luthier.kernels.pool import bound_caches
from luthier.model.load import Precision, resolve_source
from luthier.model.tasks import CAUSAL
from luthier.objectives import Objective
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.opening.purpose import SOME, bound
from luthier.recipes.opening.quantized import load_base, quantize
from luthier.recipes.opening.session import RowLike, Session
from luthier.train.batcher import Batcher
from luthier.train.pass_report import PassReport
from luthier.train.stepper import StepReport


@final
class SeveralSession:
    """Sessions with names, on one model. Make one with `luthier.load_several`."""

    def __init__(self, sessions: Mapping[str, Session], batcher: Batcher) -> None:
        self.sessions = dict(sessions)
        self.batcher = batcher

    def __getitem__(self, name: str) -> Session:
        """One adapter's session: it samples, evaluates, and is saved, alone."""
        if name not in self.sessions:
            raise RecipeError(
                f"no adapter is called {name!r}",
                allowed=", ".join(self.sessions),
                do=did_you_mean(name, self.sessions) or "name one of these",
            )
        return self.sessions[name]

    def forward_backward(self, rows: Mapping[str, Sequence[RowLike]]) -> dict[str, PassReport]:
        """Add to each adapter's gradient that of its own rows, in one pass over the base; nothing is stepped."""
        return self.batcher.forward_backward({name: self[name].trees(own) for name, own in rows.items()})

    def optim_step(self, *, factor: float = 1.0) -> dict[str, StepReport]:
        """A step of every adapter that has a gradient, each as if it were alone."""
        pending = {name: session for name, session in self.sessions.items() if session.stepper.pending_weight > 0}
        if not pending:
            raise RecipeError("optim_step was called without a gradient", do="call forward_backward first")
        return {name: session.optim_step(factor=factor) for name, session in pending.items()}

    def save(self, folder: str | Path) -> Path:
        """Write each adapter into a folder of its name below `folder`; `luthier.load` reads each of them."""
        for name, session in self.sessions.items():
            session.save(Path(folder) / name)
        return Path(folder)


def load_several(
    model: str | Path,
    adapters: Mapping[str, Adapter | str],
    *,
    objective: Objective | str = "sft",
    optimizer: Optimizer | str | Mapping[str, Optimizer | str] = "adamw",
    quantizer: Quantizer | str = "none",
    template: str = "auto",
    max_tokens: int | None = None,
    over_length: OverLength = "raise",
    micro_tokens: int = 4096,
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
) -> SeveralSession:
    """Sessions with fresh adapters by their names on one base model; each starts as it would alone with this seed.

    `optimizer` is one for all, or one for each name: methods want rates of their own.
    """
    if not adapters:
        raise RecipeError("no adapter was named", allowed="at least one, such as {'french': 'lora'}")
    bound_caches()
    tokenizer = Tokenizer.load(resolve_source(str(model)))
    aim = bound(choose("objectives", Objective, objective), str(model), tokenizer)
    if aim.task(SOME) != CAUSAL:
        raise RecipeError(
            f"objective {aim.method_name()} for several adapters", allowed="objectives that go on with a text"
        )
    base = load_base(str(model), precision=precision, device=device, seed=seed, own_modules=True)
    packed = choose("quantizers", Quantizer, quantizer)
    quantize(base, packed)
    reading = Reading(template=template, max_tokens=max_tokens, over_length=over_length)
    renderer, _ = make_renderer(tokenizer, reading, context_tokens=base.context_tokens)
    if isinstance(optimizer, Mapping) and set(optimizer) != set(adapters):
        raise RecipeError(f"optimizers for {sorted(optimizer)}", allowed=f"one for each of {sorted(adapters)}")
    batcher = Batcher(base, micro_tokens=micro_tokens)
    sessions = {}
    for name, adapter in adapters.items():
        # The first weights come from torch's default generator: each adapter's from its beginning.
        torch.manual_seed(seed)
        chosen = choose("adapters", Adapter, adapter)
        if chosen.first_look:
            raise RecipeError(
                f"the adapter {name!r} looks at rows before it trains",
                allowed="a session of its own for such an adapter",
            )
        sessions[name] = Session(
            base,
            tokenizer,
            renderer,
            quantizer=packed,
            adapter=chosen,
            objective=aim,
            optimizer=choose("optimizers", Optimizer, optimizer[name] if isinstance(optimizer, Mapping) else optimizer),
            name=name,
            batcher=batcher,
        )
    return SeveralSession(sessions, batcher)
