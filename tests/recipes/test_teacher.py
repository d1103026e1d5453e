"""The teacher of a recipe: whose word is asked, what it reads, and a run that learns from it to its proof."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.core.knobs import validate
from luthier.data.conversation import Message
from luthier.data.forest import row_tree
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.model.load import resolve_source
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.recipes.teacher import front_of, require_same_tokens
from tests.cli.commands import events, luthier


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return make_renderer(Tokenizer.load(resolve_source("seedling")), Reading(), context_tokens=None)[0]


def test_a_prompt_stands_where_the_template_puts_a_system_message(renderer: Renderer) -> None:
    """Breaks when tokens are lost or doubled where the prompt and the conversation meet."""
    front = front_of(renderer, "Speak softly.")
    for talk in ([Message("user", "Where?")], [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]):
        bare = renderer.prompt_ids(talk)
        read = front.before(row_tree(bare, np.zeros(len(bare), np.float32)))
        told = renderer.prompt_ids([Message("system", "Speak softly."), *talk])
        assert read.segments[0].tokens.tolist() == told.tolist()
    own = renderer.prompt_ids([Message("system", "Shout."), Message("user", "Where?")])
    with pytest.raises(DataError, match="begins with tokens"):
        front.before(row_tree(own, np.zeros(len(own), np.float32)))


def test_a_teacher_of_another_vocabulary_is_refused(renderer: Renderer, llama: Path) -> None:
    """Breaks when tokens are compared by their numbers, which mean something else to the teacher."""
    other = Tokenizer.load(llama)
    require_same_tokens("it", renderer.tokenizer, "itself", renderer.tokenizer)
    with pytest.raises(RecipeError, match="stand elsewhere"):
        require_same_tokens("tiny", other, "seedling", renderer.tokenizer)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (ReinforceRecipe, {"objective": "distillation"}, "are empty"),
        (FinetuneRecipe, {"reference": {"model": "runs/x"}}, "from no teacher"),
        (FinetuneRecipe, {"reference": {"prompt": "Hi."}}, "from no teacher"),
        (FinetuneRecipe, {"objective": "distillation", "reference": {"prompt": "Hi."}}, "needs rollouts"),
        (ReinforceRecipe, {"objective": {"method": "distillation", "answers": "given", "divergence": "jsd"},
                           "reference": {"prompt": "Hi."}}, "learns from rows"),
        (ReinforceRecipe, {"objective": "grpo"}, "reward is empty"),
        (ReinforceRecipe, {"objective": "distillation", "reference": {"prompt": "Hi."},
                           "rollouts": {"redraws": 1}}, "redraws"),
        (FinetuneRecipe, {"reference": {"cache": True}}, "has no reference"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(kind: type[FinetuneRecipe], values: dict[str, object], said: str) -> None:
    """Breaks when a teacher is asked for nothing, or learned from without being named."""
    with pytest.raises(RecipeError, match=said):
        validate(kind, {"model": "seedling", "data": "rows.jsonl", **values})


RECIPE = """
recipe: {recipe}
model: {model}
data: {{train: {data}}}
reference: {{prompt: Speak in verse.}}
objective: {objective}
budget: {{steps: 2}}
evaluation: {{fraction: 0.4, prompts: 0}}
precision: float32
"""
SAMPLED = "{method: distillation}\nrollouts: {prompts: 2, answers: 2, max_new_tokens: 4, lag: 1}"
GIVEN = "{method: distillation, answers: given, divergence: jsd}\nbatch: {rows: 2}"


@pytest.mark.parametrize(("recipe", "objective"), [("reinforce", SAMPLED), ("finetune", GIVEN)])
def test_a_run_learns_from_a_teacher_and_is_proved(recipe: str, objective: str, tmp_path: Path, llama: Path) -> None:
    """Breaks when the process that proves the result asks another teacher, or none."""
    rows = [{"prompt": f"What is {number}?", "completion": "A number."} for number in range(6)]
    if recipe == "reinforce":
        rows = [{"prompt": row["prompt"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = RECIPE.format(recipe=recipe, model=llama, data=tmp_path / "rows.jsonl", objective=objective)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    luthier("train", tmp_path / "recipe.yaml", "--run", tmp_path / "run", "--json").must(0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["proof"]["reloaded_loss"] == pytest.approx(summary["loss"]["eval"], rel=1e-5)
    held = [each for each in events(tmp_path / "run") if each["kind"] == "evaluation"]
    assert held[0]["loss"] > 0 and held[0]["rows"] == 2 and held[0]["kl"] == pytest.approx(held[0]["loss"], rel=1e-4)
