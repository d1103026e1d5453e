"""Reference log-probabilities kept on disk: what would be found in every step, whatever a kill has left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.core.errors import CorruptError
from luthier.objectives import Objective
from luthier.objectives.dpo import DPO
from luthier.objectives.kto import KTO
from luthier.objectives.mixture import Mixture
from luthier.optimizers.adamw import AdamW
from luthier.store.files import read_json, write_json
from luthier.train import reference_cache
from luthier.train.reference_cache import COLUMN, FACTS, ReferenceCache, remembered
from luthier.train.source import DataSource
from luthier.train.stepper import Stepper
from tests import forests, task_models

FACT = {"base": "a", "objective": {"method": "dpo"}}


def stepper_for(objective: Objective) -> Stepper:
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach(LoRA().attach(model.sites))
    forests.shake(attachment.named_parameters().values(), seed=1)
    return Stepper(model, attachment, objective, AdamW(learning_rate=1e-2), micro_tokens=48)


def kept(folder: Path, stepper: Stepper, rows: Any, **facts: Any) -> ReferenceCache:
    return remembered(
        folder, stepper, rows, facts={**FACT, **facts}, micro_tokens=48, write=write_json, read=read_json
    )


@pytest.mark.parametrize("objective", [DPO(), KTO(), Mixture()], ids=["dpo", "kto", "mixture"])
def test_losses_are_those_without_it(objective: Objective, tmp_path: Path) -> None:
    """Breaks when what is kept is that of another row, another answer, or of the policy with its adapter."""
    losses = []
    views = task_models.views_for(objective, 7)
    for cached in (False, True):
        stepper = stepper_for(objective)
        source = DataSource(views, objective, lengths=forests.lengths(views), seed=3, rows=3)
        if cached:
            cache = kept(tmp_path / "reference", stepper, views)
            source.note = lambda index, trees, cache=cache: cache.on(index, trees, objective)  # type: ignore[misc]
        own = []
        for _ in range(5):
            trees = source.next_step()
            noted = [any("reference" in (each.notes or {}) for each in tree.segments) for tree in trees]
            assert noted == [cached and objective.refers(tree) for tree in trees]
            own.append(stepper.forward_backward(trees).loss)
            stepper.optim_step()
        losses.append(own)
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-6, rtol=1e-5)


def test_a_kill_leaves_what_is_found_again_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when half a block is taken for a whole one, or a block depends on those before it."""
    monkeypatch.setattr(reference_cache, "BLOCK", 2)
    objective = DPO()
    views, stepper, folder = task_models.views_for(objective, 7), stepper_for(objective), tmp_path / "reference"
    whole = kept(folder, stepper, views)
    assert whole.found == 7
    bits = (folder / COLUMN).read_bytes()
    assert kept(folder, stepper, views).found == 0
    facts = read_json(folder / FACTS)
    write_json(folder / FACTS, {key: value for key, value in facts.items() if key != "digest"})
    (folder / COLUMN).write_bytes(bits[: int(whole.offsets[5]) * 4 + 3])
    again = kept(folder, stepper, views)
    assert again.found == 3 and (folder / COLUMN).read_bytes() == bits
    assert read_json(folder / FACTS) == facts


def test_what_is_damaged_is_refused_and_what_is_of_another_base_made_anew(tmp_path: Path) -> None:
    """Breaks when a flipped bit is trained on, or what another model said."""
    objective = DPO()
    views, stepper, folder = task_models.views_for(objective, 3), stepper_for(objective), tmp_path / "reference"
    cache = kept(folder, stepper, views)
    bits = bytearray((folder / COLUMN).read_bytes())
    assert kept(folder, stepper, views, base="b").found == 3
    with pytest.raises(CorruptError, match="row 0 has"):
        cache.on(0, objective.trees(views[1]), objective)
    bits[5] ^= 1
    (folder / COLUMN).write_bytes(bytes(bits))
    with pytest.raises(CorruptError, match="is not what the run has written"):
        kept(folder, stepper, views, base="b")
