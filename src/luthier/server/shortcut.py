"""Requests that are as they should be, past the layers between the guard and their route.

Idea: FastAPI asks of every request what few have: a query, a form, dependencies, what is to be closed behind it. Where
a route takes one JSON body, and the body fits, nothing of that is needed: the body is read from its bytes and the route
called. Whatever is out of the ordinary goes to FastAPI as it came, which says what is wrong with it.
Cost: a look at the head of each request. It saves a tenth to a fifth of what HTTP takes beside a small model
    (benchmarks/serve.py).
Not when: a route takes anything but a body and the request. Its errors are told here as FastAPI is told to tell them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, final, get_type_hints

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from luthier.core.errors import LuthierError
from luthier.server.errors import answer, unexpected
from luthier.server.guard import App, Message, Receive, Send, replayed


@final
@dataclass(frozen=True)
class _Way:
    """A route, and the form of the body that it takes."""

    route: APIRoute
    body: type[BaseModel]
    endpoint: Callable[[Any, Request], Awaitable[Response]]


@final
class Shortcut:
    """An ASGI application around one that has the routes of `routers`, all of which take a body and the request."""

    def __init__(self, app: App, routers: Iterable[APIRouter]) -> None:
        self.app = app
        self._ways = {
            route.path: _Way(route, get_type_hints(route.endpoint)["body"], route.endpoint)
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute)
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        way = self._way(scope)
        if way is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        raw = await request.body()
        try:
            body = way.body.model_validate_json(raw)
        except ValidationError:
            await self.app(scope, replayed(raw, receive), send)
            return
        scope["route"] = way.route
        await (await _answered(way, body, request, send))(scope, receive, send)

    def _way(self, scope: Message) -> _Way | None:
        """Where a request goes that has nothing but a JSON body."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["query_string"]:
            return None
        return self._ways.get(scope["path"]) if (b"content-type", b"application/json") in scope["headers"] else None


async def _answered(way: _Way, body: BaseModel, request: Request, send: Send) -> Response:
    """The answer of a route, or its error's."""
    try:
        return await way.endpoint(body, request)
    except LuthierError as error:
        return answer(error)
    except Exception:
        await unexpected()(request.scope, request.receive, send)
        raise
