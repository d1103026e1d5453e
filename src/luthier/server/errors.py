"""Errors as clients of the API get them: a status, and a body in OpenAI's form with our stable code.

Every LuthierError has a status by its kind. What nobody foresaw is told as 500 without its words, which may hold paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from luthier.core.errors import (
    CorruptError,
    DataError,
    LuthierError,
    MissingError,
    RecipeError,
    RefusedError,
    StoppedError,
    StorageError,
)
from luthier.core.nearest import did_you_mean
from luthier.server.bodies import INSTEAD


class NotServedError(RecipeError):
    """A model, an adapter, a file or a job that this server does not have."""

    code = "not-served"
    advice = "GET /v1/models lists the models that are served"


class BusyError(LuthierError, RuntimeError):
    """A server that has as many requests as it can hold, or a client that does not read its answer."""

    code = "busy"
    exit_code = 69
    advice = "wait a second and ask again; luthier serve --waiting N lets more requests wait"


class EngineFailedError(LuthierError, RuntimeError):
    """The engine broke off while it was at work on a request."""

    code = "engine"
    advice = "ask again; when it happens again, start the server with --debug and report the traceback"


class DrainingError(StoppedError, RuntimeError):
    """A server that was asked to stop and takes no new requests."""

    code = "draining"
    advice = "ask again when the server has been started again"


_STATUS: Final[Sequence[tuple[type[LuthierError], int, str]]] = (
    (NotServedError, 404, "invalid_request_error"),
    (BusyError, 429, "rate_limit_error"),
    (DrainingError, 503, "unavailable_error"),
    (RefusedError, 403, "permission_error"),
    (RecipeError, 400, "invalid_request_error"),
    (DataError, 400, "invalid_request_error"),
    (MissingError, 400, "invalid_request_error"),
    (CorruptError, 400, "invalid_request_error"),
)
_REFUSED: Final = ("extra_forbidden", "none_required", "literal_error", "too_long", "list_type")
_FOLDERS: Final = re.compile(r"(?<![\w.])/(?:[^\s/:]+/)+")
RETRY: Final = {"Retry-After": "1"}


def status_of(error: LuthierError) -> tuple[int, str]:
    """The status of an error and what OpenAI calls its type."""
    return next(((status, kind) for each, status, kind in _STATUS if isinstance(error, each)), (500, "server_error"))


def body_of(error: LuthierError, *, param: str | None = None) -> dict[str, Any]:
    """An error as the API tells it."""
    # The advice of these categories is for the command line.
    plain = error.code in ("recipe", "data", "template", "refused")
    message, where = str(error) if plain else error.told(), error.where
    if isinstance(error, (StorageError, RefusedError)):
        where = ""
    # Where our files are is nobody's business: of a path the end stays.
    message = _FOLDERS.sub("", message)
    return told(message, code=error.code, kind=status_of(error)[1], param=param or where or None)


def told(message: str, *, code: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: LuthierError, *, param: str | None = None) -> JSONResponse:
    """The response to a request that led to an error."""
    status, _ = status_of(error)
    return JSONResponse(body_of(error, param=param), status, RETRY if status in (429, 503) else None)


def refuse(status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A request that is not looked at any further."""
    kind = "permission_error" if status in (401, 403, 421) else "invalid_request_error"
    return JSONResponse(told(message, code=code, kind=kind), status, headers)


def unexpected() -> JSONResponse:
    """What nobody foresaw; the traceback is in the server's log."""
    return JSONResponse(told("something went wrong here; see the log of the server", code="unexpected",
                             kind="server_error"), 500)  # fmt: skip


def invalid(failure: RequestValidationError, known: Mapping[str, Sequence[str]]) -> JSONResponse:
    """A body or a query that does not fit; `known` are the parameters of each body by the path that takes it."""
    # A required name that is misspelt is missing, and unknown: the second says what to do.
    problems = sorted(failure.errors(), key=lambda problem: problem["type"] == "missing")
    first: Mapping[str, Any] = problems[0] if problems else {"type": "", "loc": (), "msg": "it cannot be read"}
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place) or None
    if place and place[-1] in INSTEAD and first["type"] in _REFUSED:
        message = f"{param} cannot be had; {INSTEAD[place[-1]]}"
        return JSONResponse(told(message, code="unsupported_parameter", param=param), 400)
    if first["type"] == "extra_forbidden" and place:
        names = known.get(".".join(place[:-1]), ())
        near = f"; {did_you_mean(place[-1][:80], names)}" if names else ""
        return JSONResponse(told(f"unknown parameter {param!r:.200}{near}", code="unknown_parameter", param=param), 400)
    if first["type"] == "json_invalid":
        why = dict(first.get("ctx", {})).get("error", first["msg"])
        message = f"the body is no JSON: {why} at character {place[-1] if place else '?'}"
        return JSONResponse(told(message, code="invalid_parameter"), 400)
    if first["type"] == "model_attributes_type" and not place:
        message = "the body is no JSON object; send one, with Content-Type: application/json"
        return JSONResponse(told(message, code="invalid_parameter"), 400)
    if first["type"] == "missing":
        return JSONResponse(told(f"{param or 'the body'} is missing", code="missing_parameter", param=param), 400)
    what = f"{param}: " if param else ""
    return JSONResponse(told(f"{what}{first['msg']}", code="invalid_parameter", param=param), 400)
