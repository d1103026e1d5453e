"""JSON over HTTP to one engine and to nobody else.

Idea: the address is fixed when the wire is made; redirects are refused, proxies of the environment are not asked, and
the token is sent to that address only and stands in no message. Everything is bounded: the time of a call as a whole
(an engine that sends a byte a second does not keep us), the bytes of an answer, and the words of an engine that we
repeat.
Use when: an engine that somebody else runs is asked. Each call has a connection of its own, so threads may share a
wire.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Final, final
from urllib.parse import SplitResult, urlsplit

from luthier.core.errors import LuthierError, RecipeError, RefusedError

_LATER: Final = frozenset({429, 502, 503, 504})
"""Statuses of who has too much to do, or whose engine is not there: the same may be asked later."""
_LATEST: Final = 1e6
"""Seconds that are as good as never."""
_WORDS: Final = 300
"""Characters of an engine's own words that are repeated."""


class RemoteError(LuthierError, ConnectionError):
    """An engine somewhere else that is not there, or that answers otherwise than its API says."""

    code = "remote"
    exit_code = 69
    advice = "look whether the engine runs at this address and has loaded its model"


class UnavailableError(RemoteError):
    """An engine that is not there now, or has too much to do: later it may answer."""

    code = "unavailable"
    advice = "start the engine, or wait until it has less to do; then run the same command again"

    pause: float = 0.0
    """Seconds that it wants to be left alone."""


@final
@dataclass(frozen=True)
class Answer:
    """What an engine has answered: the status, and the body as plain values, or as text where it is no JSON."""

    status: int
    body: Any

    @property
    def fine(self) -> bool:
        """Whether it did what it was asked."""
        return self.status == 200

    @property
    def words(self) -> str:
        """What the engine says of itself, cut short."""
        found = self.body
        for key in ("error", "message", "error_message", "detail"):
            if isinstance(found, Mapping) and key in found:
                found = found[key]
        words = " ".join(str(found).split())
        return "a page of HTML" if words[:1] == "<" else words[:_WORDS]


@final
class Calls:
    """The calls of a wire that are under way, so that they can be cut off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def begin(self, sock: socket.socket) -> None:
        """One more."""
        with self._lock:
            self._open.add(sock)

    def over(self, sock: socket.socket | None) -> None:
        """One less."""
        with self._lock:
            self._open.discard(sock)  # type: ignore[arg-type]

    def cut(self) -> None:
        """Have all of them fail now."""
        with self._lock:
            for sock in self._open:
                _cut(sock)


@final
@dataclass(frozen=True)
class Wire:
    """Calls to the engine at `url`, each at most `seconds` long, with answers of at most `most_bytes`.

    Raises RecipeError for an address that is none, and RefusedError for a token that would be sent in the clear to
    another machine (`insecure` allows it).
    """

    url: str
    token: str = field(default="", repr=False)
    seconds: float = 60.0
    most_bytes: int = 64 * 2**20
    insecure: bool = False
    calls: Calls = field(default_factory=Calls, repr=False, compare=False)

    def __post_init__(self) -> None:
        place = self._place
        if self.token and (not self.token.isascii() or not self.token.isprintable() or " " in self.token):
            raise RecipeError("the engine's token has characters that no header can carry",
                              allowed="printable ASCII without spaces")  # fmt: skip
        if self.token and place.scheme == "http" and not self.insecure and not _here(place.hostname or ""):
            raise RefusedError(f"a token would be sent to {place.hostname} in the clear",
                               do="name an https:// address, or allow it with --insecure-http")  # fmt: skip

    @property
    def shown(self) -> str:
        """The address without what may follow it."""
        place = self._place
        return f"{place.scheme}://{place.netloc}{_prefix(place)}"

    def get(self, path: str) -> Answer:
        """What the engine shows at a path."""
        return self._call("GET", path, None)

    def post(self, path: str, values: Any) -> Answer:
        """What the engine answers to some values."""
        return self._call("POST", path, json.dumps(values).encode())

    @property
    def _place(self) -> SplitResult:
        try:
            place = urlsplit(self.url)
            fine = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
        except ValueError:
            fine = False
        if not fine or place.username is not None or place.query or place.fragment or not self.url.isprintable():
            shown = self.url if "@" not in self.url else "(an address with a name or a password in it)"
            raise RecipeError(f"the address of the engine is {shown!r:.200}", allowed="http(s)://HOST:PORT",
                              do="a token goes into LUTHIER_ENGINE_TOKEN")  # fmt: skip
        return place

    def _call(self, method: str, path: str, body: bytes | None) -> Answer:
        place = self._place
        connection = self._connection(place)
        latest = time.monotonic() + self.seconds
        watch: threading.Timer | None = None
        sock: socket.socket | None = None
        try:
            connection.connect()
            # Kept here: a connection lets go of its own once the answer is to be read to its end.
            sock = connection.sock
            self.calls.begin(sock)
            # A time limit of the socket is one of each wait; this one is of the call, however slowly bytes drip.
            watch = threading.Timer(self.seconds, _cut, [sock])
            watch.daemon = True
            watch.start()
            connection.request(method, _prefix(place) + path, body, self._headers(body))
            with connection.getresponse() as response:
                answer = self._read(response, path)
            if time.monotonic() >= latest:
                # What was cut off may look like an answer that is short.
                raise TimeoutError
            return answer
        except RefusedError:
            raise
        except (OSError, HTTPException, ValueError) as failure:
            if isinstance(failure, TimeoutError) or time.monotonic() >= latest:
                raise UnavailableError(f"{self.shown}{path} did not answer within {self.seconds:g} seconds") from None
            if isinstance(failure, LuthierError):
                raise
            if isinstance(failure, ssl.SSLError):
                raise RemoteError(f"{self.shown} cannot be asked: {_reason(failure)}",
                                  do="look whether it speaks https:// and who signed its certificate") from None
            raise UnavailableError(f"{self.shown} cannot be asked: {_reason(failure)}") from None
        finally:
            if watch is not None:
                watch.cancel()
            self.calls.over(sock)
            connection.close()

    def _read(self, response: HTTPResponse, path: str) -> Answer:
        """The whole answer, within bounds."""
        if 300 <= response.status < 400:
            raise RefusedError(f"{self.shown}{path} answers {response.status} and points elsewhere",
                               do="name the address that it points to, if you trust it")  # fmt: skip
        content = response.read(self.most_bytes + 1)
        if len(content) > self.most_bytes:
            raise RemoteError(f"{self.shown}{path} answered more than {self.most_bytes:,} bytes")
        if response.length:
            raise UnavailableError(f"{self.shown}{path} broke its answer off, {response.length:,} bytes before its end")
        answer = Answer(response.status, _plain(content))
        if answer.status in _LATER:
            away = UnavailableError(f"{self.shown}{path} answered {answer.status}: {answer.words}")
            away.pause = _seconds(response.getheader("Retry-After", ""))
            raise away
        return answer

    def _connection(self, place: SplitResult) -> HTTPConnection:
        host, port = place.hostname or "", place.port
        if place.scheme == "https":
            return HTTPSConnection(host, port, timeout=self.seconds, context=ssl.create_default_context())
        return HTTPConnection(host, port, timeout=self.seconds)

    def _headers(self, body: bytes | None) -> dict[str, str]:
        found = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            found["Content-Type"] = "application/json"
        if self.token:
            found["Authorization"] = f"Bearer {self.token}"
        return found


def _prefix(place: SplitResult) -> str:
    """The path that stands before all others; people name the address with /v1, as clients of the API want it."""
    return place.path.rstrip("/").removesuffix("/v1")


def _cut(sock: socket.socket | None) -> None:
    """End whatever waits for a socket."""
    with contextlib.suppress(OSError):
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)


def _here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(text: str) -> float:
    """What Retry-After says: seconds from now, or a date (RFC 9110, section 10.2.3); 0 where it is neither."""
    if text.strip().isdecimal():
        return min(float(text), _LATEST)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return min(max((when - datetime.now(UTC)).total_seconds(), 0.0), _LATEST)


def _reason(failure: Exception) -> str:
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return f"{type(failure).__name__} {failure}"[:_WORDS]


def _plain(content: bytes) -> Any:
    text = content.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
