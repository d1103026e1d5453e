"""One address and no other: no redirect, no proxy, no token elsewhere or in words, nothing without bounds."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from luthier.core.errors import LuthierError, RecipeError, RefusedError
from luthier.infer.wire import RemoteError, Wire
from tests.engines import Foreign, foreign

SECRET = "sk-very-secret-token"


def scripted(answer: Any, status: int = 200, **more: Any) -> Foreign:
    return Foreign("vllm", {}, script=lambda _path, _body: (status, answer), **more)


def test_values_go_out_and_come_back() -> None:
    with foreign(scripted({"a": [1]}, token=SECRET)) as engine:
        for url in (engine.url, engine.url + "/", engine.url + "/v1"):
            wire = Wire(url, token=SECRET)
            assert wire.get("/v1/models").body == {"a": [1]} and wire.shown == engine.url
        assert wire.post("/x", {"b": "ü"}).fine
        path, headers, body = engine.asked[-1]
        assert (path, body) == ("/x", {"b": "ü"}) and headers["Content-Type"] == "application/json"
        assert Wire(engine.url).get("/x").status == 401
    with foreign(scripted(b"<html>")) as engine:
        assert Wire(engine.url + "/deep").get("/x").body == "<html>" and engine.asked[0][0] == "/deep/x"


def test_a_redirect_is_refused_and_nobody_else_gets_the_token() -> None:
    with foreign(scripted({})) as other, foreign(scripted({}, redirect=other.url)) as engine:
        with pytest.raises(RefusedError, match="points elsewhere") as caught:
            Wire(engine.url, token=SECRET).post("/v1/completions", {})
        assert caught.value.exit_code == 77 and SECRET not in str(caught.value) and not other.asked


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with foreign(scripted({})) as proxy, foreign(scripted({"own": 1})) as engine:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert Wire(engine.url, token=SECRET).get("/x").body == {"own": 1} and not proxy.asked


def test_nobody_there_and_nobody_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(RemoteError, match="refused") as caught:
            Wire(f"http://127.0.0.1:{taken.getsockname()[1]}", token=SECRET).get("/v1/models")
    assert caught.value.exit_code == 69
    with foreign(scripted({}, pause=1.0)) as engine, pytest.raises(RemoteError, match=r"within 0\.2 seconds"):
        Wire(engine.url, seconds=0.2).get("/v1/models")


@pytest.fixture
def raw() -> Iterator[Callable[[list[bytes], float], str]]:
    """A server that sends some bytes, with pauses; whatever is asked."""
    places: list[socket.socket] = []

    def serve(parts: list[bytes], pause: float) -> str:
        place = socket.create_server(("127.0.0.1", 0))
        places.append(place)

        def answer() -> None:
            connection, _ = place.accept()
            with connection:
                connection.recv(65536)
                try:
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(pause)
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        return f"http://127.0.0.1:{place.getsockname()[1]}"

    yield serve
    for place in places:
        place.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("parts", [[HEAD, *[b"x"] * 999], [*[bytes([each]) for each in HEAD], b"x" * 1000]])
def test_dripping_bytes_end_with_the_time_of_the_call(
    raw: Callable[[list[bytes], float], str], parts: list[bytes]
) -> None:
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"within 0\.3 seconds"):
        Wire(raw(parts, 0.02), seconds=0.3).get("/x")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("parts", "told"),
    [([HEAD, b"{"], "broke its answer off"), ([b"nonsense\r\n\r\n"], "cannot be asked"), ([b""], "cannot be asked"),
     ([b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"x" * 99999], "more than 1,000 bytes"),
     ([b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n"], "cannot be asked")],
)  # fmt: skip
def test_what_is_no_answer(raw: Callable[[list[bytes], float], str], parts: list[bytes], told: str) -> None:
    with pytest.raises(RemoteError, match=told):
        Wire(raw(parts, 0), seconds=5.0, most_bytes=1000).get("/x")


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://x", "file:///etc/passwd", "http://", "http://x:0", "http://x:99999", "http://u:pw@x",
     "http://x?y=1", "http://x#y", "http://x\r\nHost: y", "http://[::1"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Wire(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "insecure", "fine"),
    [("http://127.0.0.1:1", False, True), ("http://[::1]:1", False, True), ("http://localhost", False, True),
     ("https://engine.example", False, True), ("http://engine.example", True, True),
     ("http://engine.example", False, False), ("http://10.0.0.7:8000", False, False),
     ("http://localhost.evil.example", False, False)],
)  # fmt: skip
def test_a_token_goes_to_other_machines_encrypted(url: str, insecure: bool, fine: bool) -> None:
    Wire(url)
    if fine:
        assert SECRET not in repr(Wire(url, token=SECRET, insecure=insecure))
    else:
        with pytest.raises(RefusedError, match="in the clear"):
            Wire(url, token=SECRET, insecure=insecure)


@pytest.mark.parametrize("token", ["a b", "a\r\nHost: x", "ü"])
def test_a_token_that_no_header_carries(token: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Wire("http://127.0.0.1", token=token)
    assert token not in str(caught.value)


def test_words_of_an_engine_are_cut_short() -> None:
    for body in ({"error": {"message": "no\n" * 999}}, {"detail": "x" * 999}, "x" * 999, [1], None):
        with foreign(scripted(body, status=500)) as engine:
            assert len(Wire(engine.url).get("/x").words) <= 300
    error: LuthierError = RemoteError("gone")
    assert isinstance(pickle.loads(pickle.dumps(error)), ConnectionError)
