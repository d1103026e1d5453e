"""A step in a process whose memory is limited for real; run as a program by `test_memory.py`.

It prints the splits and ends with 0 when the limited step gave the loss and the gradient of an unlimited one.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

LAYERS, HIDDEN, TOKENS, ROW = 4, 64, 4096, 128


def main() -> int:
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "src")]
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from luthier.adapters.lora import LoRA
    from luthier.data.forest import row_tree
    from luthier.model.attending import attention
    from luthier.model.language_model import LanguageModel
    from luthier.objectives.sft import SFT
    from luthier.optimizers.adamw import AdamW
    from luthier.train.stepper import Stepper

    torch.set_num_threads(1)
    attention.register()
    config = LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    trees = [
        row_tree(rng.integers(3, 128, ROW).astype(np.int32), np.ones(ROW, dtype=np.float32), row=row)
        for row in range(TOKENS // ROW)
    ]

    def stepper() -> Stepper:
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
        model = LanguageModel(module, source="small", digest="")
        return Stepper(model, model.attach(LoRA().attach(model.sites)), SFT(), AdamW(), micro_tokens=TOKENS)

    limited, free = stepper(), stepper()
    limited.forward_backward(trees[:1])
    limited.zero_grad()
    # What a layer keeps for its backward pass, of which the limit lets about half be.
    kept = TOKENS * LAYERS * 4 * (7 * HIDDEN + HIDDEN + 4 * 4 * HIDDEN)
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + kept // 2, hard))
    found = limited.forward_backward(trees)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    expected = free.forward_backward(trees)
    print(f"splits {[(split.from_tokens, split.to_tokens, split.reason) for split in found.splits]}")
    if not found.splits or expected.splits or limited.micro_tokens >= TOKENS:
        print("the limit was never felt, or still is", file=sys.stderr)
        return 1
    pairs = [(limited.masters[name].grad, free.masters[name].grad) for name in free.masters]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs if theirs is not None)
    off = max(float((ours - theirs).abs().max()) for ours, theirs in pairs if ours is not None and theirs is not None)
    print(f"loss off by {abs(found.loss - expected.loss):.2e}, gradient by {off / largest:.2e} of its largest entry")
    done = limited.optim_step().applied and free.optim_step().applied
    return 0 if done and abs(found.loss - expected.loss) <= 1e-6 * expected.loss and off <= 1e-5 * largest else 1


if __name__ == "__main__":
    sys.exit(main())
