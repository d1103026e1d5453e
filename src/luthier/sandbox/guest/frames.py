"""Frames on the channel between host and guest: four bytes of length, then JSON."""

from __future__ import annotations

import json
import os
from typing import Any, Final

LENGTH: Final = 4


def send(descriptor: int, message: object) -> None:
    """Write one frame, however long that takes."""
    body = json.dumps(message, separators=(",", ":")).encode()
    view = memoryview(len(body).to_bytes(LENGTH, "big") + body)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Any:
    """Read one frame. Raises EOFError at the end of the channel."""
    return json.loads(_taken(descriptor, int.from_bytes(_taken(descriptor, LENGTH), "big")))


def _taken(descriptor: int, count: int) -> bytes:
    pieces = []
    while count:
        piece = os.read(descriptor, min(count, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
