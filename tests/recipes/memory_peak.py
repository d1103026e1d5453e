"""Predicted and measured memory of one rehearsal, in a process of its own; run as a program by `test_memory.py`.

    python tests/recipes/memory_peak.py '{"hidden": 192, "layers": 6, "tokens": 1024, "adapter": "lora"}'

prints {"predicted": bytes, "measured": bytes, ...}: the activations and the head's chunk by the plan's formulas, and by
how much the resident memory of the process grew while the largest micro-batch went forward and backward.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(given: dict[str, Any]) -> dict[str, Any]:
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "src")]
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from luthier.adapters import Adapter
    from luthier.core.chosen import choose
    from luthier.model import attention
    from luthier.model.language_model import LanguageModel
    from luthier.objectives.sft import SFT
    from luthier.optimizers.adamw import AdamW
    from luthier.recipes.memory import peak_of
    from luthier.train.rehearsal import rehearse
    from luthier.train.source import DataSource
    from luthier.train.stepper import Stepper
    from tests import forests

    torch.set_num_threads(1)
    attention.register()
    hidden, tokens, longest = given["hidden"], given["tokens"], given.get("longest", 256)
    config = LlamaConfig(
        vocab_size=given.get("vocabulary", 4096), hidden_size=hidden,
        intermediate_size=given.get("inner", 8 * hidden // 3),
        num_hidden_layers=given["layers"], num_attention_heads=hidden // 32,
        num_key_value_heads=given.get("key_value_heads", 2), tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    dtype = getattr(torch, given.get("precision", "float32"))
    module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()
    model = LanguageModel(module, source="fresh", digest="")
    attachment = model.attach(choose("adapters", Adapter, given["adapter"]).attach(model.sites))
    stepper = Stepper(model, attachment, SFT(), AdamW(), micro_tokens=tokens)
    # The optimizer's state and all gradients are there, as in the middle of a run: only the pass itself is measured.
    views = forests.views(2 * tokens // longest + 8, shortest=longest // 4, longest=longest)
    source = DataSource(views, SFT(), lengths=forests.lengths(views), seed=0, tokens=2 * tokens)
    stepper.forward_backward(source.objective.trees(views[0])[:1])
    stepper.optim_step()
    for master in stepper.masters.values():
        master.grad = torch.zeros_like(master)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    rehearsal = rehearse(stepper, source, 100)
    batches = source.largest_micro_batches(tokens, 100)
    activations, head, _ = max(peak_of(model, attachment, batch, 1.0) for batch in batches)
    return {
        **given,
        "predicted": activations + head,
        "measured": _status("VmHWM") - before,
        "rehearsed": rehearsal.tokens,
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
