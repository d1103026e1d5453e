"""What trl's own GRPO and RLOO trainers say of given log-probabilities: made once, kept in trl_policies.json beside it.

trl is no dependency of the tests. Where it is installed, this makes the file again:
    python tests/peers/trl_policies.py > tests/peers/trl_policies.json
The file was made with trl 1.16.0 and torch 2.13.0 (CPU); beside each loss stands its gradient in the log-probabilities.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from trl_preferences import Accelerator, stand_in

GROUPS = ((4, 2, 3), (1, 6, 5))
"""Tokens of each answer of two groups."""
LONGEST = 6
CORRECTION = 2.0
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "corrected": {"loss_type": "grpo", "beta": 0.04, "use_vllm": True},
}
"""What sets trl to each of the kin, as their papers have them."""


class OneProcess(Accelerator):
    """What these trainers ask of it besides."""

    num_processes = 1

    def reduce(self, value: Any, **_how: Any) -> Any:
        return value


def advantages(rewards: Any, *, spread: bool, others: bool = False) -> Any:
    """As `_generate_and_score_completions` of both trainers makes them, group by group."""
    import torch

    found = []
    for group in rewards:
        centred = group - group.mean()
        if others:
            centred = centred * len(group) / (len(group) - 1)
        found.append(centred / (group.std() + 1e-4) if spread else centred)
    return torch.cat(found)


def main() -> None:
    import torch
    from trl import GRPOTrainer, RLOOTrainer

    draw = torch.Generator().manual_seed(3)
    sizes = [count for group in GROUPS for count in group]
    mask = torch.zeros(len(sizes), LONGEST, dtype=torch.long)
    for row, count in enumerate(sizes):
        mask[row, :count] = 1

    def drawn(near: Any = None, spread: float = 2.0) -> Any:
        base = torch.rand(mask.shape, generator=draw).neg() * spread if near is None else near
        noise = 0 if near is None else (torch.rand(mask.shape, generator=draw) - 0.5) * spread
        return (base + noise).clamp(max=-0.01) * mask

    new = drawn()
    old, reference, sampled = drawn(new, 0.8), drawn(new, 1.5), drawn(new, 0.6)
    rewards = [torch.rand(len(group), generator=draw).mul(4).round() / 4 for group in GROUPS]
    nothing = torch.zeros(mask.shape)

    def losses(trainer: type, inputs: dict[str, Any], **own: Any) -> dict[str, Any]:
        said = new.clone().requires_grad_()
        made = stand_in(
            trainer, epsilon_low=own.pop("epsilon_low", 0.2), epsilon_high=own.pop("epsilon_high", 0.2),
            importance_sampling_level=own.pop("importance_sampling_level", "token"), beta=own.pop("beta", 0.0),
            use_vllm=own.pop("use_vllm", False), vllm_importance_sampling_correction=True, top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, max_completion_length=LONGEST, current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False, **own,
        )  # fmt: skip
        made.accelerator = OneProcess()
        made.args = SimpleNamespace(
            use_bias_correction_kl=False, delta=None, steps_per_generation=1, gradient_accumulation_steps=1
        )
        made._get_per_token_logps_and_entropies = lambda *_, **__: (said, nothing, None)
        loss = made._compute_loss(None, inputs)
        loss.backward()
        return {"loss": float(loss.detach()), "gradient": said.grad.tolist()}

    common = {
        "prompt_ids": torch.zeros(len(sizes), 1), "prompt_mask": torch.ones(len(sizes), 1),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "old_per_token_logps": old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": (old - sampled).exp().clamp(max=CORRECTION),
    }  # fmt: skip
    found: dict[str, Any] = {
        "groups": GROUPS, "longest": LONGEST, "correction": CORRECTION, "new": new.tolist(), "old": old.tolist(),
        "reference": reference.tolist(), "sampled": sampled.tolist(), "rewards": [each.tolist() for each in rewards],
    }  # fmt: skip
    for name, own in PRESETS.items():
        given = common | {"advantages": advantages(rewards, spread=name != "dr_grpo")}
        found[name] = losses(GRPOTrainer, given, **own)
    given = common | {"advantages": advantages(rewards, spread=False, others=True), "old_logps": (old * mask).sum(1)}
    found["rloo"] = losses(RLOOTrainer, given)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
