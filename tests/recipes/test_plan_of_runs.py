"""The plan of a recipe against the peak that `luthier train` writes into a run's summary, for whole runs.

A process holds an interpreter and its libraries besides what is planned. So two runs are compared that differ in the
size of their model: the plan has to say by how much their peaks differ. Both write a checkpoint after each step, from a
copy that lies beside the next one's pass; or only one at the end, whose copy lies where passes were.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.commands import environ
from tests.tiny import VOCABULARY, tiny_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "full": {"adapter": "full"},
    "full, saved at the end": {"adapter": "full", "checkpoint": {"every": 0}},
    "lora, saved at the end": {"adapter": "lora", "checkpoint": {"every": 0}},
    "ia3": {"adapter": "ia3"},
    "qlora": {"adapter": "lora", "quantizer": "nf4", "optimizer": "paged_adamw"},
    "lora, all blocks made again": {"adapter": "lora", "batch": {"micro_tokens": 2048, "recompute": "all"}},
}


def folder_of(parent: Path, hidden: int, layers: int) -> Path:
    """A folder with the config and the tokenizer of a llama of some size; a run draws its weights."""
    import transformers

    folder = parent / f"llama-{hidden}-{layers}"
    transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def recipe_of(folder: Path, model: Path, name: str) -> Path:
    rows = folder / "rows.jsonl"
    text = "the shop is open and the cat is in the house. " * 6
    rows.write_text("".join(json.dumps({"prompt": f"row {n}", "completion": text}) + "\n" for n in range(64)), "utf-8")
    recipe = {
        "model": f"fresh:{model}", "data": str(rows), "precision": "float32", "device": "cpu",
        "batch": {"micro_tokens": 2048}, "budget": {"steps": 4}, "evaluation": {"fraction": 0.0},
        "checkpoint": {"every": 1}, **METHODS[name],
    }  # fmt: skip
    path = folder / f"{model.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def said(*words: object) -> dict[str, Any]:
    program = "from luthier.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=False, env=environ(),
        timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_planned_for_a_recipe_is_what_its_run_takes(tmp_path: Path, name: str) -> None:
    """Breaks when a run takes a tenth more or less than `luthier plan` says before it."""
    told, taken = [], []
    for hidden, layers in ((64, 1), (384, 6)):
        recipe = recipe_of(tmp_path, folder_of(tmp_path, hidden, layers), name)
        told.append(said("plan", recipe, "--json")["memory"])
        run = said("train", recipe, "--run", tmp_path / f"run-{hidden}", "--json", "--quiet")
        taken.append(run["peak_memory_bytes"])
    # Products of the small model are so small that libraries take nothing for them: 15 MB less than the plan says.
    predicted = told[1]["total"] - (told[0]["total"] - told[0]["libraries"])
    measured = taken[1] - taken[0]
    print(f"{name}: planned {predicted:,}, taken {measured:,} ({predicted / measured - 1:+.1%})")
    assert predicted == pytest.approx(measured, rel=0.1), (told, taken)
