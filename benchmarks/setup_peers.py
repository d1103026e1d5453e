"""Create the virtual environments of the peers: one each, with the versions pinned beside this file.

    python benchmarks/setup_peers.py --home bench-home

torch is installed first and from its own pip call, so that a peer cannot choose another one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("trl",)


def create(home: Path, peer: str) -> None:
    """Make `home`/venv-`peer` if it is missing, and install the pinned versions."""
    folder = home / f"venv-{peer}"
    pins = (HERE / f"peers-{peer}.txt").read_text("utf-8").split()
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    torch_pins = [pin for pin in pins if pin.startswith("torch==")]
    for chosen in (torch_pins, pins):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *chosen], check=True)
    subprocess.run([str(python), "-c", "import torch; print('torch', torch.__version__)"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        print(f"{peer}: {args.home / f'venv-{peer}'}", file=sys.stderr)
        create(args.home.resolve(), peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
