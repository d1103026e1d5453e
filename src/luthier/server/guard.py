"""The guard: what every request passes before any route sees it, streams, files and unknown paths included.

Idea: it wraps the whole application, so no route can forget it. In this order: size and number of headers, the name of
the host (a page that has its own name point here is refused), the origin (a page of another site is refused), the
token, the state of the server, then the size and the depth of the body, which is read whole in bounded time before
anything parses it.
Source: DNS rebinding: Jackson et al., CCS 2007.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, final

from fastapi.responses import JSONResponse

from luthier.server.errors import RETRY, refuse
from luthier.server.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
OPEN: Final = frozenset({"/health"})
"""Paths that need no token."""
UPLOAD: Final = "/v1/files"
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE: Final = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


@final
class Guard:
    """An ASGI application around another one. `draining` tells whether new requests are refused by now."""

    def __init__(self, app: App, settings: Settings, draining: Callable[[], bool]) -> None:
        self.app = app
        self.settings = settings
        self.draining = draining
        self._token = settings.token.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # There are no WebSockets here; the server answers 403 to one that is not accepted.
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = self._refusal(scope)
        body = b""
        if answer is None:
            answer, body = await self._body(scope, receive)
        if answer is not None:
            await answer(scope, receive, send)
            return
        await self.app(scope, replayed(body, receive), send)

    def _refusal(self, scope: Message) -> JSONResponse | None:
        """Why a request is not taken, by its head alone."""
        raw, limits = scope["headers"], self.settings.limits
        size = sum(len(name) + len(value) for name, value in raw)
        if len(raw) > limits.headers or size > limits.header_bytes or len(scope["path"]) > limits.header_bytes // 2:
            return refuse(431, f"{len(raw)} headers of {size} bytes; allowed are {limits.headers} of "
                          f"{limits.header_bytes}", code="headers")  # fmt: skip
        hosts = [value for name, value in raw if name == b"host"]
        if len(hosts) != 1 or _host(hosts[0]) not in self.settings.names:
            return refuse(421, f"the request is for another host; this server is {', '.join(self.settings.names)}",
                          code="host")  # fmt: skip
        if not self._same_origin(scope):
            return refuse(403, "the request comes from a web page of another origin", code="origin")
        if scope["path"] not in OPEN and not self._knows_token(raw):
            return refuse(401, "a token is needed: Authorization: Bearer TOKEN (LUTHIER_TOKEN, or as printed when the "
                          "server was started)", code="token", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if scope["path"] not in OPEN and self.draining():
            return refuse(503, "the server is stopping and takes no new requests", code="draining", headers=RETRY)
        return None

    def _same_origin(self, scope: Message) -> bool:
        """Programs send no Origin; pages do, and so does a fetch across sites tell itself."""
        host = next(value for name, value in scope["headers"] if name == b"host").lower()
        for name, value in scope["headers"]:
            if name == b"origin" and value.lower() not in (b"http://" + host, b"https://" + host):
                return False
            if name == b"sec-fetch-site" and value.lower() not in (b"same-origin", b"none"):
                return False
        return True

    def _knows_token(self, raw: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in raw if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)

    async def _body(self, scope: Message, receive: Receive) -> tuple[JSONResponse | None, bytes]:
        """The body, or why it is not taken."""
        limits = self.settings.limits
        upload = scope["path"] == UPLOAD and scope["method"] == "POST"
        most = limits.file_bytes if upload else limits.body_bytes
        too_much = f"the body has more than {most:,} bytes"
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:19]) > most:
            return refuse(413, too_much, code="body"), b""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.body_seconds * (20 if upload else 1)):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return refuse(400, "the client has gone", code="gone"), b""
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return refuse(413, too_much, code="body"), b""
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            return refuse(408, f"the body did not come within {limits.body_seconds:g} seconds", code="slow"), b""
        body = b"".join(parts)
        return (None if upload else self._misread(body)), body

    def _misread(self, body: bytes) -> JSONResponse | None:
        """Why JSON is not read: what no parser should be given, or what no tokenizer could take of it."""
        if deeper(body, self.settings.limits.depth):
            return refuse(400, f"the body is nested deeper than {self.settings.limits.depth}", code="depth")
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as failure:
            told = f"the body is no UTF-8 at byte {failure.start}"
            return refuse(400, told, code="invalid_parameter")
        if (place := half_of_a_pair(body)) is not None:
            told = f"the body has half of a surrogate pair at byte {place}, which is no character; send both halves"
            return refuse(400, told, code="invalid_parameter")
        return None


def _host(value: bytes) -> str:
    """The name in a Host header, without its port."""
    text = value.decode("latin-1").lower()
    if text.startswith("["):
        name, end, port = text.partition("]")
        return name + end if not port or (port[0] == ":" and port[1:].isdigit()) else ""
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def deeper(body: bytes, most: int) -> bool:
    """Whether JSON opens more than `most` brackets inside one another; quotes and what they escape do not count."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    depth, quoted, escaped = 0, False, False
    for byte in body:
        if quoted:
            quoted = escaped or byte != 0x22
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            if depth > most:
                return True
        elif byte in b"]}":
            depth -= 1
    return False


def half_of_a_pair(body: bytes) -> int | None:
    """Where JSON escapes a UTF-16 surrogate without the other one; None where it does not."""
    if not _SURROGATE.search(body):
        return None
    high: re.Match[bytes] | None = None
    # Every escape, so that a backslash which is escaped itself begins none.
    for each in _ESCAPE.finditer(body):
        code = int(each[1], 16) if each[1] else 0
        low = 0xDC00 <= code < 0xE000
        if high is not None and not (low and each.start() == high.end()):
            return high.start()
        if low and high is None:
            return each.start()
        high = each if 0xD800 <= code < 0xDC00 else None
    return None if high is None else high.start()


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body that was read, and then what comes."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
