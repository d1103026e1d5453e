"""A race behind the walls: a reference and then a candidate, each timed on inputs of its own.

Idea: this file is run in the sandbox, as a program whose functions are called from outside (`rewards/kernel_speed.py`).
The reference is timed and forgotten before the candidate is read, so nothing that a candidate does makes it slow or
lets it be called. Clocks, events and what draws inputs are taken hold of before either comes. The caches of the device
are emptied between repetitions; each repetition has inputs that nobody has seen; what it gave is kept, and looked at
when all clocks have stopped, at places that are told then. Memory for it is asked for before the clock runs: on a GPU
that takes longer than most kernels. Each call is timed outside too, by a clock that is not here.
Source: Ouyang et al., arXiv 2502.10517 (KernelBench), and the ways around its timer that people have found since
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import linecache
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, Protocol, final, runtime_checkable

import torch
from torch.overrides import TorchFunctionMode

CACHE_BYTES: Final = {"cpu": 1 << 23, "cuda": 1 << 28}
"""More than the caches nearest to the arithmetic hold."""
EMPTIED: Final = 4
"""How often caches are emptied before a repetition: it keeps a GPU busy for longer than a launch from Python takes."""
_ENTRANT: Final = "entrant.py"
_randn, _zero, _same, _like = torch.randn, torch.Tensor.zero_, torch.equal, torch.empty_like


@runtime_checkable
class Stopwatch(Protocol):
    """Where programs run, and how long they take there."""

    device: str

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What the work gives, and the seconds it took, from caches that hold nothing of it."""

    def reserve(self, like: torch.Tensor, count: int) -> None:
        """Have memory at hand for as many more tensors."""


@final
class CpuStopwatch:
    """The processor time of this thread: what waits while others work is not counted. There are no other threads."""

    device = "cpu"

    def __init__(self, clock: Callable[[], int] = time.thread_time_ns) -> None:
        self._clock = clock
        self._cache = torch.empty(CACHE_BYTES["cpu"], dtype=torch.int8)

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        _zero(self._cache)
        clock = self._clock
        began = clock()
        made = work()
        return made, (clock() - began) * 1e-9

    def reserve(self, like: torch.Tensor, count: int) -> None:
        """Nothing: memory is given page by page, when it is written."""


@final
class CudaStopwatch:
    """Events of the stream that work is put on. While caches are emptied the work is put in line, so that it waits
    for nothing; then all streams are waited for, so that none goes on unseen by whoever watches from outside.
    """

    device = "cuda"

    def __init__(
        self, event: Callable[[], Any], record: Callable[[Any], None], elapsed: Callable[[Any, Any], float],
        wait: Callable[[], None], empty: Callable[[], object],
    ) -> None:  # fmt: skip
        self._event, self._record, self._elapsed, self._wait, self._empty = event, record, elapsed, wait, empty

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        began, ended = self._event(), self._event()
        self._wait()
        self._empty()
        self._record(began)
        made = work()
        self._record(ended)
        self._wait()
        return made, self._elapsed(began, ended) * 1e-3

    def reserve(self, like: torch.Tensor, count: int) -> None:
        """Ask for it and give it back: PyTorch keeps it for whoever comes next."""
        held = [_like(like) for _ in range(count)]
        del held


def cuda_stopwatch() -> CudaStopwatch:
    """Of the first GPU, by the functions beneath `torch.cuda`: those above it can be replaced."""
    cache = torch.empty(CACHE_BYTES["cuda"], dtype=torch.int8, device="cuda")
    stream, kind = torch.cuda.current_stream(), torch._C._CudaEventBase
    record, elapsed, wait = kind.record, kind.elapsed_time, torch._C._cuda_synchronize
    return CudaStopwatch(
        lambda: kind(enable_timing=True), lambda event: record(event, stream), elapsed, wait,
        lambda: [_zero(cache) for _ in range(EMPTIED)],
    )  # fmt: skip


@final
class Race:
    """Programs that are called again and again. `arguments` are sizes of tensors of normal numbers, or numbers."""

    def __init__(self, stopwatch: Stopwatch, arguments: Sequence[list[int] | int | float]) -> None:
        self._stopwatch = stopwatch
        self._arguments = tuple(arguments)
        self._function: Callable[..., Any] | None = None
        self._allowed: frozenset[str] | None = None
        self._drawn: list[tuple[int, list[Any]]] = []
        self._made: list[tuple[Any, bool]] = []

    def enter(self, function: str, source: str, allowed: Sequence[str] | None = None) -> None:
        """Read a program; whoever was there before is forgotten. Of PyTorch it may use what is `allowed`, or all."""
        self._function = None
        self._drawn, self._made = [], []
        self._allowed = None if allowed is None else frozenset(allowed)
        self._function = getattr(_module(source), function)

    def draw(self, seeds: Sequence[int]) -> None:
        """Inputs for as many repetitions as there are seeds."""
        self._settle()
        self._drawn = [(seed, self._inputs(seed)) for seed in seeds]
        last = self._made[-1][0] if self._made else None
        if isinstance(last, torch.Tensor):
            self._stopwatch.reserve(last, len(seeds))

    def timed(self) -> list[float]:
        """Seconds of each repetition."""
        found = []
        for _, inputs in self._drawn:
            made, seconds = self._stopwatch.timed(lambda inputs=inputs: self._answer(inputs))  # type: ignore[misc]
            self._made.append((made, True))
            found.append(seconds)
        return found

    def values(self, places: Sequence[float]) -> list[list[Any]]:
        """Of each repetition so far: kind, sizes, the values at these places (0 to 1), were inputs left alone?"""
        self._settle()
        return [[*_looked_at(made, places), untouched] for made, untouched in self._made]

    def _answer(self, inputs: list[Any]) -> Any:
        function = self._function
        if function is None:
            raise ValueError("nobody has entered")
        if self._allowed is None:
            return function(*inputs)
        with _Guard(self._allowed):
            return function(*inputs)

    def _settle(self) -> None:
        """See whether the inputs of the last repetitions are what was drawn, and let go of them."""
        first = len(self._made) - len(self._drawn)
        for at, (seed, inputs) in enumerate(self._drawn, start=first):
            pairs = zip(inputs, self._inputs(seed), strict=True)
            untouched = all(_same(one, other) for one, other in pairs if isinstance(one, torch.Tensor))
            self._made[at] = (self._made[at][0], untouched)
        self._drawn = []

    def _inputs(self, seed: int) -> list[Any]:
        device = self._stopwatch.device
        source = torch.Generator(device).manual_seed(seed)
        return [
            _randn(each, generator=source, device=device) if isinstance(each, list) else each
            for each in self._arguments
        ]


@final
class _Guard(TorchFunctionMode):
    """PyTorch without what is not allowed."""

    def __init__(self, allowed: frozenset[str]) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_function__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = getattr(operation, "__name__", str(operation))
        if name not in self._allowed:
            raise ValueError(f"PyTorch computes: {name}")
        return operation(*arguments, **(keywords or {}))


@final
class _Text(importlib.abc.ExecutionLoader):
    """Lets a module be imported from its text."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_filename(self, fullname: str) -> str:
        return _ENTRANT


def _module(source: str) -> ModuleType:
    """A program as a module, with its text where `inspect` looks: Triton compiles no kernel without it."""
    linecache.cache[_ENTRANT] = (len(source), None, source.splitlines(True), _ENTRANT)
    loader = _Text(source)
    found = importlib.util.spec_from_loader("entrant", loader, origin=_ENTRANT)
    if found is None:
        raise ImportError("no module can be made of the program")
    module = importlib.util.module_from_spec(found)
    sys.modules["entrant"] = module
    loader.exec_module(module)
    return module


def _looked_at(made: Any, places: Sequence[float]) -> list[Any]:
    if type(made) is not torch.Tensor:
        raise TypeError(f"the function gave {type(made).__name__}, no tensor")
    flat = made.detach().reshape(-1)
    at = [min(int(place * flat.numel()), flat.numel() - 1) for place in places] if flat.numel() else []
    return [str(made.dtype), list(made.shape), flat[torch.tensor(at, dtype=torch.long, device=flat.device)].tolist()]
