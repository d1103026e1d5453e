"""What a server is told when it is started: where it listens, who may ask, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that hold before anything is parsed, and for what one request may ask for."""

    body_bytes: int = 1 << 20
    file_bytes: int = 64 << 20
    header_bytes: int = 16 << 10
    headers: int = 64
    depth: int = 64
    prompts: int = 256
    choices: int = 16
    new_tokens: int = 4096
    likeliest: int = 20
    body_seconds: float = 30.0
    write_seconds: float = 120.0


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """`listen` is the address; `token` is what every route but /health asks for; `names` are hosts it answers to."""

    token: str
    port: int = 8000
    listen: str = LOOPBACK[0]
    names: tuple[str, ...] = LOOPBACK
    limits: Limits = Limits()
    adapters: Path | None = None
    state: Path = Path("runs/served")
    drain_seconds: float = 30.0
