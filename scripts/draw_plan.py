"""Draw `docs/plan.svg`: what methods take for a model of LLaMA-7B's shape, part by part, as `luthier plan` tells it.

    python scripts/draw_plan.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Final

from luthier.recipes.planning.asked import asked
from luthier.recipes.planning.plan import lay
from luthier.recipes.sizing.memory import PARTS

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "plan.svg"
CONFIG: Final = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
METHODS: Final = ("full", "galore", "lora", "dora", "ia3", "prompt_tuning", "qlora")
COLOURS: Final = {
    "weights": "#4c6a92", "trained": "#7fa7d0", "gradients": "#c9a227", "optimizer": "#b5533c",
    "activations": "#5b8c5a", "working": "#9dbf9c",
}  # fmt: skip
LEFT, WIDE, ROW, TOP = 130, 560, 34, 46


def main() -> None:
    """Plan each method and write the picture."""
    found = needs()
    PICTURE.write_text(picture(found), encoding="utf-8")
    for method, parts in found.items():
        print(f"{method:<14} {sum(parts.values()) / 1e9:6.1f} GB")
    print(f"wrote {PICTURE}")


def needs() -> dict[str, dict[str, int]]:
    """Bytes by part of each method: one row of 2,048 tokens on a GPU, nothing made again."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(CONFIG), encoding="utf-8")
        plans = {method: lay(config, asked(method, ["device=cuda", "recompute=none"])) for method in METHODS}
        told = {method: laid.needed(1, 2048, None) for method, laid in plans.items()}
    return {method: {part: parts[part] for part in PARTS if part in COLOURS} for method, parts in told.items()}


def picture(found: Mapping[str, Mapping[str, int]]) -> str:
    """Stacked bars, one below the other, and what their colours mean."""
    most = max(sum(parts.values()) for parts in found.values())
    height = TOP + ROW * len(found) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" font-family="sans-serif" font-size="13" '
        'role="img" aria-label="Memory of methods on a 7B model, by part">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for index, (part, colour) in enumerate(COLOURS.items()):
        x = 16 + 126 * index
        lines.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="25" fill="#333333">{part}</text>')
    for row, (method, parts) in enumerate(found.items()):
        y, reach = TOP + ROW * row, float(LEFT)
        lines.append(f'<text x="{LEFT - 10}" y="{y + 17}" text-anchor="end" fill="#333333">{escape(method)}</text>')
        for part, size in parts.items():
            width = WIDE * size / most
            lines.append(f'<rect x="{reach:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{COLOURS[part]}"/>')
            reach += width
        total = sum(parts.values()) / 1e9
        lines.append(f'<text x="{reach + 8:.1f}" y="{y + 17}" fill="#333333">{total:.1f} GB</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
