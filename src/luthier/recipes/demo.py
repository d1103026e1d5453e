"""The demo: in a minute or two on a laptop, the seedling learns to turn a sentence into strict JSON, and shows it.

It is an ordinary fine-tune: the rows are written to a file, the recipe is the one a user would write, the run is a run
like any other. Around it stand two measurements: exact match on held-out rows with names nobody has seen, before and
after, and the loss on the base's own kind of text, which tells what was forgotten.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.assets.demo_task import demo_rows, exact_match
from luthier.assets.world_documents import Document, documents
from luthier.core.events import Event, Recorder, plain
from luthier.core.knobs import validate
from luthier.data.conversation import Conversation, Message, Row, Text
from luthier.data.forest import Tree
from luthier.model.files.sources import SEEDLING
from luthier.model.speaker import Sampling
from luthier.objectives.language_model import LanguageModelling
from luthier.recipes.ending import SUMMARY
from luthier.recipes.finetune import finetune
from luthier.recipes.measuring import mean_loss
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.schemas.files import begin_run, place_of
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.store.files import write_json, write_text
from luthier.store.report import write_report
from luthier.store.runs import RunDirectory

TRAIN_ROWS = 2000
TEST_ROWS = 100
BASE_DOCUMENTS = 200
SHOWN = 3


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `line` is what `luthier demo --json` prints."""

    summary: dict[str, Any]
    before: float
    after: float
    forgetting: dict[str, float]
    examples: list[dict[str, str]]

    def line(self) -> dict[str, Any]:
        """The one line of `--json`."""
        return {
            "before": {"exact_match": self.before},
            "after": {"exact_match": self.after},
            "forgetting": self.forgetting,
            "train_seconds": self.summary["train_seconds"],
            "run": self.summary["run"],
        }


def recipe_of(folder: Path | None, rows: Path) -> FinetuneRecipe:
    """The recipe of the demo: what a user would write for a small model and a small file."""
    values = {
        "model": SEEDLING,
        "data": {"train": str(rows)},
        "adapter": {"method": "lora", "rank": 16, "alpha": 32.0},
        "optimizer": {"method": "adamw", "learning_rate": 3.0e-3},
        "schedule": {"method": "cosine", "warmup": 0.05},
        "batch": {"rows": 16},
        "budget": {"epochs": 1.0},
        "evaluation": {"fraction": 0.03, "every": 40, "max_new_tokens": 56},
        "checkpoint": {"every": 0},
        **({"run": str(folder)} if folder is not None else {}),
    }
    return validate(FinetuneRecipe, values)


def demo(folder: Path | None, *, recorder: Recorder) -> DemoResult:
    """Run the demo in a run directory."""
    RunDirectory.require_free(place_of(recipe_of(folder, Path("rows.jsonl"))))
    test = demo_rows(TEST_ROWS, seed=1, held_out=True)
    base = open_named(SEEDLING)
    recorder.record(Event("doing", {"what": f"asking the base model {len(test)} held-out questions"}))
    before, _ = measure(base, test)
    base_before = forgotten(base)
    with begin_run(recipe_of(folder, Path("rows.jsonl"))) as run:
        rows = run.folder / "rows.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in demo_rows(TRAIN_ROWS, seed=0, held_out=False)]
        write_text(rows, "\n".join(lines) + "\n")
        recipe = recipe_of(run.folder, rows)
        run.write_recipe(recipe.model_dump(mode="json", exclude_none=True))
        result = finetune(recipe, run, recorder=recorder)
    tuned = open_named(str(run.folder))
    recorder.record(Event("doing", {"what": "asking the tuned model the same questions"}))
    after, answers = measure(tuned, test)
    forgetting = {"before": base_before, "after": forgotten(tuned)}
    found = DemoResult(result.summary, before, after, forgetting, _examples(base, test, answers))
    extra = {"demo": {**found.line(), "forgetting": found.forgetting}}
    write_json(run.folder / SUMMARY, plain({**result.summary, **extra}))
    write_report(run.folder)
    return found


def measure(opened: Opened, rows: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """The share of rows that are answered exactly, and the answers."""
    prompts = [opened.prompt(row["messages"][0]["content"]) for row in rows]
    spoken = opened.engine.speak(prompts, Sampling(max_new_tokens=64, stop_ids=opened.stop_ids))
    answers = [opened.text(answer.tokens) for answer in spoken]
    hits = sum(exact_match(said, row["messages"][1]["content"]) for said, row in zip(answers, rows, strict=True))
    return hits / len(rows), answers


def forgotten(opened: Opened) -> float:
    """The loss on documents of the kind the base grew on, with names it has never seen."""
    return mean_loss(opened.model, LanguageModelling(), grown_on(opened))[0]


def grown_on(opened: Opened) -> list[Tree]:
    """Documents of the kind the seedling grew on, with names it has never seen."""
    objective = LanguageModelling()
    trees: list[Tree] = []
    for number, document in enumerate(itertools.islice(documents(1, held_out=True), BASE_DOCUMENTS)):
        row = Row(number, f"document {number}", _content(document))
        trees += [tree for view in opened.renderer.render(row) for tree in objective.trees(view)]
    return trees


def _content(document: Document) -> Conversation | Text:
    if not document.turns:
        return Text(document.text)
    return Conversation(tuple(Message(turn["role"], turn["content"]) for turn in document.messages))  # type: ignore[arg-type]


def _examples(base: Opened, rows: list[dict[str, Any]], answers: list[str]) -> list[dict[str, str]]:
    _, before = measure(base, rows[:SHOWN])
    return [
        {
            "prompt": row["messages"][0]["content"],
            "reference": row["messages"][1]["content"],
            "before": said_before,
            "after": said_after,
        }
        for row, said_before, said_after in zip(rows[:SHOWN], before, answers[:SHOWN], strict=True)
    ]
