"""Draw `docs/demo.svg`: run the demo and keep what it prints as a picture.

    python scripts/draw_demo.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from luthier.cli.demo import show
from luthier.recipes.demo import demo
from luthier.recipes.progress import progress

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "demo.svg"
WIDTH = 112


def main() -> None:
    """Run the demo in a temporary folder and write the picture."""
    with tempfile.TemporaryDirectory() as folder, progress() as recorder:
        found = demo(Path(folder) / "demo", recorder=recorder)
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, highlight=False)
        show(found, console, where=Path("runs/demo"))
    PICTURE.write_text(console.export_svg(title="luthier demo"), encoding="utf-8")
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
