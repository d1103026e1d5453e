"""Merging two checkpoints of half a billion parameters, end to end, beside mergekit.

    python benchmarks/merge.py --home bench-home --repetitions 5

The first checkpoint is the prepared model of 494 million parameters in bfloat16. The second is made of it once: a
random change of a fifth of its spread is added to every tensor. Each merge of each repetition is a process of its own,
in turn (A B A B), on files that were read once before. Wall seconds, CPU seconds and the peak of resident memory of the
process are measured, and how long it takes until the result is durable: luthier waits for that before it ends, mergekit
does not, so its files are synced here and that time is told apart. mergekit does not hold its result against anything:
luthier is measured without its gate of logits (`--set parity=none`), and with it. One JSON line a process goes to
HOME/merge.jsonl.
The two results must have equal numbers up to one step of bfloat16. Where two products all but cancel, the steps of the
small rest are finer than float32 computes: such numbers are told apart, and must agree to 1e-6 of the tensor's largest
number.

The limit that is told is the larger of two times: the bytes of the result at the speed with which this disk took a
file of that size just before (through the page cache or past it, whichever is faster), and all bytes that move (each
input twice, the result once) at the speed with which torch copies memory.
Beside it stands what the processors need if none ever waited and Python cost nothing: the start of the command (its dry
run), and, shared out over all of them, the system's copy of the inputs from the page cache, the SHA-256 of the result,
and the sums of slerp over numbers that lie in a cache.
mergekit is measured where its environment is: `setup_peers.py --peers mergekit`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import procfs
import results
from counts import count
from surroundings import variables

HERE = Path(__file__).resolve().parent
MODEL = "m2"
LUTHIER = "from luthier.cli.main import main; main()"
T = 0.4
SPREAD = 0.2
CANCELLED = 1e-6
PIECE = 1 << 21
"""Bytes that a processor's cache holds."""
WEIGHTED = {"linear": {"weight": 0.5}, "ties": {"weight": 0.5, "density": 0.5}}


def second(home: Path) -> Path:
    """The other checkpoint, made once."""
    first, place = home / MODEL / "model", home / MODEL / "changed"
    if place.exists():
        return place
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(1)
    tensors = load_file(first / "model.safetensors")
    for tensor in tensors.values():
        spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.add_(noise.mul_(SPREAD * (spread or 0.01)).to(tensor.dtype))
    beside = place.with_name("changed.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(first, beside, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    beside.rename(place)
    return place


def recipe(method: str, first: Path, other: Path) -> dict[str, Any]:
    """What both merge, as mergekit writes it."""
    models: list[dict[str, Any]] = [{"model": str(first)}, {"model": str(other)}]
    whole: dict[str, Any] = {"merge_method": method, "base_model": str(first), "dtype": "bfloat16"}
    if method == "slerp":
        return {**whole, "models": models, "parameters": {"t": T}}
    own = WEIGHTED[method]
    named = [{**each, "parameters": own} for each in (models if method == "linear" else models[1:])]
    if method == "linear":
        whole.pop("base_model")
    return {**whole, "models": named}


def commands(home: Path, recipe_path: Path, out: Path) -> dict[str, list[str]]:
    """The command of each system; mergekit's only where it is installed."""
    whole = [sys.executable, "-c", LUTHIER, "merge", str(recipe_path), "--out", str(out), "--quiet"]
    found = {"luthier": [*whole, "--set", "parity=none"], "luthier, gate": whole}
    peer = home / "venv-mergekit" / "bin" / "mergekit-yaml"
    if peer.exists():
        found["mergekit"] = [str(peer), str(recipe_path), str(out), "--quiet"]
        found["mergekit, lazy"] = [*found["mergekit"], "--lazy-unpickle", "--num-threads", "2", "--async-write"]
    return found


def measured(name: str, command: Sequence[str], out: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run one process and return its line. Raises SystemExit when it fails."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    before, began = procfs.now(), time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=dict(environment))
        watch = Peak(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        watch.over.set()
        wall, after = time.perf_counter() - began, procfs.now()
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{name} ended with {child.returncode} and said:\n{said.read()[-2000:].decode()}")
    began = time.perf_counter()
    for path in out.glob("*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    cpu = usage.ru_utime + usage.ru_stime
    line: dict[str, Any] = {"system": name, "wall_s": round(wall, 3), "cpu_s": round(cpu, 3),
                            "sync_s": round(time.perf_counter() - began, 3), "peak_bytes": watch.found,
                            "out_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}  # fmt: skip
    if before.all_cpu is not None and after.all_cpu is not None:
        line["foreign_cpu_s"] = round(max(0.0, after.all_cpu - before.all_cpu - cpu), 3)
        line["contended"] = line["foreign_cpu_s"] > procfs.CONTENDED_SHARE * wall
    return line


class Peak(threading.Thread):
    """The high-water mark of a process, asked for until it ends: what `wait4` tells begins with that of its parent."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.status, self.found, self.over = Path(f"/proc/{process}/status"), 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.02):
            try:
                lines = self.status.read_text().splitlines()
            except OSError:
                return
            self.found = max([self.found, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])


def apart(one: Path, other: Path) -> dict[str, int]:
    """How many numbers of two folders differ by one step of bfloat16, and by more: where products cancelled, or not."""
    from safetensors import safe_open

    held: dict[str, Path] = {}
    for path in sorted(other.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held |= dict.fromkeys(file.keys(), path)
    found = {"tensors": 0, "one_step": 0, "cancelled": 0, "more": 0, "missing": 0}
    for path in sorted(one.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                if name not in held:
                    found["missing"] += 1
                    continue
                with safe_open(held[name], "pt") as peer:
                    tensors = [each.get_tensor(name) for each in (file, peer)]
                steps = (_ordered(tensors[0]) - _ordered(tensors[1])).abs()
                difference = (tensors[0].float() - tensors[1].float()).abs()
                near = difference <= CANCELLED * tensors[0].abs().max().float()
                found["tensors"] += 1
                found["one_step"] += int((steps == 1).sum())
                found["cancelled"] += int(((steps > 1) & near).sum())
                found["more"] += int(((steps > 1) & ~near).sum())
    return found | {"unread": len(held) - found["tensors"]}


def _ordered(tensor: Any) -> Any:
    """The bits of bfloat16 as whole numbers that grow with the number, so that neighbours differ by one."""
    import torch

    bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -32768 - bits, bits)


def limit(home: Path, in_bytes: int, out_bytes: int) -> dict[str, float]:
    """The least time that this disk and this memory allow, in seconds."""
    import torch

    cached, direct = (_disk_speed(home, out_bytes, way) for way in (False, True))
    disk = max(cached, direct)
    source = torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    best = min(_timed(lambda: target.copy_(source)) for _ in range(5))
    # A copy reads and writes.
    memory = 2 * source.numel() / best
    return {"disk_s": out_bytes / disk, "memory_s": (2 * in_bytes + out_bytes) / memory,
            "disk_bytes_per_s": disk, "memory_bytes_per_s": memory, "cached_s": out_bytes / cached}  # fmt: skip


def processors(recipe_path: Path, inputs: Sequence[Path], out_bytes: int) -> dict[str, float]:
    """The least time that the processors need, in seconds: one to start, and all of them to read, add up and digest."""
    dry = [sys.executable, "-c", LUTHIER, "merge", str(recipe_path), "--out", str(recipe_path.with_name("none")),
           "--dry-run"]  # fmt: skip
    start = min(_timed(lambda: subprocess.run(dry, check=True, stdout=subprocess.DEVNULL)) for _ in range(5))
    piece = mmap.mmap(-1, PIECE)
    digest = hashlib.sha256()
    sha = min(_timed(lambda: digest.update(piece)) for _ in range(50)) / PIECE * out_bytes

    def read() -> None:
        for path in inputs:
            with path.open("rb", buffering=0) as file:
                while file.readinto(piece):
                    pass

    copied = min(_timed(read) for _ in range(3))
    sums = min(_timed(_sums(PIECE // 4)) for _ in range(50)) / (PIECE // 2) * out_bytes
    return {"start_s": start, "sha_s": sha, "read_s": copied, "sums_s": sums,
            "processors_s": start + (sha + copied + sums) / len(os.sched_getaffinity(0))}  # fmt: skip


def _sums(numbers: int) -> Callable[[], None]:
    """What slerp does to so many numbers of two models in bfloat16."""
    import numpy as np

    from luthier.kernels.floats import BFLOAT16
    from luthier.kernels.vectors import vectors_for

    vectors = vectors_for("auto")
    rows = [np.random.default_rng(seed).standard_normal(numbers).astype(BFLOAT16) for seed in range(2)]
    found = np.empty_like(rows[0])

    def work() -> None:
        vectors.products(rows)
        vectors.weighted(rows, (1 - T, T), into=found)

    return work


def _disk_speed(home: Path, size: int, direct: bool) -> float:
    """Bytes a second until a file of that size is durable: through the page cache, or past it where that is known."""
    piece = mmap.mmap(-1, 2 * PIECE)
    piece.write(os.urandom(len(piece)))
    with tempfile.NamedTemporaryFile(dir=home) as file:
        try:
            number = os.open(file.name, os.O_WRONLY | (os.O_DIRECT if direct else 0))
        except OSError:
            return 0.0
        os.posix_fallocate(number, 0, size)
        began = time.perf_counter()
        for at in range(0, size, len(piece)):
            os.pwrite(number, piece, at)
        os.fsync(number)
        seconds = time.perf_counter() - began
        os.close(number)
    return size / seconds


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: for each system medians and ranges, and how many processes were contended."""
    rows = [["system", "wall s", "until durable s", "CPU s", "peak GB", "runs", "contended"]]
    for name in dict.fromkeys(line["system"] for line in lines):
        own = [line for line in lines if line["system"] == name]
        walls = [line["wall_s"] for line in own]
        durable = [line["wall_s"] + line["sync_s"] for line in own]
        rows.append([
            name,
            f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})",
            f"{statistics.median(durable):.2f} ({min(durable):.2f}-{max(durable):.2f})",
            f"{statistics.median(line['cpu_s'] for line in own):.1f}",
            f"{max(line['peak_bytes'] for line in own) / 1e9:.2f}",
            str(len(own)),
            str(sum(line.get("contended") is not False for line in own)),
        ])  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("bench-home"), help="folder for all files and environments")
    parser.add_argument("--repetitions", type=count, default=5, help="processes of each system")
    parser.add_argument("--method", default="slerp", choices=["slerp", *WEIGHTED], help="how tensors are merged")
    parser.add_argument("--only", default="", help="systems whose name contains this")
    args = parser.parse_args()
    home = args.home.resolve()
    names = list(commands(home, home, home))
    if not any(args.only in name for name in names):
        parser.error(f"--only {args.only!r} is in no name of a system; there are {', '.join(names)}")
    # Imported late: preparing needs torch and transformers, and --help does not.
    from prepare import prepare

    digest = prepare(home, MODEL)
    first, other = home / MODEL / "model", second(home)
    run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=home) as folder:
        scratch = Path(folder)
        path = scratch / "merge.yaml"
        path.write_text(json.dumps(recipe(args.method, first, other)), encoding="utf-8")  # JSON is YAML
        for each in (first, other):
            for file in each.iterdir():
                with file.open("rb") as opened:
                    while opened.read(1 << 24):
                        pass
        chosen = {name: each for name, each in commands(home, path, scratch / "out").items() if args.only in name}
        places = {name: scratch / f"kept-{number}" for number, name in enumerate(chosen)}
        for repetition in range(args.repetitions):
            for name, command in chosen.items():
                line = measured(name, command, scratch / "out", variables(home))
                line |= {"run": run, "repetition": repetition, "method": args.method, "data_digest": digest,
                         "machine": procfs.machine()}  # fmt: skip
                results.append_line(home / "merge.jsonl", line)
                lines.append(line)
                if repetition == 0:
                    (scratch / "out").rename(places[name])
        rows = table(lines)
        inputs = [each / "model.safetensors" for each in (first, other)]
        least = limit(home, sum(path.stat().st_size for path in inputs), lines[0]["out_bytes"])
        needed = processors(path, inputs, lines[0]["out_bytes"])
        differences = {name: apart(places["luthier"], place) for name, place in places.items()
                       if name != "luthier" and "luthier" in places}  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"limit      {max(least['disk_s'], least['memory_s']):.2f} s (disk {least['disk_s']:.2f} s at "
          f"{least['disk_bytes_per_s'] / 1e9:.2f} GB/s, memory {least['memory_s']:.2f} s at "
          f"{least['memory_bytes_per_s'] / 1e9:.1f} GB/s; the disk through the page cache "
          f"{least['cached_s']:.2f} s)")  # fmt: skip
    print(f"processors {needed['processors_s']:.2f} s (start {needed['start_s']:.2f} s; shared out: SHA-256 "
          f"{needed['sha_s']:.2f} s, reading {needed['read_s']:.2f} s, sums {needed['sums_s']:.2f} s)")  # fmt: skip
    for name, found in differences.items():
        print(f"luthier and {name}: {found}")
    return 0 if not any(found["more"] or found["missing"] or found["unread"] for found in differences.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
