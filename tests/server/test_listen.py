"""The socket that is listened at."""

from __future__ import annotations

import socket
import time

from luthier.recipes.opening.opened import Opened
from luthier.server.listen import bound
from tests.server.fakes import FakeEngine, fake_serving, running


def test_small_writes_do_not_wait_for_an_acknowledgement(opened: Opened) -> None:
    """Breaks when asyncio does not know our connections for TCP, and leaves Nagle's algorithm on (40 ms each)."""
    with bound("127.0.0.1", 0) as place:
        assert place.proto == socket.IPPROTO_TCP
    with running(fake_serving(opened, FakeEngine(lambda _: range(40, 60)))) as server, server.client() as client:
        body = {"model": "seedling", "prompt": "x", "stream": True}
        times = []
        for _ in range(20):
            start = time.monotonic()
            assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
            times.append(time.monotonic() - start)
    assert min(times) < 0.035
