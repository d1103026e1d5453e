"""Devices: a guest gets the device files it was lent and nothing else; what a GPU's driver is asked is let through."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.core.errors import RefusedError, SandboxUnavailableError
from luthier.sandbox.devices import gpu_devices, require_devices
from luthier.sandbox.program import Call, Limits, Program, Status
from luthier.sandbox.sandbox import Sandbox, open_sandbox
from luthier.sandbox.tiers import Tier
from tests.sandbox.conftest import SMALL, strongest

LENT = "/dev/full"
"""In the place of a GPU: a device that every machine has, no guest may open, and any may be lent."""
PROGRAM = """
import ctypes, os, resource

def opens(name):
    try:
        os.close(os.open(name, os.O_RDWR))
        return True
    except OSError:
        return False

def asks(request):
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/null", os.O_RDWR)
    libc.ioctl(device, ctypes.c_ulong(request), None)
    return os.strerror(ctypes.get_errno())

def reserves():
    return resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY

def about():
    try:
        return sorted(os.listdir("/proc")) + [open("/proc/devices").readline().strip()]
    except OSError:
        return None

def holds(count):
    kept = bytearray(count)
    kept[::4096] = b"x" * len(kept[::4096])
    return len(kept)
"""
# Of nvidia's kinds: a request to its driver, two of UVM. Then typing into a terminal, and a size of one.
ASKED, OTHERS = (0xC020462A, 0x30000001, 25), (0x5412, 0x5414)
REFUSED = "Operation not permitted"


def test_a_device_that_is_lent_is_there_and_nothing_else_is() -> None:
    """Breaks when a device does not come through, or the way for one is a way for others."""
    calls = (Call("opens", (LENT,)), Call("opens", ("/dev/tty",)), Call("opens", ("/dev/ptmx",)), Call("reserves"),
             Call("about"), *(Call("asks", (each,)) for each in (*ASKED, *OTHERS)))  # fmt: skip
    with strongest() as without, _with_device() as lending:
        assert "with /dev/full" in lending.layers and "with /dev/full" not in without.layers
        for sandbox, lent in ((without, False), (lending, True)):
            said = [each.value for each in sandbox.run(Program(PROGRAM, calls)).returned]
            assert said[:4] == [lent, False, False, lent]
            assert said[4] == (["devices", "Character devices:"] if lent else None)
            assert [each != REFUSED for each in said[5:]] == [lent] * 3 + [False] * 2, said


def test_memory_is_limited_where_addresses_are_not() -> None:
    """Breaks when lending a device lends the machine's memory too."""
    small = Limits(seconds=20.0, cpu_seconds=20.0, memory_bytes=100 << 20)
    with _with_device(small) as lending:
        fits, over = (lending.run(Program(PROGRAM, (Call("holds", (count,)),))) for count in (30 << 20, 600 << 20))
    assert fits.status is Status.ENDED and over.status is Status.OUT_OF_MEMORY


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    for name in ("/etc/passwd", "/dev/../etc/passwd", "/dev/none", "full"):
        with pytest.raises(RefusedError, match="no device file"):
            require_devices([name])
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert gpu_devices(tmp_path) == ()


def test_the_files_of_gpus_are_found_where_they_are_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the control file alone counts as a GPU, or another's device is taken for one."""
    monkeypatch.setattr("luthier.sandbox.devices._is_device", lambda path: True)
    (tmp_path / "nvidiactl").touch()
    assert gpu_devices(tmp_path) == ()
    for name in ("nvidia0", "nvidia-uvm", "nvidia-modeset", "nvme0", "tty0"):
        (tmp_path / name).touch()
    assert [Path(name).name for name in gpu_devices(tmp_path)] == ["nvidiactl", "nvidia-uvm", "nvidia0"]


def test_bare_walls_lend_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a tier without a root of its own would have to show all of /dev."""
    monkeypatch.setattr("luthier.sandbox.tiers.Steps.own_processes", property(lambda steps: False))
    with pytest.raises(SandboxUnavailableError, match="root of their own"):
        open_sandbox(SMALL, tier=Tier.B, devices=[LENT])


def _with_device(limits: Limits = SMALL) -> Sandbox:
    if not Path(LENT).exists():
        pytest.skip(f"there is no {LENT}")
    return strongest(limits, devices=[LENT])
