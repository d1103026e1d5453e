"""Create the virtual environments of the peers: one each, with the versions pinned beside this file.

    python benchmarks/setup_peers.py --home bench-home

torch is installed first and from its own pip call, and its version is looked at again at the end, so that a peer cannot
choose another one. A peer that cannot be installed is told, and the others are still made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = {"trl": "", "llamafactory": "llamafactory", "mergekit": ""}
"""Each peer, and its package that is installed without its requirements: LLaMA-Factory asks for builds of torchvision
and torchaudio that do not load beside every torch, and for a web interface; the pins name what training needs."""


def calls(pins: list[str], bare: str) -> list[list[str]]:
    """The arguments of the pip calls, in their order."""
    torch = [pin for pin in pins if pin.startswith("torch==")]
    alone = [pin for pin in pins if bare and pin.startswith(f"{bare}==")]
    return [torch, [pin for pin in pins if pin not in alone], *([["--no-deps", *alone]] if alone else [])]


def create(home: Path, peer: str) -> None:
    """Make `home`/venv-`peer` if it is missing, and install the pinned versions."""
    folder = home / f"venv-{peer}"
    pins = (HERE / f"peers-{peer}.txt").read_text("utf-8").split()
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    for arguments in calls(pins, PEERS[peer]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True)
    shown = subprocess.run([str(python), "-c", "import torch; print(torch.__version__)"],
                           check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
    if f"torch=={shown.partition('+')[0]}" not in pins:
        raise SystemExit(f"{peer} has torch {shown}, which is not the pinned one")
    print(f"{peer}: torch {shown}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of them, with commas between")
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    failed = False
    for peer in args.peers.split(","):
        if peer not in PEERS:
            parser.error(f"unknown peer {peer!r}; there are {', '.join(PEERS)}")
        try:
            create(args.home.resolve(), peer)
        except subprocess.CalledProcessError as failure:
            print(f"{peer}: {failure}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
