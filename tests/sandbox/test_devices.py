"""Devices: a guest gets the device files it was lent and nothing else; what a GPU's driver is asked is let through."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.core.errors import RefusedError, SandboxUnavailableError
from luthier.sandbox.devices import about_devices, gpu_devices, require_devices
from luthier.sandbox.program import Call, Limits, Program, Status
from luthier.sandbox.sandbox import Sandbox, open_sandbox
from luthier.sandbox.tiers import Tier
from tests.sandbox.conftest import LENT, SMALL, strongest

PROGRAM = '''
import ctypes, os, resource, socket, threading

def opens(name, how=os.O_RDWR):
    try:
        os.close(os.open(name, how))
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
        return sorted(os.listdir("/proc"))
    except OSError:
        return None

def read(name):
    try:
        with open(name) as file:
            return len(file.read()) > 0
    except OSError as failure:
        return failure.strerror

def named():
    """As glibc names another thread."""
    started, ends, number = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: (number.append(threading.get_native_id()), started.set(), ends.wait()))
    thread.start()
    started.wait()
    name = f"/proc/self/task/{number[0]}/comm"
    file = os.open(name, os.O_RDWR)
    os.write(file, b"cuda-EvtHandlr")
    os.close(file)
    ends.set()
    with open("/proc/self/task/1/comm") as file:
        return file.read().strip()

def library():
    """What the library of a GPU does before it opens one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, size = ctypes.c_size_t, 1 << 41
    arguments = (None, ctypes.c_size_t(size), 0, 0x4022, -1, ctypes.c_long(0))
    reserved = libc.mmap(*arguments) != ctypes.c_size_t(-1).value
    policy = 236 if os.uname().machine == "aarch64" else 239
    nameless = os.memfd_create("x", 3)
    os.ftruncate(nameless, 1 << 16)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    service = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        service.connect("/tmp/nvidia-mps/control")
    except OSError as failure:
        told = failure.strerror
    return [reserved, libc.syscall(ctypes.c_long(policy), None, None, 0, None, 0), told]

def holds(count):
    kept = bytearray(count)
    kept[::4096] = b"x" * len(kept[::4096])
    return len(kept)
'''
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
            assert (said[4] is not None and {"1", "self", "devices"} <= set(said[4])) if lent else said[4] is None
            assert [each != REFUSED for each in said[5:]] == [lent] * 3 + [False] * 2, said


def test_the_library_of_a_gpu_finds_what_it_ends_without() -> None:
    """Breaks when one of the things is missing for which CUDA ends with the error 304 (sandbox/devices.py)."""
    names = ("/proc/self/maps", "/proc/self/status", "/proc/devices", "/proc/cpuinfo", "/sys/devices/system/cpu/online")
    with _with_device() as lending:
        calls = (Call("named"), Call("library"), *(Call("read", (name,)) for name in names))
        named, library, *read = lending.run(Program(PROGRAM, calls)).returned
    assert named.error is None and named.value != "cuda-EvtHandlr", named
    assert library.value == [True, 0, "No such file or directory"], library
    assert [each.value for each in read] == [True] * len(names), read


def test_what_a_device_brings_along_is_for_reading_and_of_oneself() -> None:
    """Breaks when the machine can be changed through /sys or /proc, or other processes are seen there."""
    names = ("/sys/devices/system/cpu/cpu0/uevent", "/sys/kernel/mm/transparent_hugepage/enabled", "/proc/devices",
             "/proc/self/oom_score_adj", "/proc/self/mem", "/proc/self/comm", "/proc/self/uid_map")  # fmt: skip
    with _with_device() as lending:
        calls = (Call("about"), *(Call("opens", (name, os.O_WRONLY)) for name in names))
        about, *written = [each.value for each in lending.run(Program(PROGRAM, calls)).returned]
    assert [name for name in about if name.isdigit()] == ["1"] and not {"kcore", "sysrq-trigger"} & set(about)
    assert written == [False] * len(names)


def test_which_gpu_is_ours_is_said_behind_the_walls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a guest takes the first GPU of the machine, which may be somebody else's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    program = Program("import os\n\ndef ours():\n    return os.environ.get('CUDA_VISIBLE_DEVICES')", (Call("ours"),))
    with strongest() as without, _with_device() as lending:
        assert [each.run(program).returned[0].value for each in (without, lending)] == [None, "1"]


def test_a_gpu_that_is_hidden_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.sandbox.devices._is_device", lambda path: True)
    for name in ("nvidiactl", "nvidia0"):
        (tmp_path / name).touch()
    for said, count in (("0", 2), ("GPU-1f", 2), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert len(gpu_devices(tmp_path)) == count, said


def test_what_is_told_of_devices_is_the_driver_s_and_no_secret(tmp_path: Path) -> None:
    """Breaks when where modules lie in the kernel is told to a guest, or a driver's folder is left out."""
    (tmp_path / "driver" / "nvidia" / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "params").write_text("ModifyDeviceFiles: 1\n")
    (tmp_path / "driver" / "nvidia" / "gpus" / "0000:01:00.0" / "information").write_text("Model: one\n")
    (tmp_path / "modules").write_text("nvidia 1 0 - Live 0xffffffffc1000000 (POE)\n")
    found = {name.removeprefix(str(tmp_path)): text for name, text in about_devices(tmp_path).items()}
    assert found == {
        "/modules": "nvidia 1 0 - Live 0x0000000000000000 (POE)\n",
        "/driver/nvidia/params": "ModifyDeviceFiles: 1\n",
        "/driver/nvidia/gpus/0000:01:00.0/information": "Model: one\n",
    }


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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # machines without a GPU are often told so by it
    (tmp_path / "nvidiactl").touch()
    assert gpu_devices(tmp_path) == ()
    (tmp_path / "nvidia-caps").mkdir()
    for name in ("nvidia0", "nvidia12", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia0x", "nvme0", "tty0"):
        (tmp_path / name).touch()
    for name, mode in (("nvidia-cap1", 0o400), ("nvidia-cap21", 0o444)):
        (tmp_path / "nvidia-caps" / name).touch(mode)
    assert {Path(name).name for name in gpu_devices(tmp_path)} == {
        "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia12", "nvidia-cap21"}  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_devices(tmp_path) == (), "hidden from us"


def test_bare_walls_lend_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a tier without a root of its own would have to show all of /dev."""
    monkeypatch.setattr("luthier.sandbox.tiers.Steps.own_processes", property(lambda steps: False))
    with pytest.raises(SandboxUnavailableError, match="root of their own"):
        open_sandbox(SMALL, tier=Tier.B, devices=[LENT])


def _with_device(limits: Limits = SMALL) -> Sandbox:
    if not Path(LENT).exists():
        pytest.skip(f"there is no {LENT}")
    return strongest(limits, devices=[LENT])
