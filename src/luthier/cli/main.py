"""`luthier`: the commands, one file each, and one place where errors become a sentence and an exit code.

Commands print data on stdout and progress on stderr. Nothing here or in the command files imports torch at the top, so
that `luthier --help` is instant; heavy parts are imported inside the commands that need them.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import final

import typer

from luthier.cli import (
    classify,
    compare,
    demo,
    describe,
    doctor,
    evaluate,
    export,
    generate,
    init,
    lint,
    merge,
    plan,
    probe,
    quantize,
    resume,
    reward,
    serve,
    train,
)
from luthier.cli import data as data_commands
from luthier.cli import run as run_commands
from luthier.core.errors import LuthierError, MemoryExhaustedError, RecipeError, StoppedError, StorageError

app = typer.Typer(
    name="luthier",
    help="A fine-tuning workshop for language models. Add --debug to any command to see tracebacks.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("resume")(resume.resume)
app.command("generate")(generate.generate)
app.command("classify")(classify.classify)
app.command("eval")(evaluate.evaluate)
app.command("reward")(reward.reward)
app.command("quantize")(quantize.quantize)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("lint")(lint.lint)
app.command("probe")(probe.probe)
app.command("compare")(compare.compare)
app.command("serve")(serve.serve)
app.command("describe")(describe.describe)
app.command("doctor")(doctor.doctor)
app.add_typer(data_commands.app, name="data")
app.add_typer(run_commands.app, name="run")


OF_RECIPES = {"--data": "data.train", "--model": "model"}
"""Options of `init` that people give to `train`, and the keys that a recipe has for them."""
READS_RECIPES = ("init", "plan", "train", "resume", "compare", "reward")
"""Commands that recipes, or --set with their keys, are given to."""
INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C has ended."""


def main() -> None:
    """Run a command; every error leaves as one paragraph on stderr and its documented exit code."""
    # No telemetry of our dependencies in our process, and no warnings from tokenizer threads that we fork around.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        sys.excepthook = _tell_unexpected
    early = _EarlyStop()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, early)
    try:
        code = run(arguments, debug=debug)
    except (KeyboardInterrupt, StoppedError) as stopped:
        # It came before typer listened, or while an error was being told.
        code = _tell(stopped, as_json=False, debug=debug) if isinstance(stopped, StoppedError) else INTERRUPTED
    except Exception:
        # It was raised wherever the program was, and a library may have made an error of its own of it.
        if not early.by:
            raise
        code = _tell(early.error(), as_json="--json" in arguments, debug=debug)
    if code == StoppedError.exit_code:
        # A stop may have broken into a library that was starting a thread. Python waits for that thread, and it ends
        # when the last reference to its pool does, which may stand in a cycle.
        gc.collect()
    sys.exit(code)


@final
class _EarlyStop:
    """Ends the command on a signal while there is no run, which has handlers of its own, and remembers that it did."""

    def __init__(self) -> None:
        self.by = ""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.by = signal.Signals(number).name
        raise self.error()

    def error(self) -> StoppedError:
        # Made anew: an error that is kept keeps the frames it went through, and all that they hold, from ending.
        return StoppedError(f"stopped by {self.by}; nothing was begun", do="run the same command again")


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run a command line and give back its exit code."""
    try:
        _run_asked(arguments)
    except LuthierError as error:
        _advise(error, arguments)
        return _tell(error, as_json="--json" in arguments, debug=debug)
    except SystemExit as leave:
        # typer tells usage errors itself (2) and turns Ctrl-C into 130. A reader of our output that goes away
        # (`luthier ... | head`) has the right to.
        if isinstance(leave.__context__, BrokenPipeError):
            return 0
        say = getattr(leave.__context__, "format_message", None)
        do = _of_recipe(arguments, str(getattr(leave.__context__, "option_name", "")))
        if do:
            sys.stderr.write(f"{do}\n")
        if callable(say) and "--json" in arguments:
            _print_error(RecipeError(str(say()), do=do or "look at --help"))
        return int(leave.code or 0)
    except OSError as failure:
        place = f"{failure.filename}: " if failure.filename is not None else ""
        told = StorageError(f"{place}{failure.strerror or failure}", do="look at the path and the free space")
        told.__cause__ = failure
        return _tell(told, as_json="--json" in arguments, debug=debug)
    except MemoryError as failure:
        short = MemoryExhaustedError(f"out of memory: {failure}", do="lower batch.micro_tokens, or the model's size")
        short.__cause__ = failure
        return _tell(short, as_json="--json" in arguments, debug=debug)
    return 0


def _run_asked(arguments: list[str]) -> None:
    """Run the command that is named first, alone: making the options of all of them takes longer than this one does."""
    name = arguments[0] if arguments else ""
    only = typer.Typer(
        name=app.info.name, context_settings=app.info.context_settings, pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )  # fmt: skip
    only.registered_commands = [each for each in app.registered_commands if each.name == name]
    only.registered_groups = [each for each in app.registered_groups if each.name == name]
    known = only.registered_commands or only.registered_groups
    command = typer.main.get_group(only) if known else typer.main.get_command(app)
    command.main(arguments, prog_name="luthier")


def _of_recipe(arguments: Sequence[str], option: str) -> str:
    """What to do where `train` is given what stands in a recipe; empty where it is not that."""
    key = OF_RECIPES.get(option)
    if key is None or arguments[:1] != ["train"]:
        return ""
    return (
        f"a recipe says that: luthier init recipe.yaml {option} ... writes one for: luthier train recipe.yaml; "
        f"in one that is there, {key} is the key (--set {key}=...)"
    )


def _advise(error: LuthierError, arguments: Sequence[str]) -> None:
    """Have an error of a command that takes no recipe point to the help of that command: recipes are no help there."""
    general = isinstance(error, RecipeError) and not error.do and error.advice == RecipeError.advice
    words = [word for word in arguments[:2] if not word.startswith("-")]
    if general and words and words[0] not in READS_RECIPES:
        named = words if words[0] in ("data", "run") else words[:1]
        error.do = f"luthier {' '.join(named)} --help shows its options"


def _tell(error: LuthierError, *, as_json: bool, debug: bool) -> int:
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"error[{error.code}]: {error.told()}\n")
    if as_json:
        _print_error(error)
    return error.exit_code


def _print_error(error: LuthierError) -> None:
    sys.stdout.write(json.dumps({"error": error.as_dict()}) + "\n")


def _tell_unexpected(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """What nobody foresaw is one sentence too; Python then ends with 1."""
    if issubclass(kind, KeyboardInterrupt):
        return
    advice = "run it again with --debug and report the traceback"
    sys.stderr.write(f"error[unexpected]: {kind.__name__}: {error}; {advice}\n")
