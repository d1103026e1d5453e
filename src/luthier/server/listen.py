"""Listening: the HTTP server around an application, from its socket to its orderly end.

SIGTERM and SIGINT drain: new requests get 503, those under way finish up to a limit, then the process ends with 0. A
second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, final

import uvicorn

from luthier.core.errors import StorageError
from luthier.server.app import application
from luthier.server.connection import Connection
from luthier.server.serving import Serving

_POLL: Final = 0.05
"""Seconds between looks at whether everything under way is over."""


@final
@dataclass(frozen=True)
class Certificate:
    """Files of TLS."""

    chain: Path
    key: Path


def listen(serving: Serving, *, certificate: Certificate | None = None, ready: Callable[[int], None]) -> int:
    """Serve until a signal comes; the exit code. `ready` is told the port once requests are taken."""
    settings = serving.settings
    place = bound(settings.listen, settings.port)
    config = uvicorn.Config(
        application(serving),
        http=partial(Connection, limits=settings.limits),  # type: ignore[arg-type]  # it is only called
        loop="auto",  # uvloop where there is one (not on Windows): a seventh less of what HTTP takes
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=2 * settings.limits.header_bytes,
        ssl_certfile=None if certificate is None else str(certificate.chain),
        ssl_keyfile=None if certificate is None else str(certificate.key),
    )
    server = _Server(config, serving)
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(server, serving, place, ready))
    finally:
        place.close()
        serving.close()
    return 1 if serving.worker.dead else 0


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises StorageError when the port is taken."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows connections whose small writes must not wait for an ACK (40 ms of each first token).
    made = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
    except OSError as failure:
        made.close()
        told = f"port {port} of {host} cannot be had: {failure.strerror}"
        raise StorageError(told, do="choose another --port") from failure
    return made


async def _serve(server: _Server, serving: Serving, place: socket.socket, ready: Callable[[int], None]) -> None:
    async with serving.worker:
        serving.worker.on_end = server.stop
        task = asyncio.ensure_future(server.serve(sockets=[place]))
        while not server.started and not task.done():
            await asyncio.sleep(_POLL / 5)
        if server.started:
            ready(place.getsockname()[1])
        await task


@final
class _Server(uvicorn.Server):
    """uvicorn's server, which on a signal first lets finish what is under way."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    def stop(self) -> None:
        """End without waiting for requests."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Our own handlers while it runs; uvicorn would raise the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            # Only a main thread has any.
            yield
            return
        loop = asyncio.get_running_loop()

        def heard(_number: int, _frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._drain)

        before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self) -> None:
        worker = self._serving.worker
        if worker.draining:
            self.should_exit = self.force_exit = True
            return
        worker.draining = True
        self._draining = asyncio.ensure_future(self._until_idle())

    async def _until_idle(self) -> None:
        loop = asyncio.get_running_loop()
        latest = loop.time() + self._serving.settings.drain_seconds
        while self._serving.worker.open and loop.time() < latest:
            await asyncio.sleep(_POLL)
        # What was said last is still on its way to the clients.
        await asyncio.sleep(_POLL)
        self.should_exit = True
