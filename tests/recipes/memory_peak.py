"""Predicted and measured memory of training, in a process of its own; run as a program by `test_memory.py`.

    python tests/recipes/memory_peak.py '{"hidden": 256, "layers": 6, "tokens": 1024, "adapter": "lora"}'
    python tests/recipes/memory_peak.py '{..., "architecture": "t5", "objective": "t_few", "dropout": 0.1}'

prints {"predicted": bytes, "measured": bytes, ...}: what the plan's formulas say (without the copy of a checkpoint, as
none is made), and by how much the resident memory of the process grew from before the model was made to the peak of
several passes over the largest micro-batch, the optimizer's state being there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PASSES = 4
"""A heap has grown to its size only after some."""


def main(given: dict[str, Any]) -> dict[str, Any]:
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "src")]
    import torch

    from luthier.adapters import Adapter
    from luthier.core.chosen import choose
    from luthier.data.forest import Forest
    from luthier.kernels import pool
    from luthier.model.attending import attention
    from luthier.objectives import Objective, Vocabulary
    from luthier.optimizers import Optimizer
    from luthier.recipes.sizing.memory import lasting, passes_of
    from luthier.train.rehearsal import rehearse
    from luthier.train.source import DataSource
    from luthier.train.stepper import Stepper
    from tests import forests
    from tests.recipes.peak_models import SPECIAL, VOCABULARY, model_for, views_for
    from tests.task_models import with_reference

    torch.set_num_threads(1)
    attention.register()
    pool.bound_caches()
    pooled = given.get("pooled", True) and not pool.install()
    tokens, longest = given["tokens"], given.get("longest", 256)
    objective = choose("objectives", Objective, given.get("objective", "sft"))
    objective = objective.with_vocabulary(Vocabulary(given.get("vocabulary", VOCABULARY), mask_id=SPECIAL))
    adapter = choose("adapters", Adapter, given["adapter"])
    method = choose("optimizers", Optimizer, given.get("optimizer", "adamw"))
    clip = None if method.steps_in_backward else 1.0

    # Libraries load and compile what they need with a small model, which is no part of what is predicted.
    small = model_for({**given, "hidden": 64, "layers": 1}, objective)
    small.attach(adapter.attach(small.sites))
    trees = [tree for view in views_for(objective, 2, longest=8) for tree in objective.trees(view)]
    trees = with_reference(trees) if objective.reference else trees
    objective.loss(small.token_outputs(Forest(tuple(trees))), Forest(tuple(trees))).sum.backward()
    del small
    before = _status("VmRSS")
    model = model_for(given, objective)
    attachment = model.attach(adapter.attach(model.sites))
    model.recompute(given.get("recomputed", 0))
    stepper = Stepper(model, attachment, objective, method, micro_tokens=tokens, max_grad_norm=clip)
    views = views_for(objective, 2 * tokens // longest + 8, longest=longest)
    source = DataSource(views, objective, lengths=forests.lengths(views), seed=0, tokens=2 * tokens)
    stepper.forward_backward(source.objective.trees(views[0])[:1])
    stepper.optim_step()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(PASSES):
        rehearsal = rehearse(stepper, source, 100)
        if stepper.in_backward is not None:
            # There the steps are part of the pass.
            for batch in source.largest_micro_batches(tokens, 100):
                stepper.forward_backward(source.trees_of(batch))
                stepper.optim_step()
    measured = _status("VmHWM") - before
    batches = source.largest_micro_batches(tokens, 100)
    forested = {batch: Forest(tuple(source.trees_of(batch))) for batch in batches}
    recomputed = given.get("recomputed", 0)
    told_by_config = given.get("architecture", "llama") == "llama" and given.get("objective", "sft") == "sft"
    planned = passes_of(model, attachment, forested, [recomputed], pooled=pooled)[recomputed]
    fixed = lasting(model, attachment, stepper.method)
    return {
        **given,
        "predicted": sum(fixed.values()) + planned.bytes,
        "measured": measured,
        "pass": planned.bytes,
        "fixed": sum(fixed.values()),
        "by_config": by_config(model, adapter, stepper.method, recomputed, planned.tokens) if told_by_config else 0,
        "rehearsed": rehearsal.tokens,
    }


def by_config(model: Any, adapter: Any, optimizer: Any, recomputed: int, tokens: int) -> int:
    """What the plan by the model's config alone says, for rows of one length that fill the micro-batch."""
    import tempfile

    from luthier.recipes.planning.plan import PlanKnobs, lay

    precision = "bfloat16" if model.dtype.itemsize == 2 else "float32"
    knobs = PlanKnobs(
        adapter=adapter, optimizer=optimizer, precision=precision, device="cpu", sequence=256, recompute=recomputed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config.to_diff_dict(), default=str))
        laid = lay(Path(folder) / "config.json", knobs)
    needed = laid.needed(max(1, round(tokens / 256)), 256, None)
    # No checkpoint is written here.
    return needed["total"] - needed["saving"]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def tell(given: str) -> int:
    """What the program does, for one case as JSON."""
    print(json.dumps(main(json.loads(given))), flush=True)
    return 0


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
