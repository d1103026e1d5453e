"""What `import luthier` offers: fine-tuning as a call, sessions for own loops, and every method by its class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.adapters import Adapter
from luthier.core.knobs import validate
from luthier.model.speaker import Sampling
from luthier.objectives import Objective
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.finetune import start
from luthier.recipes.opening.opened import open_named
from luthier.recipes.progress import progress
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.schedules import Schedule

Knobs = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, which it is the path of, its summary, and its model to ask."""

    path: Path
    summary: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.path)

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the tuned model answers to these user messages."""
        opened = open_named(str(self.path), speaks=True)
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_ids=opened.stop_ids
        )
        spoken = opened.engine.speak([opened.prompt(prompt) for prompt in prompts], sampling)
        return [opened.text(answer.tokens) for answer in spoken]


def finetune(
    *,
    model: str,
    data: str | Path | Sequence[str | Path] | Knobs,
    adapter: Adapter | str | Knobs = "lora",
    quantizer: Quantizer | str | Knobs = "none",
    objective: Objective | str | Knobs = "sft",
    optimizer: Optimizer | str | Knobs = "adamw",
    schedule: Schedule | str | Knobs = "cosine",
    budget: Knobs | None = None,
    batch: Knobs | None = None,
    evaluation: Knobs | None = None,
    checkpoint: Knobs | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "auto",
    seed: int = 0,
    run: str | Path | None = None,
    quiet: bool = False,
) -> Run:
    """Fine-tune `model` on `data`; the same as `luthier train` with these keys. Progress goes to stderr.

    Raises LuthierError subclasses with what came, what is allowed and what to do.
    """
    paths = [str(path) for path in data] if isinstance(data, Sequence) and not isinstance(data, str) else data
    values: dict[str, Any] = {
        "model": model,
        "data": str(paths) if isinstance(paths, Path) else paths,
        "adapter": adapter,
        "quantizer": quantizer,
        "objective": objective,
        "optimizer": optimizer,
        "schedule": schedule,
        "precision": precision,
        "device": device,
        "seed": seed,
    }
    optional = {"budget": budget, "batch": batch, "evaluation": evaluation, "checkpoint": checkpoint}
    values |= {key: dict(value) for key, value in optional.items() if value is not None}
    if run is not None:
        values["run"] = str(run)
    recipe = validate(FinetuneRecipe, values)
    with progress(quiet=quiet) as recorder:
        result = start(recipe, recorder=recorder)
    return Run(result.path, result.summary)
