"""Answers that grow: server-sent events, and whole answers whose client may leave before they are there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from json.encoder import encode_basestring
from typing import Any, TypeVar, final

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from luthier.core.errors import LuthierError
from luthier.infer.request import News
from luthier.server.connection import Connection
from luthier.server.errors import body_of, refuse
from luthier.server.guard import Message, Receive, Send
from luthier.server.ticket import Ticket

T = TypeVar("T")
Chunks = AsyncIterator[Sequence[bytes]]
Grow = Callable[[Sequence[News]], Sequence[bytes]]
"""What news of one ticket make: the pieces of an answer."""
_MARK = "\ue000text\ue001"
"""A text that stands for the text of a piece; whatever the head of an answer holds, it is the last one there."""
_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@final
class EventStream(Response):
    """Chunks as server-sent events, `[DONE]` at the end. However it ends, the tickets are closed.

    What comes between the first news and the end is not asked of `chunks` while the connection takes it: `grow` makes
    it, one for each ticket. An error after the beginning is an event too: the status is gone by then.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, tickets: Sequence[Ticket], grow: Sequence[Grow]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._tickets = tickets
        self._grow = grow

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:  # type: ignore[override]
        connection = Connection.of(scope)
        if connection is None or connection.transport.is_closing():
            await _until_gone(receive, self._send(send, None), self._tickets)
            return
        connection.on_lost = self._leave
        try:
            await self._send(send, connection)
        finally:
            connection.on_lost = None
            self._leave()

    def _leave(self) -> None:
        for ticket in self._tickets:
            ticket.close()

    async def _send(self, send: Send, connection: Connection | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        ready: list[bytes] = []
        if connection is not None:
            for ticket, grow in zip(self._tickets, self._grow, strict=True):
                ticket.listener = partial(_told, connection, grow)
        try:
            async for chunks in self._chunks:
                ready += chunks
                if ready and not all(ticket.read for ticket in self._tickets):
                    piece = b"".join(ready)
                    ready.clear()
                    if connection is None or not connection.write(piece):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
        except LuthierError as error:
            ready.append(event(body_of(error)))
        # What comes last goes out in one piece: each write costs as much as some tokens.
        await send({"type": "http.response.body", "body": b"".join([*ready, b"data: [DONE]\n\n"]), "more_body": False})


def _told(connection: Connection, grow: Grow, news: Sequence[News]) -> bool:
    """Write what news make, if nothing is in the way."""
    if not connection.takes:
        return False
    if pieces := grow(news):
        connection.put(pieces[0] if len(pieces) == 1 else b"".join(pieces))
    return True


def event(values: Mapping[str, Any]) -> bytes:
    """Values as one server-sent event."""
    return f"data: {_dump(values)}\n\n".encode()


@final
class Frame:
    """The events of one answer: what is the same in all of them is written once.

    `plain` makes the piece of a choice that is a text and nothing else.
    """

    def __init__(self, head: Mapping[str, Any], plain: Callable[[int, str], Mapping[str, Any]]) -> None:
        self._start = f'data: {_dump(head)[:-1]},"choices":['
        self._plain = plain
        self._around: dict[int, tuple[str, str]] = {}

    def text(self, index: int, text: str) -> bytes:
        """What `self(plain(index, text))` is, with nothing but the text written anew."""
        around = self._around.get(index)
        if around is None:
            before, after = self(self._plain(index, _MARK)).decode().rsplit(_dump(_MARK), 1)
            around = self._around[index] = before, after
        return f"{around[0]}{encode_basestring(text)}{around[1]}".encode()

    def __call__(self, choice: Mapping[str, Any]) -> bytes:
        """A piece of one choice."""
        return f"{self._start}{_dump(choice)}]}}\n\n".encode()

    def last(self, usage: Mapping[str, Any]) -> bytes:
        """What was used, after all pieces."""
        return f'{self._start}],"usage":{_dump(usage)}}}\n\n'.encode()


async def whole(
    request: Request, tickets: Sequence[Ticket], work: Callable[[], Coroutine[Any, Any, Mapping[str, Any]]]
) -> Response:
    """The answer that `work` makes of some tickets; they are cancelled when the client leaves before that."""
    made = await _until_gone(request.receive, work(), tickets)
    if made is None:
        return refuse(400, "the client has gone", code="gone")
    return JSONResponse(made)


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, T], tickets: Sequence[Ticket]) -> T | None:
    """What `work` gives, or None when the client left before; either way nothing of it goes on."""
    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        for task in (worker, watcher):
            task.cancel()
        for ticket in tickets:
            ticket.close()


async def _gone(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
