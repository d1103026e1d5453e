"""What must hold under `python -O` as well, where Python removes every `assert`: a part of three campaigns.

Run as `python -O -m tests.faults.optimized FOLDER`; prints one line of JSON: the verdicts, by campaign.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.faults import bad_numbers, flips, header_mutants

SEED = 3


def main() -> None:
    """Run them and say what came of them."""
    folder = Path(sys.argv[1])
    made = {
        "flips": flips.run(12, seed=SEED, folder=folder, commands=3),
        "bad numbers": bad_numbers.run(1, seed=SEED, folder=folder),
        "headers": header_mutants.run(200, seed=SEED, folder=folder),
    }
    found = {name: [each.passed, each.tried, each.verdicts, each.failures] for name, each in made.items()}
    print(json.dumps({"optimize": sys.flags.optimize, "pickle": _pickle(folder / "pickle"), **found}))


def _pickle(folder: Path) -> str:
    """What is said to an adapter whose tensors are a pickle."""
    import torch

    from luthier.core.errors import LuthierError
    from luthier.model.files.tensor_files import load_tensors

    folder.mkdir()
    # By the name of tensors that cannot run code; torch writes pickles under any name.
    torch.save({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    try:
        load_tensors(folder / "adapter_model.safetensors")
    except LuthierError as refused:
        return refused.code
    return "loaded"


if __name__ == "__main__":
    main()
