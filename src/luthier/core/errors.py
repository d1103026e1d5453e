"""One error tree: what came, what is allowed, what to do next, with a stable code and a documented exit code.

Every error a user can reach is a `LuthierError`. Each category is also the standard exception of its kind, so that
library callers can catch `ValueError` or `OSError` without knowing luthier. Add a category by subclassing the one
whose exit code fits and giving it a `code` and an `advice`, the next step where an error brings none of its own; its
docstring is the cause. Codes are part of the interface and never change their meaning.

Texts are clipped: whatever somebody puts into a file, the error about it stays readable.

| exit | category | meaning |
|---|---|---|
| 1 | LuthierError | unexpected |
| 2 | RecipeError | usage or configuration |
| 65 | DataError | bad data |
| 69 | MissingError | a package or service is missing |
| 71 | MemoryExhaustedError | out of memory even at the smallest micro-batch |
| 74 | StorageError | input/output |
| 75 | StoppedError | stopped and resumable |
| 76 | NumericError | not finite, or diverged |
| 77 | RefusedError | refused for safety |
| 78 | GateError | an evaluation or parity gate was not met |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Final

MOST_LINES: Final = 64
_ROOM: Final[Mapping[str, int]] = {"received": 900, "allowed": 400, "do": 350, "where": 300}
"""Characters of a line of each part; so a message of one line has less than 2,000. A list has one per row."""


class LuthierError(Exception):
    """Something that nobody foresaw.

    An error has an address (`where`), what was `received`, what is `allowed`, and what to `do` next.
    """

    code: ClassVar[str] = "unexpected"
    exit_code: ClassVar[int] = 1
    advice: ClassVar[str] = "run it again with --debug and report the traceback"

    def __init__(self, received: str, *, allowed: str = "", do: str = "", where: str = "") -> None:
        self.received = _clipped(received, _ROOM["received"])
        self.allowed = _clipped(allowed, _ROOM["allowed"])
        self.do = _clipped(do, _ROOM["do"])
        self.where = _tail(where, _ROOM["where"])
        super().__init__(self.received)
        if not self.do:
            # Shown below a traceback; not in str(), so that an error quoted inside another brings no second advice.
            self.add_note(f"next: {self.advice}")

    def __str__(self) -> str:
        return _joined(self.cause(), self.do)

    def cause(self) -> str:
        """The error without what to do about it."""
        address = f"{self.where}: " if self.where else ""
        return _joined(f"{address}{self.received}", self.allowed)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would be lost by the default pickling of exceptions, and workers send errors home.
        return (_rebuild, (type(self), self.received, self.allowed, self.do, self.where), self.__dict__)

    def told(self) -> str:
        """The error for a person: with the next step of its category where it brings none of its own."""
        return str(self) if self.do else _joined(str(self), self.advice)

    def as_dict(self) -> dict[str, str | int]:
        """The error as plain values, for `--json` and for events."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "where": self.where,
            "received": self.received,
            "allowed": self.allowed,
            "do": self.do or self.advice,
        }


def _rebuild(kind: type[LuthierError], received: str, allowed: str, do: str, where: str) -> LuthierError:
    return kind(received, allowed=allowed, do=do, where=where)


def _joined(first: str, then: str) -> str:
    """Two parts of a sentence; behind a list, which ends with a line of its own, the second has one too."""
    between = "\n" if "\n" in first else "; "
    return f"{first}{between}{then}" if first and then else first or then


def _clipped(text: str, room: int) -> str:
    """`text` with long lines cut, and the end of too many; what was left out is counted."""
    if len(text) <= room:
        return text
    lines = text.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        lines[-1] = f"... ({lines[-1].count(chr(10)) + 1:,} more lines)"
    return "\n".join(_head(line, room) for line in lines)


def _head(line: str, room: int) -> str:
    return line if len(line) <= room else f"{line[: room - 40]}... ({len(line) - room + 40:,} more characters)"


def _tail(where: str, room: int) -> str:
    # Of an address the end counts: the name of the file, the line, the column.
    return where if len(where) <= room else f"({len(where) - room + 40:,} characters)...{where[40 - room :]}"


class RecipeError(LuthierError, ValueError):
    """A recipe, a flag or an argument that cannot be used."""

    code = "recipe"
    exit_code = 2
    advice = "luthier init --dry-run shows every key of a recipe, --help every option of a command"


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Have a RecipeError of the block that names no next step name this one: keys of other recipes are no help."""
    try:
        yield
    except RecipeError as error:
        if not error.do:
            error.do = _clipped(advice, _ROOM["do"])
            error.__notes__ = []
        raise


class UndrivableAttentionError(RecipeError):
    """Attention of a model that luthier cannot drive by segment; it is then run by unrolled paths."""

    code = "attention"
    advice = "choose an adapter that works at sites, such as lora"


class DataError(LuthierError, ValueError):
    """A data file or row that cannot be used; `where` is `file:line:column` whenever a row is to blame."""

    code = "data"
    exit_code = 65
    advice = "luthier data check FILE --model MODEL lists every row that cannot be used"


class TemplateError(DataError):
    """A chat template that cannot be rendered, or that does not show the model what inference would show it."""

    code = "template"
    advice = "luthier data show FILE --model MODEL --template NAME shows what a template renders"


class MissingError(LuthierError, ImportError):
    """A package, model or service that is not there; `do` holds the command that brings it."""

    code = "missing"
    exit_code = 69
    advice = "luthier doctor tells what is installed here"


class MemoryExhaustedError(LuthierError, MemoryError):
    """No memory left even at the smallest micro-batch."""

    code = "out-of-memory"
    exit_code = 71
    advice = "let less go through the model at once: --set batch.micro_tokens=512"


class StorageError(LuthierError, OSError):
    """A file that could not be read or written."""

    code = "storage"
    exit_code = 74
    advice = "look at the path, its permissions and the free space; then run the same command again"


class CorruptError(StorageError):
    """A file whose content does not match the digest recorded for it, or that is cut short."""

    code = "corrupt"
    advice = "bring the file back from a copy; a run goes on from its newest whole checkpoint with: luthier resume RUN"


class DiskFullError(StorageError):
    """No space for a file that had to be written; what is on the disk already is unharmed."""

    code = "disk-full"
    advice = "free space, then run the same command again"


class StoppedError(LuthierError):
    """Stopped on request; the state is saved and `do` holds the command that goes on."""

    code = "stopped"
    exit_code = 75
    advice = "luthier resume RUN"


class NumericError(LuthierError, ArithmeticError):
    """A loss, gradient or weight that is not finite, or a run that diverged."""

    code = "numeric"
    exit_code = 76
    advice = "lower the rate (--set optimizer.learning_rate=1e-5), or compute in --set precision=float32"


class RefusedError(LuthierError, PermissionError):
    """Something luthier will not do because it is not safe."""

    code = "refused"
    exit_code = 77
    advice = "choose another place or file; --help names the options of the command"


class UnsafeArtifactError(RefusedError):
    """A file that could run code when loaded."""

    code = "unsafe-artifact"
    advice = "take the safetensors version of it; luthier loads no file that could run code"


class RunLockedError(RefusedError):
    """A run directory that another process is using."""

    code = "run-locked"
    advice = "wait until it ends, or use another run directory: --run DIR"


class DriftError(RefusedError):
    """A run that cannot be continued exactly because something it depends on has changed."""

    code = "drift"
    advice = "restore what has changed, or go on as another run: luthier resume RUN --accept-drift"


class SandboxUnavailableError(RefusedError):
    """Code of a model that has to be run, and no wall here to run it behind."""

    code = "no-sandbox"
    advice = "luthier doctor says what is missing; docs/sandbox.md says what each tier needs"


class GateError(LuthierError):
    """An evaluation or parity gate that was not met."""

    code = "gate"
    exit_code = 78
    advice = "do not use the result; luthier run show RUN tells what was measured"
