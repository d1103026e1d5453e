"""The state of a run: declared once, saved from that declaration, restored into it.

`LoopState` holds every number the loop carries from step to step. With the trained parameters, what their edits have
found at the start, the optimizer's tensors and numbers and the random generators it is all that a resumed run needs to
go on bit for bit. Tensors are written as safetensors, numbers as JSON; nothing is pickled.

A `Snapshot` is a copy of all that as it is now, so that it can be written while training goes on.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.core.errors import CorruptError, NumericError, RecipeError
from luthier.core.events import plain
from luthier.model.files.array_views import array_of
from luthier.model.files.shards import write_arrays
from luthier.store.manifest import Entry
from luthier.train.source import Cursor, Source
from luthier.train.stepper import Stepper

TENSORS = "state.safetensors"
NUMBERS = "state.json"


_OWED = "owed"
_ROWS = "best-rows"


@dataclass
class LoopState:
    """Every number that one step hands to the next. Losses are sums with their weights, so that means stay exact.

    `metrics` are an objective's own, of the first evaluation and of the best one, and none of one that is owed: see
    `unseen`. Beside them stand the rows of the best one, where it has not scored all: see `best_rows`.
    """

    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    used: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    train_seconds: float = 0.0
    micro_tokens: int = 0
    events_bytes: int = 0
    samples_bytes: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.used)

    @property
    def unseen(self) -> bool:
        """Whether the step was saved before what follows it (evaluation, samples), as whoever was asked was away."""
        return _OWED in self.metrics

    @unseen.setter
    def unseen(self, owed: bool) -> None:
        self.metrics.pop(_OWED, None)
        if owed:
            self.metrics[_OWED] = {}


    @property
    def best_rows(self) -> dict[int, float]:
        """The loss of each row that the best evaluation has scored; nothing where it has scored all that there are."""
        return {int(row): loss for row, loss in self.metrics.get(_ROWS, {}).items()}

    @best_rows.setter
    def best_rows(self, rows: Mapping[int, float]) -> None:
        self.metrics.pop(_ROWS, None)
        if rows:
            self.metrics[_ROWS] = {str(row): loss for row, loss in rows.items()}


@final
@dataclass(frozen=True)
class Snapshot:
    """Everything a resumed run needs, as it was at one step. Make one with `take_snapshot`."""

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """About how much space it takes on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + 200 * len(self.tensors) + (1 << 16)

    def require_finite(self) -> None:
        """Raise NumericError when a number in it is not finite: such a state is never saved."""
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NumericError(
                    f"after step {self.step}, {name} holds numbers that are not finite; the state is not saved",
                    do="lower optimizer.learning_rate, or use precision float32",
                )

    def write(self, folder: Path) -> dict[str, Entry]:
        """Write it into `folder`; size and digest of the tensors' file, as they were handed over."""
        written = write_arrays(folder / TENSORS, {name: array_of(tensor) for name, tensor in self.tensors.items()})
        (folder / NUMBERS).write_text(json.dumps(plain(self.numbers), allow_nan=False), encoding="utf-8")
        return {TENSORS: written}


def take_snapshot(
    state: LoopState,
    stepper: Stepper,
    row_excess: Mapping[int, float],
    *,
    held: Mapping[str, NDArray[Any]] | None = None,
    copied: bool = True,
) -> Snapshot:
    """What a run is now; `held` is what its source holds. Without `copied` its tensors may be the live ones: training
    must wait until it is written."""
    tensors: dict[str, Tensor] = {f"master/{name}": tensor for name, tensor in stepper.masters.items()}
    tensors |= {f"source/{name}": torch.from_numpy(np.array(each)) for name, each in (held or {}).items()}
    # They do not change while it is written, so the live ones do.
    constants = {f"constant/{name}": _apart(tensor, False) for name, tensor in stepper.constants.items()}
    numbers: dict[str, dict[str, object]] = {}
    _require_owned(stepper)
    for name, master in stepper.masters.items():
        for key, value in stepper.optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = _kept(key, value)
    content = {
        "loop": asdict(state),
        "tensors": {key: list(tensor.shape) for key, tensor in {**tensors, **constants}.items()},
        "optimizer": numbers,
        "groups": [_beside_tensors(group) for group in stepper.optimizer.param_groups],
        "first_groups": [_beside_tensors(group) for group in stepper.first_groups],
        "random": _random(),
        "row_excess": {str(row): loss for row, loss in row_excess.items()},
    }
    own = {key: _apart(tensor, copied) for key, tensor in tensors.items()}
    return Snapshot(state.step, {**own, **constants}, content)


def load_state(folder: Path, stepper: Stepper, source: Source | None = None) -> tuple[LoopState, dict[int, float]]:
    """Restore parameters, optimizer, random generators, and what the `source` held; give back the loop's numbers.

    Strict: every tensor of the file is used and every expected one must be there. Raises CorruptError otherwise.
    """
    content = _read_numbers(folder)
    unused = load_parameters(folder, stepper)
    with safe_open(folder / TENSORS, framework="pt") as file:
        for name, constant in stepper.constants.items():
            constant.copy_(file.get_tensor(f"constant/{name}"))
            unused.remove(f"constant/{name}")
        for name, master in stepper.masters.items():
            prefix = f"optimizer/{name}/"
            found = {key[len(prefix) :]: file.get_tensor(key) for key in sorted(unused) if key.startswith(prefix)}
            unused -= {prefix + key for key in found}
            numbers = content.optimizer.get(name, {})
            if found or numbers:
                stepper.optimizer.state[master] = {**{k: _place(k, v, master) for k, v in found.items()}, **numbers}
        if source is not None:
            own = sorted(key for key in unused if key.startswith("source/"))
            source.hold({key.removeprefix("source/"): file.get_tensor(key).numpy() for key in own})
            unused -= set(own)
    if unused:
        raise CorruptError(f"{folder / TENSORS} holds tensors that nothing expects: {', '.join(sorted(unused)[:3])}")
    _restore_groups(stepper, content, folder / NUMBERS)
    _restore_random(content.random, content.cuda, folder / NUMBERS)
    return content.loop, content.row_excess


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


@final
@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of a state as they are needed again, every one of its type."""

    loop: LoopState
    shapes: Mapping[str, tuple[int, ...]]
    optimizer: Mapping[str, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    first_groups: Sequence[Mapping[str, Any]]
    random: Tensor
    cuda: Sequence[Tensor]
    row_excess: dict[int, float]


def _read_numbers(folder: Path) -> _Numbers:
    """The numbers of a state. Raises CorruptError unless each is there and is what it has to be."""
    try:
        content = json.loads((folder / NUMBERS).read_text("utf-8"))
        return _Numbers(
            loop=_loop(content["loop"]),
            shapes={key: tuple(shape) for key, shape in content["tensors"].items()},
            optimizer={name: _all_restored(kept) for name, kept in content["optimizer"].items()},
            groups=[_all_restored(group) for group in content["groups"]],
            first_groups=[_all_restored(group) for group in content["first_groups"]],
            random=_bytes(content["random"]["torch"]),
            cuda=[_bytes(state) for state in content["random"]["cuda"]],
            row_excess={int(row): float(loss) for row, loss in content["row_excess"].items()},
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as failure:
        raise CorruptError(
            f"{folder / NUMBERS} is damaged, or of another version: {type(failure).__name__}: {str(failure)[:200]}"
        ) from None


def _loop(saved: Mapping[str, Any]) -> LoopState:
    """The loop's numbers. Raises ValueError when one is missing, not known, or of another kind."""
    expected = {field.name: str(field.type) for field in fields(LoopState)}
    if differing := expected.keys() ^ saved.keys():
        raise ValueError(f"other numbers of the loop: {', '.join(sorted(differing))[:200]}")
    loop: dict[str, Any] = {key: _number(value) for key, value in saved.items() if key != "metrics"}
    for key, value in loop.items():
        kinds = (int, float) if "float" in expected[key] else (int,)
        if not (type(value) in kinds or (value is None and "None" in expected[key])):
            raise ValueError(f"{key} is {str(value)[:50]!r}")
    return LoopState(**loop, metrics={str(when): _metrics(each) for when, each in saved["metrics"].items()})


def _metrics(saved: Mapping[str, Any]) -> dict[str, float]:
    """An objective's own numbers of an evaluation."""
    found = {str(name): _number(each) for name, each in saved.items()}
    if not all(type(each) in (int, float) for each in found.values()):
        raise ValueError(f"metrics are {str(saved)[:50]!r}")
    return found


def _check_tensors(folder: Path, stepper: Stepper) -> set[str]:
    """The names of the file's tensors. Raises CorruptError unless they are those that were saved, and those needed."""
    expected = _read_numbers(folder).shapes
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as failure:
        raise CorruptError(f"{folder / TENSORS} cannot be read: {failure}") from None
    if found != expected:
        differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise CorruptError(f"{folder / TENSORS} does not hold the tensors that were saved: {', '.join(differing[:3])}")
    for kind, needed in (("master", stepper.masters), ("constant", stepper.constants)):
        for name, tensor in needed.items():
            if found.get(f"{kind}/{name}") != tuple(tensor.shape):
                raise CorruptError(
                    f"{folder / TENSORS} has {found.get(f'{kind}/{name}', 'nothing')} for {name}",
                    allowed=str(tuple(tensor.shape)),
                    do="the recipe's adapter differs from the run's",
                )
    return set(found)


def _restore_groups(stepper: Stepper, content: _Numbers, path: Path) -> None:
    """What the optimizer has kept for each group. What the recipe now sets otherwise (an accepted drift) stays so."""
    groups, first = stepper.optimizer.param_groups, stepper.first_groups
    if not len(groups) == len(content.groups) == len(content.first_groups):
        raise CorruptError(
            f"{path} has {len(content.groups)} groups of parameters",
            allowed=f"{len(groups)}",
            do="the recipe's adapter or optimizer divides them otherwise than the run's: take its knobs back",
        )
    for group, saved, now, then in zip(groups, content.groups, first, content.first_groups, strict=True):
        group.update({key: value for key, value in saved.items() if now.get(key) == then.get(key)})


def _beside_tensors(group: Mapping[str, Any]) -> dict[str, object]:
    """What an optimizer keeps for a group. Its rate is set anew at each step."""
    return {key: _kept(key, value) for key, value in group.items() if key not in ("params", "lr")}


def _require_owned(stepper: Stepper) -> None:
    """Raise RecipeError when the optimizer keeps something that belongs to no single parameter: it would not be saved
    at all, or come back as several things where there was one."""
    optimizer = stepper.optimizer
    masters = list(stepper.masters.values())
    known, owners = {id(master) for master in masters}, list[object](optimizer.state)
    for owner in owners:
        if id(owner) not in known:
            raise _unsaveable(f"state for {owner if isinstance(owner, str) else type(owner).__name__!r}")
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*masters, *stepper.parameters.values())}
    for master in masters:
        for key, value in optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor) and value.nbytes:
                place = value.untyped_storage().data_ptr()
                if place in memory:
                    raise _unsaveable(f"tensor ({key}) that shares its memory with another")
                memory.add(place)


def _kept(key: object, value: object) -> object:
    """A value that an optimizer keeps beside its tensors, as JSON can hold it; `_restored` makes it again."""
    if not isinstance(key, str):
        raise _unsaveable(f"value named {key!r}")
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, tuple):
        return {"tuple": [_kept(key, item) for item in value]}
    if value is None or type(value) in (bool, int, float):
        return value
    raise _unsaveable(f"{type(value).__name__} ({key})")


def _all_restored(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _restored(value) for key, value in kept.items()}


def _restored(value: Any) -> Any:
    """What `_kept` has made. Raises ValueError for anything else."""
    if isinstance(value, dict) and set(value) == {"text"} and isinstance(value["text"], str):
        return value["text"]
    if isinstance(value, dict) and set(value) == {"tuple"}:
        return tuple(_restored(item) for item in value["tuple"])
    number = _number(value)
    if number is None or type(number) in (bool, int, float):
        return number
    raise ValueError(f"the optimizer kept {str(value)[:50]!r}")


def _unsaveable(what: str) -> RecipeError:
    return RecipeError(
        f"the optimizer keeps a {what}, which cannot be saved",
        allowed="for each parameter tensors of its own, numbers and texts; for each group numbers and texts",
        do="use another optimizer.method",
    )


def _apart(tensor: Tensor, copied: bool) -> Tensor:
    """The tensor on the CPU, contiguous, and with memory of its own if it is to be `copied`."""
    here = tensor.detach().to("cpu", copy=copied)
    return here.contiguous()


def _place(key: str, value: Tensor, master: Tensor) -> Tensor:
    # Step counters stay where torch keeps them (on the CPU unless fused on a GPU); moments follow their parameter.
    return value if value.ndim == 0 and master.device.type == "cpu" else value.to(master.device)


def _random() -> dict[str, object]:
    # Torch's generators only. Python's and NumPy's global ones are drawn from by libraries whenever they like: two runs
    # of one recipe leave Python's in different states. Nothing of ours may depend on them.
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _restore_random(state: Tensor, cuda: Sequence[Tensor], path: Path) -> None:
    try:
        torch.set_rng_state(state)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
    except RuntimeError as failure:
        raise CorruptError(f"{path} holds no state of random generators: {failure}") from None


def _number(value: Any) -> Any:
    # JSON has no numbers that are not finite; they stand there as texts (core/events.py).
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8).clone()
