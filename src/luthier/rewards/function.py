"""Function: a reward function of your own, in a Python file; what TRL calls works here as it is.

Idea: `rewards.py:polite` is called once for a batch with prompts, completions, completion_ids, trainer_state,
log_extra, log_metric and every column of the rows, by keyword, and gives a number for each completion, or None where it
does not apply. It may be async. A prompt that its row writes as a text comes as a text, with a text for an answer, one
of messages as messages, as in TRL; in an exchange with an environment all is messages. A function that does not take
any keyword gets those it names. The file is yours and runs in our process, as a recipe does; what a model has
written belongs into the sandbox (passes_tests), never into such a function.
Equation: r = f(prompts, completions, completion_ids, columns)
Source: TRL 1.16, `GRPOTrainer` and its reward functions (github.com/huggingface/trl)
Cost: that of the function.
Use when: what is good is easily said in Python, or a reward function for TRL is there already.
Not when: it runs programs that a model wrote, or only compares texts (the other rewards do).
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.abc import Loader
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Final, Literal, final

from pydantic import Field, model_validator

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.cases import shown
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict


@final
class Function(Reward):
    """A function in a Python file."""

    path: str = Field("", description="the file and the function in it: rewards.py:polite")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="if the function makes the reward function: what it is called with first"
    )
    form: Literal["auto", "messages", "text"] = Field(
        "auto", description="prompts and completions as messages or as texts; auto: as the row writes its prompt"
    )
    seconds: float = Field(
        600.0, gt=0,
        description="the longest that one call may take; then it has failed (no limit in a thread, beside an engine)",
    )  # fmt: skip
    least: float | None = Field(None, description="the least it may give, if there is one; less is an error")
    most: float | None = Field(None, description="the most it may give, if there is one; more is an error")

    @model_validator(mode="after")
    def _there(self) -> Function:
        _load(self.path)
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        return (-math.inf if self.least is None else self.least, math.inf if self.most is None else self.most)

    @property
    def columns(self) -> tuple[str, ...]:
        """The arguments without a default, but for those that are always there."""
        taken = inspect.signature(self._function()).parameters.values()
        asked = [each.name for each in taken if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        return tuple(name for name in asked if name not in _ALWAYS)

    def _function(self) -> Callable[..., Any]:
        function = _load(self.path)
        made = function(**self.arguments) if self.arguments else function
        if not callable(made):
            raise RecipeError(f"{self.path} gives {made!r}", allowed="a function, when it is called with arguments")
        return made

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        if not samples:
            return []
        call = _Call(samples, tools, self.form, self.seconds)
        found = call.make(self._function(), self.path)
        if call.failure is not None:
            place = _line_in(call.failure, self.path.rpartition(":")[0])
            told = f"{self.path} raised {type(call.failure).__name__}: {call.failure}{place}"
            return [_error(told, sample, call.failure) for sample in samples]
        numbers = _listed(found)
        if numbers is None or len(numbers) != len(samples):
            size = f"{len(numbers)} values" if numbers is not None else shown(found)
            told = f"{self.path} gave {size} for {len(samples)} samples"
            # Asked about one of them alone it would look right: a mean, or the value of the first.
            return [
                RewardError(told, allowed="one number, or None, for each").of(sample, again=False) for sample in samples
            ]
        return [self._verdict(value, at, call) for at, value in enumerate(numbers)]

    def _verdict(self, value: object, at: int, call: _Call) -> Verdict:
        if value is None:
            return None
        # Numbers of numpy and torch give their own by `item`.
        number = item() if callable(item := getattr(value, "item", None)) else value
        least, most = self.bounds
        if not isinstance(number, int | float) or not least <= number <= most or not _is_float(number):
            allowed = f"a number from {least:g} to {most:g}, or None"
            return RewardError(f"{self.path} gave {shown(value)}", allowed=allowed).of(call.samples[at])
        whole = {name: values[at] for name, values in call.extras.items() if len(values) == len(call.samples)}
        extras = {name: float(extra) for name, extra in whole.items() if isinstance(extra, int | float)}
        return Score(float(number), call.metrics | extras, f"{self.path.rpartition(':')[2]} gave {float(number):g}")


_OF_FILES: Final = (
    ImportError, SyntaxError, OSError, ValueError, TypeError, AttributeError, NameError, LookupError, ArithmeticError,
    AssertionError, RuntimeError, SystemExit,
)  # fmt: skip
"""What a file of somebody else's raises when it is read."""
_ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class TrainerState:
    """What a reward function may ask of training, by TRL's names."""

    global_step: int
    max_steps: int


@dataclass
class _Call:
    """One call of the function, with what it logs and how it fails."""

    samples: Sequence[Sample]
    tools: Tools
    form: str
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Sequence[Any]] = field(default_factory=dict)
    failure: Exception | None = None

    def make(self, function: Callable[..., Any], path: str) -> Any:
        """What the function gives; `failure` is set where it raises."""
        given = self._keywords()
        taken = inspect.signature(function).parameters.values()
        if not any(each.kind is each.VAR_KEYWORD for each in taken):
            given = {name: value for name, value in given.items() if name in {each.name for each in taken}}
        try:
            with _at_most(self.seconds):
                found = function(**given)
                return asyncio.run(found) if inspect.iscoroutine(found) else found
        except SystemExit as failure:
            self.failure = RuntimeError(f"it left with sys.exit({'' if failure.code is None else failure.code!r})")
            self.failure.__traceback__ = failure.__traceback__
        except Exception as failure:  # noqa: BLE001
            # It is somebody else's code, and whatever it raises is told with the samples.
            self.failure = failure

    def _keywords(self) -> dict[str, Any]:
        # As in TRL, the columns are those of the first row.
        names = [name for name in self.samples[0].facts if name not in ("prompt", "completion", "completion_ids")]
        return {
            "prompts": [_prompt(sample, self.form) for sample in self.samples],
            "completions": [_completion(sample, self.form) for sample in self.samples],
            "completion_ids": [list(sample.tokens) for sample in self.samples],
            **{name: [sample.fact(name) for sample in self.samples] for name in names},
            "trainer_state": TrainerState(self.tools.step, self.tools.steps),
            "log_extra": self.extras.__setitem__,
            "log_metric": lambda name, value: self.metrics.__setitem__(name, float(value)),
        }


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken so long; in another thread than the first there is no limit.

    The alarm of signals interrupts waiting too. Functions that set one of their own, as math-verify does, take ours
    away, and keep to their own limit. An alarm that was set before goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    handler, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    before, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(before - time.monotonic() + began, 1e-3), again)


def _listed(found: Any) -> list[Any] | None:
    """What a function gave, one by one: a list, or an array of numpy or torch with one dimension; None for others."""
    array = getattr(found, "tolist", None)
    if callable(array) and getattr(found, "ndim", 0) == 1:
        return list(array())
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str | bytes) else None


def _is_float(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def _prompt(sample: Sample, form: str) -> Any:
    if form == "auto" and sample.plain is not None:
        return sample.plain
    if isinstance(sample.prompt, str):
        return [{"role": "user", "content": sample.prompt}] if form == "messages" else sample.prompt
    if form == "text":
        return "\n\n".join(message.content for message in sample.prompt)
    return [{"role": message.role, "content": message.content} for message in sample.prompt]


def _completion(sample: Sample, form: str) -> Any:
    plain = form == "text" or (form == "auto" and sample.plain is not None)
    return sample.answer if plain else [{"role": "assistant", "content": sample.answer}]


def _error(told: str, sample: Sample, cause: Exception) -> RewardError:
    error = RewardError(told, do="make the function give None where it does not apply").of(sample)
    error.__cause__ = cause
    return error


@cache
def _load(path: str) -> Callable[..., Any]:
    """The function of `file.py:name`. Raises RecipeError."""
    file, _, name = path.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise RecipeError(f"path is {path!r}", allowed="a Python file and a function in it: rewards.py:polite")
    if not Path(file).is_file():
        raise RecipeError(f"there is no file {file}", do="a path is looked for where the command is started")
    spec = importlib.util.spec_from_file_location(f"luthier_reward_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{file} cannot be read as a Python module", allowed="a Python file")
    module = importlib.util.module_from_spec(spec)
    _read(module, spec.loader, file)
    if name not in vars(module) or not callable(vars(module)[name]):
        functions = [known for known, value in vars(module).items() if inspect.isfunction(value)]
        raise RecipeError(f"{file} has no function {name!r}", do=did_you_mean(name, functions))
    return vars(module)[name]  # type: ignore[no-any-return]


def _read(module: ModuleType, loader: Loader, file: str) -> None:
    """Run the file, which finds its neighbours as a script does. Raises RecipeError for what it raises."""
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    # Data classes look for the module that they are of.
    sys.modules[module.__name__] = module
    try:
        loader.exec_module(module)
    except _OF_FILES as failure:
        del sys.modules[module.__name__]
        told = f"{type(failure).__name__}: {failure}{_line_in(failure, file)}"
        raise RecipeError(
            f"{file} cannot be read: {told}", allowed="a Python file that can be imported", do=f"try it: python {file}"
        ) from failure


def _line_in(failure: BaseException, file: str) -> str:
    """The last line of this file that a failure went through."""
    frames = traceback.extract_tb(failure.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(file).name]
    return f" ({Path(file).name}, line {lines[-1]})" if lines else ""
