"""`luthier probe RUN` for every kind of run: each probe measures, or says in a sentence why it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.core import catalog
from luthier.recipes.opening.opened import open_named
from luthier.recipes.probing.probed import probed_run
from luthier.recipes.progress import Silent
from luthier.store.runs import RunDirectory
from tests.cli.commands import luthier, write_rows
from tests.task_folders import bert_folder
from tests.tiny import VOCABULARY

ROWS: dict[str, list[dict[str, Any]]] = {
    "rows": [{"prompt": f"the colour of {n} is", "completion": "red"} for n in range(16)],
    "pairs": [{"prompt": f"the colour of {n} is", "chosen": "red", "rejected": "blue green"} for n in range(16)],
    "texts": [{"text": f"the colour of {n} is red"} for n in range(16)],
    "classes": [{"text": f"the colour of {n} is red", "label": ("good", "bad")[n % 2]} for n in range(16)],
    "prompts": [{"prompt": f"the colour of {n} is", "answer": "red"} for n in range(16)],
}
FEW: dict[str, Any] = {
    "precision": "float32", "budget": {"steps": 2}, "batch": {"rows": 4}, "checkpoint": {"every": 0},
    "evaluation": {"fraction": 0.25, "every": 0, "prompts": 1, "max_new_tokens": 8},
    "optimizer": {"method": "adamw", "learning_rate": 0.01},
}  # fmt: skip
REWARDED: dict[str, Any] = {
    "recipe": "reinforce", "objective": "grpo", "rollouts": {"prompts": 2, "answers": 4, "max_new_tokens": 12},
    "reward": [{"method": "length", "most_tokens": 12, "buffer_tokens": 10}],
}  # fmt: skip
MATRICES = {"drift", "effective_rank", "intruder_dimensions", "spectrum"}
SLOW = pytest.mark.slow
KINDS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "full": ("rows", {"adapter": "full"}, {"alpha_rank"}),
    "ia3": ("rows", {"adapter": "ia3"}, {"alpha_rank"}),
    "bottleneck": ("rows", {"adapter": "bottleneck"}, {"alpha_rank", *MATRICES}),
    "prompt_tuning": ("rows", {"adapter": "prompt_tuning"}, {"alpha_rank", "attention", *MATRICES}),
    "prefix_tuning": ("rows", {"adapter": "prefix_tuning"}, {"alpha_rank", "attention", *MATRICES}),
    "qlora": ("rows", {"quantizer": "nf4"}, set()),
    "dpo": ("pairs", {"objective": "dpo"}, set()),
    "dpo of all weights": ("pairs", {"objective": "dpo", "adapter": "full"}, {"alpha_rank"}),
    "grpo": ("prompts", REWARDED, {"gradient_noise"}),
    "grpo of all weights": ("prompts", {**REWARDED, "adapter": "full"}, {"gradient_noise", "alpha_rank"}),
    "nothing held out": ("rows", {"evaluation": {"fraction": 0.0}}, set()),
    "classification": ("classes", {"objective": "classification"}, {"attention"}),
    "masked_lm": ("texts", {"objective": "masked_lm"}, {"attention"}),
}
"""Its rows, what its recipe says, and the probes that cannot look at it."""
ENCODERS = ("classification", "masked_lm")
FAST = ("prompt_tuning", "grpo of all weights", "masked_lm")
"""What broke once; what the other tests look at is a LoRA with rows."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def trained(llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    def train(kind: str) -> Path:
        name, more, _ = KINDS[kind]
        rows = write_rows(tmp_path / "rows.jsonl", ROWS[name])
        model = request.getfixturevalue("bert") if kind in ENCODERS else llama
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"model": str(model), "data": str(rows), **FEW, **more}), "utf-8")
        luthier("train", recipe, "--run", tmp_path / "run", "--quiet").must(0)
        return tmp_path / "run"

    return train


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else SLOW) for kind in KINDS])
def test_each_probe_measures_or_says_why_not(kind: str, trained: Callable[[str], Path]) -> None:
    """Breaks when a probe ends in an error for a kind of run, or no longer looks at what it could."""
    names = catalog.names("probes")
    found = luthier("probe", trained(kind), *(word for name in names for word in ("--probe", name)), "--json").must(0)
    reports = found.json["probes"]
    assert set(reports) == set(names)
    assert {name for name, report in reports.items() if not report["measured"]} == KINDS[kind][2]
    assert all(report["verdict"][0].endswith(".") for report in reports.values())
    if KINDS[kind][2] >= MATRICES:
        assert f"{kind} works beside them" in reports["drift"]["verdict"][0]


def test_a_run_taught_by_rewards_is_asked_about_what_it_answered(trained: Callable[[str], Path]) -> None:
    """Breaks when answers are put behind other prompts than theirs, or count as something that was kept."""
    run = RunDirectory.open(trained("grpo"))
    probed = probed_run(run, recorder=Silent())
    assert [(text.name, text.kind) for text in probed.pair.texts] == [
        ("the base's answers", "said"), ("the tuned model's answers", "said")
    ]  # fmt: skip
    samples = list(run.samples.read())
    tokenizer = open_named(str(run.folder)).tokenizer
    plain = [tokenizer.decode([int(token) for token in ids if int(token) not in tokenizer.special_ids])
             for ids in probed.pair.samples]  # fmt: skip
    assert plain[0].strip() == samples[0]["prompt"].strip() and len(plain) == 4
    with probed.pair.before() as model:
        before = [text.loss(model) for text in probed.pair.texts]
    with probed.pair.after() as model:
        after = [text.loss(model) for text in probed.pair.texts]
    # Greedy answers are likelier to whoever gave them than tokens drawn from all there are.
    assert before[0] < math.log(VOCABULARY) - 1 and after[0] != before[0] and after[1] != before[1]
