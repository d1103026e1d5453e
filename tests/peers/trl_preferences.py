"""What trl's own loss functions say of given log-probabilities: made once, kept in trl_preferences.json beside it.

trl is no dependency of the tests. Where it is installed, this makes the file again:
    python tests/peers/trl_preferences.py > tests/peers/trl_preferences.json
The file was made with trl 1.16.0 and torch 2.13.0 (CPU).
"""

from __future__ import annotations

import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

SIZES = ((3, 5), (6, 2), (4, 4), (1, 6))
"""Tokens of the chosen and of the rejected answer of each pair."""


class Accelerator:
    """One process."""

    device = "cpu"

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather

    def unwrap_model(self, model: Any) -> Any:
        return model


def stand_in(trainer: type, **own: Any) -> Any:
    """A trainer that was never built: what its loss reads of it."""
    made = object.__new__(trainer)
    made.__dict__.update(
        accelerator=Accelerator(), model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, args=MagicMock(), _total_train_tokens=0, _tp_size=1, **own,
    )
    return made


class Told:
    """A model that says the log-probabilities it was told."""

    def __init__(self, log_probs: Any) -> None:
        self.log_probs = log_probs

    def __call__(self, **given: Any) -> Any:
        import torch

        shape = self.log_probs.shape
        nothing = torch.zeros(shape)
        return SimpleNamespace(
            log_probs=self.log_probs, entropy=nothing, mean_logits=nothing, loss=torch.zeros(()),
            is_top1=torch.zeros(shape, dtype=torch.bool),
        )


def main() -> None:
    import torch
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    draw = torch.Generator().manual_seed(0)
    width = 1 + max(max(pair) for pair in SIZES)
    order = [pair[0] for pair in SIZES] + [pair[1] for pair in SIZES]
    mask = torch.zeros(len(order), width, dtype=torch.long)
    for row, count in enumerate(order):
        mask[row, 1 : 1 + count] = 1
    policy, reference = (
        -torch.rand(len(order), width - 1, generator=draw).double().mul(3).float() * mask[:, 1:] for _ in range(2)
    )
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    found: dict[str, Any] = {"sizes": SIZES, "policy": policy.tolist(), "reference": reference.tolist(), "dpo": []}
    sums, reference_sums = policy.sum(1), reference.sum(1)
    for kind, beta in (("sigmoid", 0.1), ("sigmoid", 0.7), ("hinge", 0.3), ("ipo", 0.2)):
        trainer = stand_in(
            DPOTrainer, loss_types=[kind], loss_weights=[1.0], beta=beta, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", label_smoothing=0.0, use_weighting=False,
        )
        chosen, rejected = reference_sums.chunk(2)
        given = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        loss = trainer._compute_loss(Told(policy), given, False)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        found["dpo"].append({"shape": kind, "beta": beta, "loss": float(loss), "metrics": metrics})
    chosen, rejected = sums.chunk(2)
    smoothing = [("sigmoid", 0.1, 0.2), ("simpo", 2.0, 0.0), ("simpo", 2.5, 0.0)]
    means = (policy.sum(1) / mask.sum(1)).chunk(2)
    found["cpo"] = []
    for kind, beta, smooth in smoothing:
        trainer = stand_in(CPOTrainer, alpha=0.0, beta=beta, label_smoothing=smooth, loss_type=kind, simpo_gamma=1.4)
        losses, _, _ = trainer.cpo_loss(*(means if kind == "simpo" else (chosen, rejected)))
        found["cpo"].append(
            {"shape": kind, "beta": beta, "label_smoothing": smooth, "gamma": 1.4, "losses": losses.tolist()}
        )
    losses, *_ = stand_in(ORPOTrainer, beta=0.3).odds_ratio_loss(*means)
    found["orpo"] = {"odds": 0.3, "losses": (-losses).tolist()}
    found["kto"] = kto(KTOTrainer, inputs, policy, reference, draw)
    found["reward_model"] = reward_model(RewardTrainer, draw)
    print(json.dumps(found))


def kto(trainer: type, inputs: dict[str, Any], policy: Any, reference: Any, draw: Any) -> list[dict[str, Any]]:
    """KTO on single answers, with a KL of other answers above and below 0."""
    import torch

    made = []
    labels = torch.tensor([True] * 4 + [False] * 4)
    for shift in (0.9, -0.9):
        of_others = reference.sum(1) + shift + torch.rand(len(reference), generator=draw) * 0.1
        one = stand_in(
            trainer, beta=0.1, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.3, loss_type="kto",
            precompute_ref_logps=True,
        )
        one._compute_kl_logps = lambda model, batch, of_others=of_others: of_others
        batch = {
            **inputs, "label": labels, "ref_logps": reference.sum(1), "ref_KL_logps": reference.sum(1),
            "KL_input_ids": inputs["input_ids"], "KL_completion_mask": inputs["completion_mask"],
        }
        loss = one._compute_loss(Told(policy), batch, False)
        kl = float((of_others - reference.sum(1)).mean())
        made.append({"beta": 0.1, "bad": 1.3, "labels": labels.tolist(), "kl": kl, "loss": float(loss)})
    return made


def reward_model(trainer: type, draw: Any) -> dict[str, Any]:
    """Bradley-Terry with margins and centring."""
    import torch

    scores, margin = torch.randn(8, generator=draw), torch.rand(4, generator=draw)
    one = stand_in(trainer)
    one.args = SimpleNamespace(center_rewards_coefficient=0.05)
    inputs = {"margin": margin, "attention_mask": torch.ones(8, 3)}
    loss = one.compute_loss(lambda **given: SimpleNamespace(logits=scores[:, None]), inputs)
    return {"scores": scores.tolist(), "margin": margin.tolist(), "centring": 0.05, "loss": float(loss)}


if __name__ == "__main__":
    main()
