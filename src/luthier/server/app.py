"""The application: the routes, the way errors are told, the count of requests, and the guard around all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from luthier.core.errors import LuthierError
from luthier.server import adapters, chat, completions, embeddings, files, fine_tuning, plain
from luthier.server.bodies import ChatBody, CompletionBody
from luthier.server.description import described
from luthier.server.errors import answer, invalid, refuse, unexpected, unknown
from luthier.server.guard import App, Guard, Message, Receive, Send
from luthier.server.serving import Serving
from luthier.server.shortcut import Shortcut

_LOG = logging.getLogger("luthier.server")
_ACCESS = logging.getLogger("luthier.access")


def application(serving: Serving) -> Guard:
    """What the HTTP server runs."""
    speaking = routes_that_speak(serving)
    api = Shortcut(routes_of(serving, speaking), speaking)
    return Guard(Counted(api, serving), serving.settings, lambda: serving.worker.draining)


def routes_that_speak(serving: Serving) -> list[APIRouter]:
    """The routes that generate."""
    return [chat.routes(serving), completions.routes(serving)]


def routes_of(serving: Serving, speaking: Iterable[APIRouter]) -> FastAPI:
    """All routes, those that speak among them, without the guard.

    Pages that show the description come from elsewhere, and are not there.
    """
    api = FastAPI(title="luthier", docs_url=None, redoc_url=None, openapi_url="/openapi.json",
                  dependencies=[Depends(known_query)])  # fmt: skip
    others = (part.routes(serving) for part in (embeddings, plain, adapters, files, fine_tuning))
    for router in (*speaking, *others):
        api.include_router(router)
    api.openapi = lambda: described(api)  # type: ignore[method-assign]

    @api.exception_handler(LuthierError)
    async def told(_request: Request, error: LuthierError) -> JSONResponse:
        return answer(error)

    @api.exception_handler(RequestValidationError)
    async def misfit(request: Request, failure: RequestValidationError) -> JSONResponse:
        return invalid(failure, known_at(request.url.path))

    @api.exception_handler(Exception)
    async def unforeseen(_request: Request, _failure: Exception) -> JSONResponse:
        # It is raised again behind this answer, and logged where requests are counted.
        return unexpected()

    @api.exception_handler(HTTPException)
    async def plain_error(request: Request, failure: HTTPException) -> JSONResponse:
        words = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not for this path"}
        code = {404: "path", 405: "method"}.get(failure.status_code, "request")
        message = words.get(failure.status_code, str(failure.detail))
        return refuse(failure.status_code, message, code=code, headers=failure.headers)

    return api


async def known_query(request: Request) -> None:
    """Raise for a parameter in the query that the route does not know."""
    names = [each.alias for each in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in names:
            raise unknown("query", name, names)


def known_at(path: str) -> Mapping[str, Sequence[str]]:
    """The parameters that a path knows, for the nearest name."""
    bodies: dict[str, type[BaseModel]] = {
        "/v1/chat/completions": ChatBody,
        "/v1/completions": CompletionBody,
        "/v1/embeddings": embeddings.EmbeddingsBody,
        "/v1/fine_tuning/jobs": fine_tuning.JobBody,
        "/v1/load_lora_adapter": adapters.LoadBody,
        "/tokenize": plain.TokenizeBody,
        "/detokenize": plain.DetokenizeBody,
    }
    body = bodies.get(path)
    return {} if body is None else {"": list(body.model_fields)}


@final
class Counted:
    """Counts requests by route and status, writes the access log, and turns what nobody foresaw into 500."""

    def __init__(self, api: App, serving: Serving) -> None:
        self.api = api
        self.serving = serving

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.api(scope, receive, send)
            return
        status, whole, start = 0, False, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.api(scope, receive, noted)
        except Exception:
            _LOG.exception("%s %s", scope["method"], scope["path"])
            status = 500
            if not whole:
                # What was begun is cut off, so that nobody takes it for all.
                raise
        finally:
            self.serving.metrics.requests[_route(scope), status] += 1
            _ACCESS.info("%s %s %d %.3f s", scope["method"], scope["path"], status, time.monotonic() - start)


def _route(scope: Message) -> str:
    """The route of a request as it was declared, so that paths that clients make up are not counted one by one."""
    return str(getattr(scope.get("route"), "path", "other"))
