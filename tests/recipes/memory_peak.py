"""Predicted and measured memory of training, in a process of its own; run as a program by `test_memory.py`.

    python tests/recipes/memory_peak.py '{"hidden": 256, "layers": 6, "tokens": 1024, "adapter": "lora"}'

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
    from transformers import AutoModelForCausalLM, LlamaConfig

    from luthier.adapters import Adapter
    from luthier.core.chosen import choose
    from luthier.kernels import pool
    from luthier.model import attention
    from luthier.model.language_model import LanguageModel
    from luthier.objectives.sft import SFT
    from luthier.optimizers import Optimizer
    from luthier.recipes.memory import largest_pass, lasting, work_of
    from luthier.train.rehearsal import rehearse
    from luthier.train.source import DataSource
    from luthier.train.stepper import Stepper
    from tests import forests

    torch.set_num_threads(1)
    attention.register()
    pool.bound_caches()
    pooled = given.get("pooled", True) and not pool.install()
    hidden, tokens, longest = given["hidden"], given["tokens"], given.get("longest", 256)
    dtype = getattr(torch, given.get("precision", "float32"))

    def made(hidden: int, layers: int) -> LanguageModel:
        config = LlamaConfig(
            vocab_size=given.get("vocabulary", 4096), hidden_size=hidden,
            intermediate_size=given.get("inner", 8 * hidden // 3),
            num_hidden_layers=layers, num_attention_heads=hidden // 32,
            num_key_value_heads=given.get("key_value_heads", 2), tie_word_embeddings=True,
            max_position_embeddings=4096,
        )  # fmt: skip
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()
        return LanguageModel(module, source="fresh", digest="")

    # Libraries load and compile what they need with a small model, which is no part of what is predicted.
    small = made(64, 1)
    small.attach(choose("adapters", Adapter, given["adapter"]).attach(small.sites))
    forests.engine_loss(small, forests.rows(2)).backward()
    del small
    before = _status("VmRSS")
    model = made(hidden, given["layers"])
    attachment = model.attach(choose("adapters", Adapter, given["adapter"]).attach(model.sites))
    model.recompute(given.get("recomputed", 0))
    method = choose("optimizers", Optimizer, given.get("optimizer", "adamw"))
    clip = None if method.steps_in_backward else 1.0
    stepper = Stepper(model, attachment, SFT(), method, micro_tokens=tokens, max_grad_norm=clip)
    views = forests.views(2 * tokens // longest + 8, shortest=longest // 4, longest=longest)
    source = DataSource(views, SFT(), lengths=forests.lengths(views), seed=0, tokens=2 * tokens)
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
    works = [work_of(model, attachment, batch, 1.0) for batch in source.largest_micro_batches(tokens, 100)]
    planned = largest_pass(model, works, given.get("recomputed", 0), pooled=pooled)
    fixed = lasting(model, attachment, stepper.method)
    return {
        **given,
        "predicted": sum(fixed.values()) + planned.bytes,
        "measured": _status("VmHWM") - before,
        "pass": planned.bytes,
        "rehearsed": rehearsal.tokens,
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
