"""What trl's own loss of distillation says of given logits: made once, kept in trl_distillation.json beside it.

trl is no dependency of the tests. Where it is installed, this makes the file again:
    python tests/peers/trl_distillation.py > tests/peers/trl_distillation.json
The file was made with trl 1.16.0 and torch 2.13.0 (CPU).
"""

from __future__ import annotations

import json

CASES = (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5), ("jsd", 0.1))


def main() -> None:
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(1, 4, 11, generator=draw) for _ in range(2))
    found = {"student": student[0].tolist(), "teacher": teacher[0].tolist(), "cases": []}
    for kind, beta in CASES:
        for temperature in (1.0, 0.7):
            losses = GKDTrainer.generalized_jsd_loss(
                student, teacher, beta=beta, temperature=temperature, reduction="none"
            )
            case = {"kind": kind, "share": beta, "temperature": temperature, "losses": losses[0].sum(-1).tolist()}
            found["cases"].append(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
