"""Streams on the wire: pieces as the layers would write them, for clients of either version of HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from typing import Any

import h11
import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import RequestResponseCycle as H11Cycle
from uvicorn.server import ServerState

from luthier.recipes.opening.opened import Opened
from luthier.server.connection import Connection
from luthier.server.settings import Limits
from luthier.server.stream import Frame
from tests.server.fakes import TOKEN, FakeEngine, Running, fake_serving, running

TEXTS = ["", "a", 'quote " and \\', "line\nbreak\t\u2028 é 😀 \x00", '"\ue000text\ue001"', "\ue000text\ue001"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("model", ["seedling", '"\ue000text\ue001"', "\ue000text\ue001"])
def test_a_text_alone_is_the_piece_that_all_of_it_would_be(text: str, model: str) -> None:
    """Breaks when what stands around a text is cut at another place."""

    def plain(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text}, "finish_reason": None}

    frame = Frame({"id": "x", "model": model}, plain)
    for index in (0, 1, 0):
        assert frame.text(index, text) == frame(plain(index, text))
        found = json.loads(frame.text(index, text).removeprefix(b"data: "))
        assert found == {"id": "x", "model": model, "choices": [plain(index, text)]}


def asked(port: int, version: str) -> tuple[Any, bytes]:
    """The head and the body of a stream, by an HTTP client that knows nothing of how the server writes."""
    body = json.dumps({"model": "seedling", "prompt": "x", "stream": True, "max_tokens": 60}).encode()
    head = (f"POST /v1/completions HTTP/{version}\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode()  # fmt: skip
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
    reader.send(h11.EndOfMessage())
    response, found = None, bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(head + body)
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                reader.receive_data(wire.recv(65536))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                found += event.data
    return response, bytes(found)


def test_each_client_gets_the_frames_it_can_read(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a piece is framed twice, or not, or in chunks for a client that knows none."""
    written: list[bytes] = []
    put = Connection.put

    def noted(self: Connection, piece: bytes) -> None:
        written.append(piece)
        put(self, piece)

    monkeypatch.setattr(Connection, "put", noted)
    engine = FakeEngine(lambda _: range(40, 100), pause=0.003)

    def text(body: bytes) -> str:
        events = body.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
        assert body.endswith(b"data: [DONE]\n\n") and len(events) > 2
        return "".join(json.loads(each[6:])["choices"][0]["text"] for each in events)

    server: Running
    with running(fake_serving(opened, engine)) as server:
        newer, in_chunks = asked(server.port, "1.1")
        assert (b"transfer-encoding", b"chunked") in newer.headers and len(written) > 1
        count = len(written)
        older, in_one = asked(server.port, "1.0")
        assert not any(name == b"transfer-encoding" for name, _ in older.headers) and len(written) == count
        assert text(in_chunks) == text(in_one) == opened.tokenizer.decode(range(40, 100))


def test_pieces_and_what_comes_through_the_layers_keep_their_order(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a piece overtakes an earlier one that waits in the layers for a slow reader."""
    draws, way, said = random.Random(0), {True: 0, False: 0}, [*range(40, 340)] * 5

    def takes(self: Connection) -> bool:
        way[taken := draws.random() < 0.5] += 1
        return taken and not self.transport.is_closing()

    send = H11Cycle.send

    async def slowly(self: Any, message: Any) -> None:
        await asyncio.sleep(0.01)
        await send(self, message)

    monkeypatch.setattr(Connection, "takes", property(takes))
    monkeypatch.setattr(H11Cycle, "send", slowly)
    serving = fake_serving(opened, FakeEngine(lambda _: said, pause=0.001))
    serving.worker.gather = 0.003
    with running(serving) as server:
        _, found = asked(server.port, "1.1")
    events = found.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
    text = "".join(json.loads(each[6:])["choices"][0]["text"] for each in events)
    assert text == opened.tokenizer.decode(said) and min(way.values()) > 0


def test_a_client_that_leaves_takes_its_request_with_it(opened: Opened) -> None:
    """Breaks when nobody looks whether the client of a stream is still there: nothing else of it is awaited."""
    engine = FakeEngine(lambda _: [40] * 10_000, pause=0.002)
    body = json.dumps({"model": "seedling", "prompt": "x", "stream": True, "max_tokens": 60}).encode()
    with running(fake_serving(opened, engine)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
            wire.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
                         f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            while b"data: {" not in wire.recv(65536):
                pass
        latest = time.monotonic() + 20
        while (engine.running or server.serving.worker.open) and time.monotonic() < latest:
            time.sleep(0.01)
        assert not engine.running and not server.serving.worker.open


def test_who_reads_slowly_or_has_gone_is_not_written_to(opened: Opened) -> None:
    """Breaks when what waits for a slow reader grows without bounds."""

    class Wire(asyncio.Transport):
        closing = False
        sent = b""

        def write(self, data: Any) -> None:
            self.sent += data

        def is_closing(self) -> bool:
            return self.closing

    async def work() -> None:
        made = Connection(Config(lambda: None, log_config=None), ServerState(), {}, limits=Limits())  # type: ignore[arg-type]
        wire = Wire()
        made.connection_made(wire)
        assert made.write(b"0123456789") and wire.sent == b"a\r\n0123456789\r\n"
        made.pause_writing()
        assert not made.write(b"x")
        made.resume_writing()
        assert not made.write(b""), "an empty chunk would end the answer"
        wire.closing = True
        assert not made.write(b"x") and wire.sent == b"a\r\n0123456789\r\n"

    asyncio.run(work())


@pytest.mark.parametrize("reads", [False, True])
def test_who_takes_nothing_for_long_is_let_go(reads: bool) -> None:
    """Breaks when what waits for a client is kept for ever, or a client that reads loses its answer."""
    size, seconds = 1 << 25, 0.5

    async def much(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def work() -> None:
        config, state, loop = Config(much, log_config=None), ServerState(), asyncio.get_running_loop()
        limits = Limits(write_seconds=seconds)
        server = await loop.create_server(lambda: Connection(config, state, {}, limits=limits), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        found = 0
        if reads:
            while found < size:
                found += len(await asyncio.wait_for(reader.read(1 << 20), 20))
            # Who has read it all keeps the connection for the next request.
            await asyncio.sleep(1.5 * seconds)
        else:
            while not state.connections:
                await asyncio.sleep(0.01)
            begun = loop.time()
            while state.connections:
                assert loop.time() < begun + 20, "it is held on to"
                await asyncio.sleep(0.01)
            assert loop.time() - begun >= seconds * 0.9
        assert len(state.connections) == reads
        writer.close()
        server.close()

    asyncio.run(work())
