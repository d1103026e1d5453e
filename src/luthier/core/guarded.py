"""A command that ends, with all that it has started, when whoever asked for it ends.

    python -m luthier.core.guarded COMMAND ARGUMENTS

A compiler starts programs of its own, which would go on when we are killed. Here they are one process group, and the
end of our standard input, which only the one who asked holds open, is the end of the group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command of our arguments; its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_input, daemon=True).start()
    return subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode


def _end_with_input() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    os._exit(main())
