"""A connection, as uvicorn drives it, that bounds how long a client takes nothing, and lets a stream write directly.

Idea: a piece of an answer is the same few bytes at the top of a dozen layers (routes, guard, h11's state of the
connection) and at their bottom, where each of them has taken its time. All that is left to do below an answer that has
begun is to frame the piece, which is what `write` does; how an answer begins and ends goes through all layers. It says
when it is lost, so that no task has to wait for that beside each answer.
A client that takes nothing of what was written is let go here: a clock that runs while something waits for it costs
nothing where nothing does.
Source: chunked bodies: RFC 9112, section 7.1.
Not when: the client is slow. Who waits for a reader does so in the layers, where the wait is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, final

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from luthier.server.guard import Message
from luthier.server.settings import Limits

_PLACE: Final = "luthier.connection"
_LOG = logging.getLogger("luthier.server")


@final
class Connection(H11Protocol):
    """One connection; requests find it in the state of their scope."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, {**app_state, _PLACE: self}, _loop)
        self.on_lost: Callable[[], None] | None = None
        self._seconds = limits.write_seconds
        self._until: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Much of what was written waits for the client: from now on it has to take something in time."""
        super().pause_writing()
        self._until = self.loop.call_later(self._seconds, self._let_go)

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        self._stop_clock()

    def _let_go(self) -> None:
        _LOG.info("a client has taken nothing of its answer for %g seconds and was let go", self._seconds)
        self.transport.abort()

    def _stop_clock(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_clock()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    @classmethod
    def of(cls, scope: Message) -> Connection | None:
        """The connection of a request whose answer may be written to directly: it has to be framed in chunks."""
        found = scope.get("state", {}).get(_PLACE)
        chunked = scope.get("http_version") == "1.1" and scope.get("method") == "POST"
        return found if chunked and isinstance(found, cls) else None

    @property
    def takes(self) -> bool:
        """Whether a piece may be written: its reader keeps up, and is there."""
        return not self.flow.write_paused and not self.transport.is_closing()

    def write(self, piece: bytes) -> bool:
        """Send a piece of the answer that has begun and not ended; False where it has to go through the layers."""
        if not piece or not self.takes:
            return False
        self.put(piece)
        return True

    def put(self, piece: bytes) -> None:
        """Send a piece, of at least one byte, while the connection `takes` it."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
