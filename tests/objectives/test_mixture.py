"""Mixture: each row is learned from by the objective it is for, and weighs what it shall, whatever lies beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.data.forest import Tree
from luthier.objectives import Objective
from luthier.objectives.dpo import DPO
from luthier.objectives.mixture import Mixture
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.stepper import Stepper
from tests import forests, task_models
from tests.cli.commands import luthier


def stepper(method: Objective, *, micro_tokens: int = 4096) -> Stepper:
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach(LoRA().attach(model.sites))
    forests.shake(attachment.named_parameters().values(), seed=1, std=0.05)
    return Stepper(model, attachment, method, AdamW(), micro_tokens=micro_tokens, max_grad_norm=None)


def made(**knobs: Any) -> Mixture:
    found = choose("objectives", Objective, {"method": "mixture", **knobs})
    assert isinstance(found, Mixture)
    return found


def trees(method: Objective, count: int = 6) -> list[Tree]:
    return [tree for view in task_models.views_for(made(), count) for tree in method.trees(view)]


@pytest.mark.parametrize("micro_tokens", [4096, 1])
def test_loss_and_gradient_are_those_of_both_together(micro_tokens: int) -> None:
    """Breaks when rows of one kind are learned from by the other objective, or weigh by their length."""
    method = made(share=0.4, compared={"method": "dpo", "beta": 0.5})
    views = task_models.views_for(method, 6)
    plain = [each for each in views if each.answers is None]
    answered = [each for each in views if each.answers is not None]
    ours = stepper(method, micro_tokens=micro_tokens)
    report = ours.forward_backward([tree for view in views for tree in method.trees(view)])
    assert report.weight == pytest.approx(0.4 * len(plain) + len(answered))
    pairs = stepper(DPO(beta=0.5))
    of_pairs = pairs.forward_backward([tree for view in answered for tree in DPO().trees(view)])
    expected, gradients = of_pairs.loss_sum, {n: _grad(p) for n, p in pairs.parameters.items()}
    for view in plain:
        alone = stepper(SFT())
        found = alone.forward_backward(SFT().trees(view))
        expected += 0.4 * found.loss
        for name, parameter in alone.parameters.items():
            gradients[name] = gradients[name] + 0.4 / found.weight * _grad(parameter)
    assert report.loss_sum == pytest.approx(expected, rel=1e-5)
    for name, parameter in ours.parameters.items():
        assert forests.relative_error(_grad(parameter), gradients[name]) < 1e-4, name
    assert {"accuracy", "said_loss", "compared_loss"} <= set(report.metrics)
    assert sum(loss for loss, _ in report.row_losses.values()) == pytest.approx(report.loss_sum, rel=1e-5)


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def test_only_trees_that_need_a_reference_refer_to_one() -> None:
    """Breaks when conversations go through the model once more for nothing."""
    method = made()
    assert method.reference and [method.refers(tree) for tree in trees(method)] == [False, True] * 3
    assert not made(compared="orpo").reference
    assert method.meanings == ("conversation", "text", "preference")


def test_a_point_of_reference_is_that_of_judged_rows() -> None:
    """Breaks when the order of trees is lost, or a conversation is taken for an answer to judge."""
    method = made(compared="kto")
    plain = [tree for tree in trees(method, 6) if len(tree.segments) == 1]
    rng = np.random.default_rng(0)
    views = [task_models.answered(view, rng, answers=1) for view in forests.views(3, seed=9)]
    judged = [tree for view in views for tree in method.trees(view)]
    mixed = [plain[0], judged[0], plain[1], *judged[1:]]
    assert len(method.probes(mixed)) == 3
    told = method.informed(mixed, 0.7)
    assert [len(tree.segments) for tree in told] == [1, 2, 1, 2, 2]
    assert all("value" in (tree.segments[1].notes or {}) for tree in told if len(tree.segments) == 2)


ODD = [{"compared": "sft"}, {"said": "dpo"}, {"compared": "reward_model"}, {"said": "seq2seq"}]


@pytest.mark.parametrize("knobs", ODD)
def test_objectives_that_do_not_go_together_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="allowed|learns from|one of two"):
        made(**knobs)


def test_a_run_of_two_files(llama_path: Path, tmp_path: Path) -> None:
    """Breaks when a file of conversations cannot lie beside one of pairs, or the mixture is not proved."""
    files = [tmp_path / "said.jsonl", tmp_path / "pairs.jsonl"]
    said = [{"prompt": f"What is {n}?", "completion": f"A number, {n}."} for n in range(12)]
    pairs = [{"prompt": f"Is {n} even?", "chosen": "I do not know.", "rejected": "YES!"} for n in range(12)]
    for path, rows in zip(files, (said, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": str(llama_path), "data": {"train": [str(path) for path in files]}, "budget": {"steps": 4},
        "objective": {"method": "mixture", "share": 0.5, "compared": {"method": "dpo", "beta": 0.3}},
        "batch": {"rows": 6}, "evaluation": {"fraction": 0.25}, "precision": "float32",
        "optimizer": {"method": "adamw", "learning_rate": 0.01},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    luthier("train", tmp_path / "recipe.yaml", "--run", tmp_path / "run").must(0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["proof"]["reloaded_loss"] == pytest.approx(summary["loss"]["eval"], rel=1e-5)
    assert {"said_loss", "compared_loss", "accuracy"} <= set(summary["metrics"])
    assert "said_loss" in luthier("eval", tmp_path / "run").must(0).out


@pytest.fixture(scope="module")
def llama_path(tiny_path: Any) -> Path:
    path = tiny_path("llama")
    assert isinstance(path, Path)
    return path
