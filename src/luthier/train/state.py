"""The state of a run: declared once, saved from that declaration, restored into it.

`LoopState` holds every number the loop carries from step to step. With the trained parameters, the optimizer's tensors
and the random generators it is all that a resumed run needs to go on bit for bit. Tensors are written as safetensors,
numbers as JSON; nothing is pickled.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.core.errors import CorruptError
from luthier.core.events import plain
from luthier.train.source import Cursor
from luthier.train.stepper import Stepper

TENSORS = "state.safetensors"
NUMBERS = "state.json"


@dataclass
class LoopState:
    """Every number that one step hands to the next. Losses are sums with their weights, so that means stay exact."""

    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    used: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    bad_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    train_seconds: float = 0.0
    events_bytes: int = 0
    samples_bytes: int = 0

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.used)


def save_state(folder: Path, state: LoopState, stepper: Stepper, row_excess: dict[int, float]) -> None:
    """Write everything a resumed run needs into `folder`."""
    tensors: dict[str, Tensor] = {f"master/{name}": tensor for name, tensor in stepper.masters.items()}
    numbers: dict[str, object] = {}
    for name, master in stepper.masters.items():
        for key, value in stepper.optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / TENSORS)
    content = {
        "loop": asdict(state),
        "tensors": {key: list(tensor.shape) for key, tensor in tensors.items()},
        "optimizer": numbers,
        "random": {"torch": _text(torch.get_rng_state()), **_cuda_random()},
        "row_excess": {str(row): loss for row, loss in row_excess.items()},
    }
    (folder / NUMBERS).write_text(json.dumps(plain(content), allow_nan=False), encoding="utf-8")


def load_state(folder: Path, stepper: Stepper) -> tuple[LoopState, dict[int, float]]:
    """Restore parameters, optimizer and random generators; give back the loop's numbers.

    Strict: every tensor of the file is used and every expected one must be there. Raises CorruptError otherwise.
    """
    content = _read_numbers(folder)
    unused = load_parameters(folder, stepper)
    with safe_open(folder / TENSORS, framework="pt") as file:
        for name, master in stepper.masters.items():
            prefix = f"optimizer/{name}/"
            found = {key[len(prefix) :]: file.get_tensor(key) for key in sorted(unused) if key.startswith(prefix)}
            unused -= {prefix + key for key in found}
            numbers = {key.rpartition("/")[2]: _number(value) for key, value in content["optimizer"].items()
                       if key.rpartition("/")[0] == name}
            if found or numbers:
                stepper.optimizer.state[master] = {**{k: _place(k, v, master) for k, v in found.items()}, **numbers}
    if unused:
        raise CorruptError(f"{folder / TENSORS} holds tensors that nothing expects: {', '.join(sorted(unused)[:3])}")
    _restore_random(content["random"])
    loop = {key: _number(value) for key, value in content["loop"].items()}
    return LoopState(**loop), {int(row): _number(loss) for row, loss in content["row_excess"].items()}


@torch.no_grad()
def load_parameters(folder: Path, stepper: Stepper) -> set[str]:
    """Restore the trained parameters alone; give back the names of the file's other tensors.

    Nothing is restored unless the file holds exactly the tensors that were saved, and one for each parameter.
    """
    names = _check_tensors(folder, stepper)
    with safe_open(folder / TENSORS, framework="pt") as file:
        for name, master in stepper.masters.items():
            master.copy_(file.get_tensor(f"master/{name}"))
            names.remove(f"master/{name}")
            if stepper.parameters[name] is not master:
                stepper.parameters[name].copy_(master)
    return names


def _read_numbers(folder: Path) -> dict[str, Any]:
    """The numbers of a state, all of them."""
    try:
        content = json.loads((folder / NUMBERS).read_text("utf-8"))
    except (OSError, ValueError) as failure:
        raise CorruptError(f"{folder / NUMBERS} cannot be read: {failure}") from None
    parts = {"loop", "tensors", "optimizer", "random", "row_excess"}
    missing = parts - set(content) if isinstance(content, dict) else parts
    numbers = {field.name for field in fields(LoopState)}
    if missing or set(content["loop"]) != numbers:
        lacking = missing or numbers ^ set(content["loop"])
        raise CorruptError(f"{folder / NUMBERS} is not whole, or of another version: {', '.join(sorted(lacking))}")
    return content


def _check_tensors(folder: Path, stepper: Stepper) -> set[str]:
    """The names of the file's tensors. Raises CorruptError unless they are those that were saved, and those needed."""
    expected = {key: tuple(shape) for key, shape in _read_numbers(folder)["tensors"].items()}
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as failure:
        raise CorruptError(f"{folder / TENSORS} cannot be read: {failure}") from None
    if found != expected:
        differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise CorruptError(f"{folder / TENSORS} does not hold the tensors that were saved: {', '.join(differing[:3])}")
    for name, master in stepper.masters.items():
        if found.get(f"master/{name}") != tuple(master.shape):
            raise CorruptError(
                f"{folder / TENSORS} has {found.get(f'master/{name}', 'nothing')} for {name}",
                allowed=str(tuple(master.shape)),
                do="the recipe's adapter differs from the run's",
            )
    return set(found)


def _place(key: str, value: Tensor, master: Tensor) -> Tensor:
    # Step counters stay where torch keeps them (on the CPU unless fused on a GPU); moments follow their parameter.
    return value if value.ndim == 0 and master.device.type == "cpu" else value.to(master.device)


def _cuda_random() -> dict[str, list[str]]:
    if not torch.cuda.is_available():
        return {}
    states = torch.cuda.get_rng_state_all()
    return {"cuda": [_text(state) for state in states]}


def _restore_random(saved: dict[str, object]) -> None:
    torch.set_rng_state(_bytes(str(saved["torch"])))
    cuda = saved.get("cuda")
    if isinstance(cuda, list) and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes(state) for state in cuda])


def _number(value: Any) -> Any:
    # JSON has no numbers that are not finite; they stand there as texts (core/events.py).
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()
