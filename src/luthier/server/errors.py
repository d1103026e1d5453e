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
_FOLDERS: Final = re.compile(r"(?<![\w.])/(?!v1/)(?:[^\s/:]+/)+")
"""Folders of an absolute path, but for the API's own paths."""
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
    return told(without_folders(message), code=error.code, kind=status_of(error)[1], param=param or where or None)


def without_folders(message: str) -> str:
    """A message whose paths are their ends: where our files are is nobody's business."""
    return _FOLDERS.sub("", message)


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
    place = place_of(first, failure.body)
    param = ".".join(place) or None
    if place and place[-1] in INSTEAD and first["type"] in _REFUSED:
        message = f"{param} cannot be had; {INSTEAD[place[-1]]}"
        return _misfit(message, "unsupported_parameter", param)
    if first["type"] == "extra_forbidden" and place:
        return _misfit(_unknown(first, place, known), "unknown_parameter", param)
    if first["type"] == "json_invalid":
        why = dict(first.get("ctx", {})).get("error", first["msg"])
        at = first["loc"][-1] if first["loc"] else "?"
        return _misfit(f"the body is no JSON: {why} at character {at}", "invalid_parameter", None)
    if first["type"] == "model_attributes_type" and not place:
        message = "the body is no JSON object; send one, with Content-Type: application/json"
        return _misfit(message, "invalid_parameter", None)
    if first["type"] == "missing":
        return _misfit(f"{param or 'the body'} is missing", "missing_parameter", param)
    what = f"{param}: " if param else ""
    return _misfit(f"{what}{_said_of(first, problems, failure.body)}", "invalid_parameter", param)


def _unknown(problem: Mapping[str, Any], place: Sequence[str], known: Mapping[str, Sequence[str]]) -> str:
    """What is said of a parameter that nobody knows where it stands."""
    said, kind = f"unknown parameter {'.'.join(place)!r:.200}", problem["loc"][0]
    of_body = known.get(".".join(place[:-1]), ())
    names = problem.get("ctx", {}).get("known", of_body)
    if kind == "query" and place[-1] in of_body:
        return f"{said} in the query; put it into the body"
    where = " in the query" if kind == "query" else ""
    return f"{said}{where}; {did_you_mean(place[-1][:80], names)}" if names else f"{said}{where}"


def unknown(kind: str, name: str, names: Sequence[str]) -> RequestValidationError:
    """A parameter of a query or a form (`kind`) that its route does not know."""
    problem = {"type": "extra_forbidden", "loc": (kind, name), "msg": "", "ctx": {"known": names}}
    return RequestValidationError([problem])


def place_of(problem: Mapping[str, Any], body: object) -> list[str]:
    """Where a problem is, in the client's own words: nobody has written the names of forms that a value may have."""
    kind, *parts = problem["loc"] or ("",)
    if kind != "body" or not isinstance(body, (dict, list)):
        return [str(part) for part in parts]
    found: list[str] = []
    at: object = body
    for part in parts:
        within = part in at if isinstance(at, dict) else isinstance(at, list) and part in range(len(at))
        if within:
            at = at[part]  # type: ignore[index]  # a mapping or a list, which has it
        elif problem["type"] != "missing" or part is not parts[-1]:
            continue
        found.append(str(part))
    return found


def _said_of(first: Mapping[str, Any], problems: Sequence[Mapping[str, Any]], body: object) -> str:
    """What is wrong; where a value may have several forms, with each of them."""
    place = place_of(first, body)
    if len(place) == len(first["loc"]) - 1:
        return str(first["msg"])
    told: dict[str, None] = {}
    for each in problems:
        own = place_of(each, body)
        if own[: len(place)] == place:
            inner = ".".join(own[len(place) :])
            told[f"{inner}: {each['msg']}" if inner else str(each["msg"])] = None
    return "; or ".join(list(told)[:4])


def _misfit(message: str, code: str, param: str | None) -> JSONResponse:
    return JSONResponse(told(message, code=code, param=param), 400)
