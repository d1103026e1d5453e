"""The ladder of the kernel rewards, natively on a GPU and behind the walls: what of it works, and what is in its way.

    python benchmarks/gpu_kernels.py --home bench-home
    python benchmarks/gpu_kernels.py --home bench-home --timed all      # every operator is timed, not five of them

The plainest kernel first, without walls and then behind them; then each operator of `luthier data kernels` is answered
rightly, which has to get everything, and leaky_relu in every wrong way that is known, which must not. Then some are
timed beside their references. HOME/gpu-kernels.json has the date, the device, the versions, the commit, the walls, and
each of these. Where the plainest kernel runs without walls and not behind them, it is traced by strace, if there is
one: what CUDA opens and calls that the walls refuse is in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sft import commit

from luthier.core.errors import LuthierError
from luthier.data.kernel_programs import PROOF, gpus_for, why_no_kernel_runs
from luthier.data.sample import Sample
from luthier.rewards import Reward, Score, Tools
from luthier.rewards.kernel import Kernel
from luthier.rewards.kernel_speed import KernelSpeed
from luthier.sandbox.guest import filters
from luthier.sandbox.program import Limits
from luthier.sandbox.sandbox import open_sandbox
from luthier.train.scoring import Sandboxes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TIMED = ("silu", "swiglu", "softmax", "rms_norm", "matmul")
AT_ONCE = 4
RUNS = 0.3
"""What a kernel gets that runs, and is wrong."""
MODULES = ("torch", "torch.overrides", "triton", "triton.language")
ROOM = Limits(seconds=120, cpu_seconds=120, memory_bytes=4096 << 20, processes=64)


def without_walls() -> str:
    """Why the plainest kernel does not run on this machine at all; empty where it does."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(_proof(Path(folder)))], capture_output=True, text=True, check=False, timeout=120
        )
    return "" if done.returncode == 0 else done.stderr[-1500:]


def _proof(folder: Path) -> Path:
    path = folder / "proof.py"
    path.write_text(f"{PROOF}\nif proof() != [1.0] * 16:\n    raise SystemExit('another value')\n", "utf-8")
    return path


def behind_walls() -> dict[str, Any]:
    """Which walls stand with the GPU lent, and why the plainest kernel does not run there; empty where it does."""
    try:
        with open_sandbox(ROOM, workers=1, preload=MODULES, devices=gpus_for("cuda")) as sandbox:
            return {"walls": sandbox.layers, "passed_over": sandbox.passed_over, "why": why_no_kernel_runs(sandbox.run)}
    except LuthierError as failure:
        return {"walls": (), "passed_over": (), "why": str(failure)}


def traced() -> dict[str, Any]:
    """What CUDA opens, and the calls of it that the filter would refuse; empty without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [strace, "-f", "-qq", "-s", "200", "-o", str(log), sys.executable, str(_proof(Path(folder)))]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, check=False, timeout=180)
        return looked_through(log.read_text("utf-8", "replace") if log.exists() else "")


_JUDGED = {"clone", "clone3", "kill", "tgkill", "tkill", "fcntl", "ioctl", "prctl", "prlimit64", "socketpair", "sendto",
           "socket"}  # fmt: skip
"""Calls that the filter judges by their arguments."""


def looked_through(log: str) -> dict[str, Any]:
    """Of what strace wrote: files of the machine that were asked for, with how often in vain, and refused calls."""
    let_in = ";".join([filters._ALLOWED, filters._WITH_OWN_FILES, filters._WITH_OWN_PROCESSES, filters._WITH_LENT])
    known = {line.split()[0] for line in let_in.split(";") if line.strip()} | _JUDGED
    made = re.findall(r"^\d+ +(\w+)\(", log, re.MULTILINE)
    calls = {name: made.count(name) for name in sorted(set(made) - known)}
    files: dict[str, int] = {}
    for path, failed in re.findall(r'"((?:/proc|/sys|/dev|/run|/tmp|/etc|/var)[^"]*)"[^\n]*?(?: = -1 (\w+)|\n|$)', log):
        path = re.sub(r"/\d{2,}(?=/|$)", "/N", path)
        files[path] = files.get(path, 0) + bool(failed)
    return {"calls": calls, "files": files}


def right(tools: Tools) -> dict[str, Any]:
    """What the reward `kernel` gives for right and for wrong answers."""
    from tests.rewards.kernels import CHEATS, SOLUTIONS
    from tests.rewards.test_kernel import answer, cheating

    asked = {name: answer(name, program) for name, program in SOLUTIONS.items()}
    asked |= {f"wrong: {name}": cheating(name) for name in CHEATS}
    found = scored(Kernel(device="cuda"), asked, tools, AT_ONCE)
    paid = [name for name, got in found.items() if name not in SOLUTIONS and (got["value"] or 0.0) > RUNS + 1e-6]
    poor = [name for name, got in found.items() if name in SOLUTIONS and got["value"] != 1.0]
    return {"right and not paid in full": poor, "wrong and paid": paid, "scores": found}


def fast(tools: Tools, names: Sequence[str]) -> dict[str, Any]:
    """What the reward `kernel_speed` gives, one after the other: each has the GPU for itself."""
    from tests.rewards.kernels import SOLUTIONS
    from tests.rewards.test_kernel import answer

    chosen = list(SOLUTIONS) if names == ["all"] else names
    return scored(KernelSpeed(device="cuda"), {name: answer(name, SOLUTIONS[name]) for name in chosen}, tools, 1)


def scored(reward: Reward, asked: Mapping[str, Sample], tools: Tools, at_once: int) -> dict[str, Any]:
    """Value, parts and reason of each; None and the error where there is no verdict."""

    def one(sample: Sample) -> dict[str, Any]:
        try:
            [verdict] = reward.score([sample], tools)
        except LuthierError as failure:
            verdict = failure
        if isinstance(verdict, Score):
            value = round(verdict.value, 6)
            return {"value": value, "parts": dict(verdict.parts), "reason": verdict.reason[:400]}
        return {"value": None, "parts": {}, "reason": str(verdict)[:800]}

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(asked, pool.map(one, asked.values()), strict=True))


def ladder(names: Sequence[str]) -> dict[str, Any]:
    """All of it; what comes after a failure that says it all is not begun."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "triton")} | {"cuda": torch.version.cuda},
        "devices": gpus_for("cuda"),
        "without walls": without_walls(),
    }
    if found["without walls"]:
        return found | {"good": False}
    found["behind walls"] = behind_walls()
    if found["behind walls"]["why"]:
        return found | {"good": False, "traced": traced()}
    with Sandboxes() as sandboxes:
        tools = Tools(sandbox=sandboxes)
        found["kernel"] = right(tools)
        found["kernel_speed"] = fast(tools, names)
    told = all(got["parts"].get("correct") == 1.0 for got in found["kernel_speed"].values())
    answers = found["kernel"]
    good = told and not answers["right and not paid in full"] and not answers["wrong and paid"]
    return found | {"good": good}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for what is found")
    parser.add_argument("--timed", nargs="+", default=list(TIMED), help="operators that are timed, or all")
    args = parser.parse_args(arguments)
    if not gpus_for("cuda"):
        parser.error("there is no GPU of NVIDIA here, no triton, or a PyTorch without CUDA")
    found = ladder(args.timed)
    args.home.mkdir(parents=True, exist_ok=True)
    path = args.home / "gpu-kernels.json"
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for name in ("without walls", "behind walls"):
        told = found.get(name, "not begun")
        print(f"{name}: {(told['why'] if isinstance(told, dict) else told) or 'the plainest kernel runs'}")
    for name, got in {**found.get("kernel", {}).get("scores", {}), **found.get("kernel_speed", {})}.items():
        speedup = got["parts"].get("speedup")
        print(f"{name}: {got['value']} {f'{speedup:.2f} x ' if speedup else ''}{got['reason'][:150]}")
    print(f"{'all is as it should be' if found['good'] else 'NOT as it should be'}; {path}")
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
