"""One error tree: what came, what is allowed, what to do next, with a stable code and a documented exit code.

Every error a user can reach is a `LuthierError`. Each category is also the standard exception of its kind, so that
library callers can catch `ValueError` or `OSError` without knowing luthier. Add a category by subclassing the one
whose exit code fits and giving it a `code`; codes are part of the interface and never change their meaning.

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

from typing import ClassVar


class LuthierError(Exception):
    """An error with an address (`where`), what was `received`, what is `allowed`, and what to `do` next."""

    code: ClassVar[str] = "unexpected"
    exit_code: ClassVar[int] = 1

    def __init__(self, received: str, *, allowed: str = "", do: str = "", where: str = "") -> None:
        super().__init__(received)
        self.received = received
        self.allowed = allowed
        self.do = do
        self.where = where

    def __str__(self) -> str:
        address = f"{self.where}: " if self.where else ""
        parts = [f"{address}{self.received}", self.allowed, self.do]
        return "; ".join(part for part in parts if part)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would be lost by the default pickling of exceptions, and workers send errors home.
        return (_rebuild, (type(self), self.received, self.allowed, self.do, self.where))

    def as_dict(self) -> dict[str, str | int]:
        """The error as plain values, for `--json` and for events."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "where": self.where,
            "received": self.received,
            "allowed": self.allowed,
            "do": self.do,
        }


def _rebuild(kind: type[LuthierError], received: str, allowed: str, do: str, where: str) -> LuthierError:
    return kind(received, allowed=allowed, do=do, where=where)


class RecipeError(LuthierError, ValueError):
    """A recipe, a flag or an argument that cannot be used."""

    code = "recipe"
    exit_code = 2


class DataError(LuthierError, ValueError):
    """A data file or row that cannot be used; `where` is `file:line:column` whenever a row is to blame."""

    code = "data"
    exit_code = 65


class TemplateError(DataError):
    """A chat template that cannot be rendered, or that does not show the model what inference would show it."""

    code = "template"


class MissingError(LuthierError, ImportError):
    """A package, model or service that is not there; `do` holds the command that brings it."""

    code = "missing"
    exit_code = 69


class MemoryExhaustedError(LuthierError, MemoryError):
    """No memory left even at the smallest micro-batch."""

    code = "out-of-memory"
    exit_code = 71


class StorageError(LuthierError, OSError):
    """A file that could not be read or written."""

    code = "storage"
    exit_code = 74


class CorruptError(StorageError):
    """A file whose content does not match the digest recorded for it, or that is cut short."""

    code = "corrupt"


class StoppedError(LuthierError):
    """Stopped on request; the state is saved and `do` holds the command that goes on."""

    code = "stopped"
    exit_code = 75


class NumericError(LuthierError, ArithmeticError):
    """A loss, gradient or weight that is not finite, or a run that diverged."""

    code = "numeric"
    exit_code = 76


class RefusedError(LuthierError, PermissionError):
    """Something luthier will not do because it is not safe."""

    code = "refused"
    exit_code = 77


class UnsafeArtifactError(RefusedError):
    """A file that could run code when loaded."""

    code = "unsafe-artifact"


class RunLockedError(RefusedError):
    """A run directory that another process is using."""

    code = "run-locked"


class DriftError(RefusedError):
    """A run that cannot be continued exactly because something it depends on has changed."""

    code = "drift"


class GateError(LuthierError):
    """An evaluation or parity gate that was not met."""

    code = "gate"
    exit_code = 78
