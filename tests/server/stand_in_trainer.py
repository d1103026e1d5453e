"""A trainer that counts: a line a step into the job's folder, resumed where it was; asked to end, it saves and does."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 40


def main() -> int:
    place = Path(sys.argv[1]).parent
    asked: list[int] = []

    def heard(number: int, _frame: Any) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, heard)
    steps = place / "steps"
    done = len(steps.read_text().splitlines()) if steps.is_file() else 0
    for step in range(done, STEPS):
        with steps.open("a") as file:
            file.write(f"{step}\n")
        time.sleep(0.01)
        if asked:
            time.sleep(0.05)
            return 75
        if (place / "fail").is_file():
            sys.stdout.write(json.dumps({"error": {"code": "data", "received": "x", "do": "y"}}) + "\n")
            return 65
    sys.stdout.write(json.dumps({"tokens": {"trained": STEPS}}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
