"""Child processes of our own: what they see, and that they end with their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from luthier.core.child import start_child

SEEN = """
import json, os, sys
from luthier.core.child import bound_to_parent
bound_to_parent(thread=sys.argv[1] == "thread")
seen = {"path": sys.path, "environment": dict(os.environ), "optimize": sys.flags.optimize, "json": json.__file__}
sys.stdout.write(json.dumps(seen) + "\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that says what it sees and then waits for the end of its standard input."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "child_that_looks.py").write_text(SEEN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return "child_that_looks"


def looked(child: subprocess.Popen[bytes]) -> dict[str, object]:
    assert child.stdout is not None
    return json.loads(child.stdout.readline())


def ended(child: subprocess.Popen[bytes], *, within: float = 10) -> int:
    assert child.stdin is not None and child.stdout is not None
    try:
        return child.wait(within)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_nothing_is_imported_from_the_working_directory(module, tmp_path, monkeypatch):
    """Breaks when a file called json.py in the folder somebody works in is run by our child."""
    canary = tmp_path / "canary"
    for name in ("json.py", "jinja2.py", "sitecustomize.py", "luthier.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    child = start_child(module, ["process"], stderr=subprocess.DEVNULL)
    assert "json.py" not in Path(str(looked(child)["json"])).name
    child.stdin.close()
    assert ended(child) == 0 and not canary.exists()
    # The negative control: without -P the folder does come first.
    subprocess.run([sys.executable, "-m", "json"], check=False, capture_output=True)
    assert canary.exists()


def test_it_sees_our_path_and_flags_but_no_secret_when_bare(module, monkeypatch):
    """Breaks when the child imports another luthier, drops -O, or gets a token it has no use for."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    for bare in (False, True):
        child = start_child(module, ["thread"], stderr=subprocess.DEVNULL, bare=bare)
        seen = looked(child)
        child.stdin.close()
        assert ended(child) == 0
        assert seen["optimize"] == sys.flags.optimize
        assert {path for path in sys.path if path} <= set(seen["path"])
        assert ("secret" in seen["environment"].values()) is not bare


def test_ctrl_c_is_left_to_the_parent(module):
    """Breaks when a child dies of the Ctrl-C that its parent handles."""
    child = start_child(module, ["process"], stderr=subprocess.DEVNULL)
    looked(child)
    child.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert child.poll() is None
    child.stdin.close()
    assert ended(child) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has ended")
@pytest.mark.parametrize("bound", ["thread", "process"])
def test_whether_a_child_ends_with_the_thread_that_started_it(module, bound):
    """Breaks when a child that shall serve a whole process dies with a short-lived thread, or the other way round."""
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        children.append(start_child(module, [bound], stderr=subprocess.DEVNULL))
        looked(children[0])

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    if bound == "thread":
        assert ended(children[0]) == -signal.SIGKILL
    else:
        time.sleep(0.2)
        assert children[0].poll() is None
        children[0].stdin.close()
        assert ended(children[0]) == 0


PARENT = """
import os, sys
from luthier.core.child import start_child
child = start_child("child_that_looks", [sys.argv[1]])
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("bound", ["thread", "process"])
def test_a_child_ends_with_a_killed_parent(module, bound):
    """Breaks when kill -9 of a run leaves its child behind."""
    path = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, bound],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    child = int(parent.stdout.readline())
    parent.kill()
    ended(parent)
    until = time.monotonic() + 10
    while time.monotonic() < until and alive(child):
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
