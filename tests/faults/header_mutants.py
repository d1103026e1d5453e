"""Mutated headers: safetensors headers and every JSON file that luthier reads beside weights and states.

A mutant is refused with one of luthier's errors, or it is accepted; then it is the very same bytes, or the manifest of
its folder refuses it. Nothing else may happen: no other exception, no second of processor time, no memory beyond the
file and a bound. What a tensor file is by its specification is decided again, here, by other code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from luthier.core.errors import CorruptError, LuthierError
from luthier.store import manifest
from tests.faults.campaign import Campaign, Tally
from tests.faults.header_mutators import mutate_header, mutate_json, wrong_tensors
from tests.faults.watch import HangError, Watch, alarmed

FAULT = "mutated safetensors and JSON headers"
PROMISE = "refused with the file named, or caught by the digest; no crash, no hang, at most 64 MiB beyond the file"
CONTROL = "digests that nobody compares"
PASSES = ("refused", "digest", "same", "harmless")
SECONDS = 2.0
SPARE_BYTES = 64 * 2**20
BATCH = 250
_BATCH_SECONDS = 120

Reader = Callable[[Path], object]


@dataclass(frozen=True)
class Target:
    """A file of a kind: its name, a good one, how it is mutated, and everything of ours that reads it."""

    name: str
    good: bytes
    mutated: Callable[[bytes, random.Random], bytes]
    read: Reader
    share: int
    accepted: Callable[[bytes], str] = lambda _data: ""
    """What is wrong with an accepted mutant by the specification; empty when nothing is."""
    guards: bool = False
    """Whether the file is what guards others, and not guarded itself."""
    told_only: bool = False
    """Whether the file is for people: no result depends on it, and no digest guards it."""


def run(count: int, *, seed: int, folder: Path) -> Campaign:
    """`count` mutants over all targets, the cheap ones more often."""
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL, passes=PASSES)
    began = time.process_time()
    _all(count, seed, folder, tally)
    tally.notes.append(f"{count / (time.process_time() - began):,.0f} mutants a second of processor time")
    return tally.result()


def control(*, seed: int, folder: Path) -> Campaign:
    """The same where damage that a reader cannot see meets no digest."""
    tally = Tally(FAULT, PROMISE, seed=seed, control=CONTROL, passes=PASSES)
    with _without_digests():
        _all(1500, seed, folder, tally)
    return tally.result()


def _all(count: int, seed: int, folder: Path, tally: Tally) -> None:
    folder = folder / "header-mutants"
    made = targets(folder / "readers")
    shares = [target.share for target in made]
    dice = random.Random(f"targets {seed}")
    for target in made:
        place = folder / target.name
        place.mkdir(parents=True, exist_ok=True)
        (place / target.name).write_bytes(target.good)
        # The reader must like the good file: a reader that refuses everything would pass every test.
        target.read(place)
        if not target.guards:
            (place / manifest.NAME).unlink(missing_ok=True)
            manifest.write_manifest(place, {})
    # Each in turn first, so that a small count has some of everything.
    size = max(1, min(BATCH, count // (2 * len(made))))
    first, done = list(made), 0
    while done < count:
        target = first.pop(0) if first else dice.choices(made, shares)[0]
        batch = min(size, count - done)
        _batch(target, folder / target.name, range(done, done + batch), seed, tally)
        done += batch


def _batch(target: Target, place: Path, trials: range, seed: int, tally: Tally) -> None:
    """Mutants of one file. Time and memory are watched over all of them: a bound holds for each if it does for all."""
    watch = Watch()
    largest = 0
    with watch.over(), alarmed(_BATCH_SECONDS):
        for trial in trials:
            data = target.mutated(target.good, random.Random(f"{seed} {trial}"))
            largest = max(largest, len(data))
            verdict, detail = attempt(target, place, data)
            tally.count(verdict, f"trial {trial} of seed {seed} ({target.name}): {detail}")
    if watch.bytes > SPARE_BYTES + largest:
        tally.count("memory", f"trials {trials} of seed {seed} ({target.name}): {watch.bytes:,} bytes")
    if watch.seconds > SECONDS * len(trials):
        tally.count("hang", f"trials {trials} of seed {seed} ({target.name}): {watch.seconds:.0f} s")


def attempt(target: Target, place: Path, data: bytes) -> tuple[str, str]:
    """Read one mutant and say how that ended."""
    path = place / target.name
    path.write_bytes(data)
    try:
        target.read(place)
    except LuthierError as refused:
        return ("refused", "") if refused.received and refused.exit_code != 1 else ("wrong-error", str(refused))
    except HangError as hang:
        return "hang", str(hang)
    except Exception as failure:  # noqa: BLE001 (whatever else leaves is what is looked for)
        return "traceback", f"{type(failure).__name__}: {str(failure)[:200]}; {data[:300]!r}"
    if data == target.good:
        return "same", ""
    if wrong := target.accepted(data):
        return "accepted", f"{wrong}; {data[:300]!r}"
    if target.told_only:
        return "harmless", ""
    if target.guards:
        return "accepted", f"altered and not noticed: {data[:300]!r}"
    try:
        manifest.verify(place)
    except CorruptError:
        return "digest", ""
    return "silent", f"altered and used: {data[:300]!r}"


@contextlib.contextmanager
def _without_digests() -> Iterator[None]:
    """Broken: whatever is in a folder is what its manifest says."""
    kept = manifest.verify
    manifest.verify = lambda folder: manifest.read_manifest(folder)
    try:
        yield
    finally:
        manifest.verify = kept


# ----------------------------------------------------------------------------------------------------------- targets


def targets(folder: Path) -> list[Target]:
    """Every file, as it is written by luthier itself."""
    from luthier.model.files import adapter_config

    folder.mkdir(parents=True, exist_ok=True)
    made = [
        Target("adapter_model.safetensors", _tensors(folder), mutate_header, _tensor_reader(), 60, wrong_tensors),
        Target("manifest.json", _manifest(folder), mutate_json, manifest.read_manifest, 12, guards=True),
        Target("adapter_config.json", _adapter_config(folder), mutate_json, _read_adapter, 10),
        Target(adapter_config.EXTRAS, _extras(), mutate_json, adapter_config.read_extras, 8),
        # The id in run.json is compared with that of each checkpoint: see flips.py.
        Target("run.json", _run_mark(), mutate_json, _read_run, 4, told_only=True),
        Target("status.json", _status(), mutate_json, _read_run_with_status, 4, told_only=True),
    ]
    return [*made, *_of_a_state(folder), *_of_a_config()]


def _tensor_reader() -> Reader:
    """The strict reader of tensor files."""
    if importlib.util.find_spec("luthier.model.files.tensor_files") is None:
        from luthier.model.files.adapter_config import tensor_sizes

        return tensor_sizes
    load = importlib.import_module("luthier.model.files.tensor_files").load_tensors
    return lambda place: load(place / "adapter_model.safetensors")


def _tensors(folder: Path) -> bytes:
    path = folder / "tensors.safetensors"
    dice = np.random.default_rng(0)
    tensors = {
        "base_model.model.layers.0.q.lora_A.weight": dice.standard_normal((4, 6)).astype(np.float32),
        "base_model.model.layers.0.q.lora_B.weight": dice.standard_normal((6, 4)).astype(np.float16),
        "scale": np.float32([1.5]),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


def _manifest(folder: Path) -> bytes:
    place = folder / "manifested"
    place.mkdir(exist_ok=True)
    (place / manifest.NAME).unlink(missing_ok=True)
    (place / "state.json").write_bytes(b"{}")
    (place / "ü.bin").write_bytes(b"1234")
    return manifest.write_manifest(place, {"step": 3, "run": "ab", "facts": {"torch": "2", "loss": 0.5}}).encoded()


def _adapter_config(folder: Path) -> bytes:
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "revision": None,
        "inference_mode": True, "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
        "bias": "none", "use_rslora": False, "use_dora": False, "layers_to_transform": None, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def _read_adapter(place: Path) -> object:
    from luthier.adapters import adapter_of
    from luthier.model.files.adapter_config import read_config

    tensors = place / "adapter_model.safetensors"
    if not tensors.exists():
        save_file({"base_model.model.q.lora_A.weight": np.zeros((1, 1), np.float32)}, tensors)
    return adapter_of(read_config(place))


def _extras() -> bytes:
    values = {"base_digest": "ab" * 32, "run": "r", "stop_ids": [1, 2], "template": "auto", "precision": "float32"}
    return json.dumps({**values, "base_seed": 0}, indent=2, sort_keys=True).encode() + b"\n"


def _run_mark() -> bytes:
    return json.dumps({"format": 1, "id": "ab" * 16, "name": "r", "created": "2026-11-21T10:00:00+00:00"}).encode()


def _status() -> bytes:
    values = {"step": 3, "steps": 8, "loss": 1.5}
    return json.dumps({"state": "stopped", "reason": "x", "updated": "now", "values": values}, indent=2).encode()


def _read_run(place: Path) -> object:
    from luthier.store.runs import RunDirectory

    return RunDirectory.open(place).status()


def _read_run_with_status(place: Path) -> object:
    if not (place / "run.json").exists():
        (place / "run.json").write_bytes(_run_mark())
    return _read_run(place)


def _of_a_state(folder: Path) -> list[Target]:
    """The two files of a checkpoint, read as a resumed run reads them."""
    import torch

    from luthier.adapters import Adapter
    from luthier.core.chosen import choose
    from luthier.objectives.sft import SFT
    from luthier.optimizers import Optimizer
    from luthier.train.state import NUMBERS, TENSORS, LoopState, load_state, take_snapshot
    from luthier.train.stepper import Stepper
    from tests import forests

    def stepper() -> Stepper:
        model = forests.language_model("llama")
        attachment = model.attach(choose("adapters", Adapter, "ia3").attach(model.sites))
        return Stepper(model, attachment, SFT(), choose("optimizers", Optimizer, "adamw"))

    trained = stepper()
    trained.forward_backward(forests.rows(2))
    trained.optim_step()
    place = folder / "state"
    place.mkdir(exist_ok=True)
    take_snapshot(LoopState(step=1, total_steps=3, first_loss=1.5), trained, {3: 0.5}).write(place)
    numbers, tensors = (place / NUMBERS).read_bytes(), (place / TENSORS).read_bytes()
    reader = stepper()

    def read(other: str, content: bytes) -> Reader:
        def reads(where: Path) -> object:
            if not (where / other).exists():
                (where / other).write_bytes(content)
            with torch.random.fork_rng(devices=[]):
                return load_state(where, reader)

        return reads

    return [
        Target(NUMBERS, numbers, mutate_json, read(TENSORS, tensors), 3),
        Target(TENSORS, tensors, mutate_header, read(NUMBERS, numbers), 2, wrong_tensors),
    ]


def _of_a_config() -> list[Target]:
    """The configuration of a model, read as loading it would."""
    from tests.tiny import tiny_config

    good = json.dumps({**tiny_config("llama").to_dict(), "architectures": ["LlamaForCausalLM"]}, default=str).encode()

    def read(place: Path) -> object:
        from luthier.model.files.configs import config_of

        return config_of(str(place))

    return [Target("config.json", good, mutate_json, read, 1)]
