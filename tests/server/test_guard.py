"""Closed by default (S2): every route, whatever it is, is behind the guard; limits hold before anything is parsed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import pytest
from starlette.routing import Route

from luthier.recipes.opening.opened import Opened
from luthier.server.app import routes_of, routes_that_speak
from luthier.server.guard import OPEN, deeper, half_of_a_pair
from luthier.server.settings import Limits
from tests.server.fakes import TOKEN, FakeEngine, Running, fake_serving, running

LIMITS = Limits(body_bytes=4096, body_seconds=0.5, header_bytes=2048, headers=24)
TRUE = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def guarded(opened: Opened) -> Iterator[Running]:
    with running(fake_serving(opened, FakeEngine(lambda _: [5]), limits=LIMITS)) as listening:
        yield listening


def walked(routes: Sequence[Any]) -> Iterator[Route]:
    """Every route, those of included routers too; what is neither is one that this walk would pass over."""
    for route in routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            yield from walked(inner.routes)
        else:
            assert isinstance(route, Route), f"{route} is no route that this test knows"
            yield route


def requests_of(running_: Running) -> list[tuple[str, str]]:
    """A method and a path for each route there is, and some that are none."""
    found = [("GET", "/"), ("GET", "/docs"), ("POST", "/nothing"), ("GET", "/static/../x"), ("OPTIONS", "/v1/models")]
    for route in walked(routes_of(running_.serving, routes_that_speak(running_.serving)).routes):
        path = route.path.replace("{model:path}", "seedling")
        found += [(method, path.replace("{", "").replace("}", "")) for method in route.methods or ()]
    assert len(found) > 12
    return found


BAD_HEADERS = {
    "no token": (401, {}),
    "a wrong token": (401, {"Authorization": "Bearer wrong"}),
    "another scheme": (401, {"Authorization": f"Basic {TOKEN}"}),
    "a part of the token": (401, {"Authorization": f"Bearer {TOKEN[:-1]}"}),
    "a token that is no text": (401, {"Authorization": "Bearer \xff\xfe"}),
    "another host": (421, {**TRUE, "Host": "evil.example"}),
    "another host with our port": (421, {**TRUE, "Host": "evil.example:8000"}),
    "our name inside another": (421, {**TRUE, "Host": "localhost.evil.example"}),
    "a page of another site": (403, {**TRUE, "Origin": "https://evil.example"}),
    "a page without an origin": (403, {**TRUE, "Origin": "null"}),
    "our name on another port": (403, {**TRUE, "Origin": "http://127.0.0.1:1"}),
    "a fetch across sites": (403, {**TRUE, "Sec-Fetch-Site": "cross-site"}),
    "a fetch of the same site": (403, {**TRUE, "Sec-Fetch-Site": "same-site"}),
    "many headers": (431, {**TRUE, **{f"x-{number}": "1" for number in range(30)}}),
    "long headers": (431, {**TRUE, "x-long": "y" * 2100}),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_every_route_refuses(guarded: Running, name: str) -> None:
    """Breaks when any route, new ones included, is reached without passing the guard."""
    status, headers = BAD_HEADERS[name]
    before = dict(guarded.serving.metrics.requests)
    with httpx2.Client(base_url=guarded.url, timeout=10) as client:
        for method, path in requests_of(guarded):
            if status == 401 and path in OPEN:
                continue
            answer = client.request(method, path, headers={k: v.encode("latin-1") for k, v in headers.items()})  # type: ignore[misc]
            assert answer.status_code == status, f"{method} {path}"
            if method != "HEAD":
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"]
            assert TOKEN not in answer.text
    assert guarded.serving.metrics.requests == before, "a request came through to the routes"


def test_health_is_open_and_tells_nothing_else(guarded: Running) -> None:
    assert httpx2.get(f"{guarded.url}/health").json() == {"status": "ok"}


def test_our_own_page_and_programs_are_let_in(guarded: Running) -> None:
    for headers in ({}, {"Origin": guarded.url, "Sec-Fetch-Site": "same-origin"},
                    {"Host": f"localhost:{guarded.port}"}, {"Host": f"[::1]:{guarded.port}"}):  # fmt: skip
        assert httpx2.get(f"{guarded.url}/v1/models", headers={**TRUE, **headers}).status_code == 200


def test_streams_are_behind_the_guard_too(guarded: Running) -> None:
    body = {"model": "seedling", "messages": [{"role": "user", "content": "x"}], "stream": True}
    answer = httpx2.post(f"{guarded.url}/v1/chat/completions", json=body)
    assert answer.status_code == 401 and "data:" not in answer.text


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"[" * 100 + b"]" * 100, 400, "depth"),
        (b'{"model": "' + b"x" * 5000 + b'"}', 413, "body"),
        (b"{", 400, "invalid_parameter"),
        (b"", 400, "missing_parameter"),
        (b"null", 400, "invalid_parameter"),
        (b"\xff\xfe", 400, "invalid_parameter"),
        ('{"model": "é"}'.encode("latin-1"), 400, "invalid_parameter"),
        (b'{"model": "seedling", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', 400, "invalid_parameter"),
        (json.dumps({"model": "seedling", "messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400,
         "invalid_parameter"),
        (b'{"model": NaN}', 400, None),
        (json.dumps({"model": "seedling", "messages": [], "temperatur": 1}).encode(), 400, None),
        (b'{"model": "seedling", "messages": ' + b"9" * 4000 + b"}", 400, None),
    ],
)
def test_bodies_that_are_none(guarded: Running, body: bytes, status: int, code: str | None) -> None:
    headers = {**TRUE, "Content-Type": "application/json"}
    answer = httpx2.post(f"{guarded.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    if code is not None:
        assert answer.json()["error"]["code"] == code


def test_a_body_that_says_not_what_it_is(guarded: Running) -> None:
    """Breaks when who forgot the header is told of dictionaries."""
    with guarded.client() as client:
        answer = client.post("/v1/completions", content=b'{"model": "seedling", "prompt": "a"}')
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_depth_counts_brackets_outside_of_texts_only() -> None:
    assert not deeper(b'"' + b"[" * 100 + b'"', 10)
    assert not deeper(b'"\\"' + b"[" * 100 + b'"', 10)
    assert deeper(b'"\\\\"' + b"[" * 11, 10)
    assert not deeper(b"[]" * 100, 10)
    assert not deeper(b"[" * 10 + b"]" * 10, 10) and deeper(b'{"a":' * 11, 10)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (rb'"\ud83d\ude00"', None),
        (rb'"\\ud800"', None),
        (rb'"\\\ud800"', 3),
        (rb'"\ud800"', 1),
        (rb'"a\uDFFF"', 2),
        (rb'"\ud83d\ude00\ude00"', 13),
        (rb'"\ud83d \ude00"', 1),
        (rb'"\ud83d\ud83d\ude00"', 1),
        (rb'"\u00e9 d800"', None),
    ],
)
def test_half_a_pair_is_found(text: bytes, place: int | None) -> None:
    """Breaks when what is no character comes to a tokenizer, or a character outside of the first plane is refused."""
    assert half_of_a_pair(text) == place
    json.loads(text).encode("utf-8", "strict" if place is None else "surrogatepass")


@pytest.mark.parametrize("host", ["[::1]evil", "[::1]:80x", "[::1", "[::1].evil.example"])
def test_a_host_that_only_begins_like_ours_is_another(guarded: Running, host: str) -> None:
    answer = httpx2.get(f"{guarded.url}/v1/models", headers={**TRUE, "Host": host})
    assert answer.status_code == 421


def test_what_nobody_foresaw_is_told_in_the_form_of_every_error(
    guarded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when it is answered in plain words that no client reads, or ends the connection."""

    def broken(*_: object, **__: object) -> str:
        raise KeyError("/a/path/of/ours")

    monkeypatch.setattr(guarded.serving.metrics, "text", broken)
    with guarded.client() as client:
        answer = client.get("/metrics")
        assert answer.status_code == 500 and "/a/path" not in answer.text
        assert answer.json()["error"]["code"] == "unexpected"
        assert client.get("/health").status_code == 200
    assert guarded.serving.metrics.requests["/metrics", 500] >= 1


CHUNKED = b"POST /v1/completions HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n"
RAW = {
    "a chunked body that never ends": (CHUNKED + b"5\r\nabcde\r\n", b"408"),
    "a body that is too long, in chunks": (CHUNKED + b"1400\r\n" + b"a" * 0x1400 + b"\r\n", b"413"),
    "a length that is none": (b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: -5\r\n\r\n", b"400"),
    "two lengths": (b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", b"400"),
    "a chunk that is none": (CHUNKED + b"zz\r\n", b"400"),
    "two hosts": (b"GET /v1/models HTTP/1.1\r\n%sHost: evil.example\r\n\r\n", b"4"),
    "no host": (b"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n", b"4"),
    "HTTP/0.9": (b"GET /v1/models\r\n\r\n", b"400"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01", b""),
    "a huge header": (b"GET / HTTP/1.1\r\n%sX: " + b"y" * 100_000 + b"\r\n\r\n", b"4"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_request_are_refused_and_the_next_one_is_served(guarded: Running, name: str) -> None:
    sent, wanted = RAW[name]
    head = b"Host: 127.0.0.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        connection.sendall(sent.replace(b"%s", head))
        if not wanted:
            connection.shutdown(socket.SHUT_WR)
        got = connection.recv(65536)
        assert got.startswith(b"HTTP/1.1 " + wanted) or (not wanted and b"200" not in got[:15]), got[:200]
    assert httpx2.get(f"{guarded.url}/v1/models", headers=TRUE).status_code == 200


def test_while_it_drains_only_health_answers(opened: Opened) -> None:
    with running(fake_serving(opened, FakeEngine(lambda _: [5]))) as stopping:
        stopping.serving.worker.draining = True
        answer = httpx2.get(f"{stopping.url}/v1/models", headers=TRUE)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        health = httpx2.get(f"{stopping.url}/health")
        assert health.status_code == 503 and health.json() == {"status": "draining"}
