"""Serving over HTTP: time to the first token under load, and what HTTP costs beside the engine's own time.

    python benchmarks/serve.py --model seedling --clients 64 --requests 512

The same requests (prompts of many lengths, streamed answers of many lengths) go to the engine alone, all there is at
once, and through HTTP from `clients` connections of another process, after a warm-up each. Both run `clients` requests
at a time. Prints one JSON object: seconds of each, tokens per second, the overhead, and times to the first token and
between tokens at 50, 90 and 99 %. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from luthier.infer.request import Request
from luthier.model.speaker import Sampling
from luthier.recipes.opened import open_named
from luthier.server.listen import listen
from luthier.server.opening import serve_opened
from luthier.server.serving import Serving
from luthier.server.settings import Settings
from luthier.server.worker import Steps

Work = tuple[list[int], int]
"""A prompt and the tokens of its answer."""


def work_of(count: int, vocabulary: int, *, seed: int = 0) -> list[Work]:
    """Prompts of 8 to 256 tokens and answers of 16 to 64."""
    draws = random.Random(seed)
    return [([draws.randrange(3, vocabulary) for _ in range(round(2 ** draws.uniform(3, 8)))], draws.randrange(16, 65))
            for _ in range(count)]  # fmt: skip


def alone(engine: Steps, work: Sequence[Work], at_once: int) -> float:
    """Seconds of the engine for all of it, `at_once` requests at a time."""
    waiting = iter(work)
    start, running = time.perf_counter(), 0
    for prompt, tokens in itertools.islice(waiting, at_once):
        engine.add(_request(prompt, tokens))
        running += 1
    while running:
        for news in engine.step():
            if news.ended:
                following = next(waiting, None)
                running -= following is None
                if following is not None:
                    engine.add(_request(*following))
    return time.perf_counter() - start


def _request(prompt: Sequence[int], tokens: int) -> Request:
    return Request(prompt=np.array(prompt, np.int32), sampling=Sampling(max_new_tokens=tokens))


def through_http(port: int, token: str, work: Sequence[Work], clients: int, model: str) -> dict[str, Any]:
    """The same from a process of its own: seconds, and the times of each answer."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # The process is there before the clock starts: it imports this file.
        pool.apply(os.getpid)
        return pool.apply(_clients, (port, token, list(work), clients, model))


def _clients(port: int, token: str, work: list[Work], clients: int, model: str) -> dict[str, Any]:
    async def all_of() -> dict[str, Any]:
        waiting = iter(work)
        first: list[float] = []
        between: list[float] = []
        said = 0

        async def client() -> None:
            nonlocal said
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for prompt, tokens in waiting:
                begun = time.perf_counter()
                writer.write(_bytes(token, {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                                            "ignore_eos": True, "stream": True}))  # fmt: skip
                last = 0.0
                while not (line := await reader.readline()).startswith(b"data: [DONE]"):
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        (between if last else first).append(now - (last or begun))
                        last = now
                said += tokens
                while (await reader.readline()).strip() != b"0":
                    pass
                await reader.readline()
            writer.close()

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"seconds": time.perf_counter() - start, "first": first, "between": between, "said": said}

    return asyncio.run(all_of())


def _bytes(token: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return (f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n").encode() + content  # fmt: skip


def shares(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds at 50, 90 and 99 %."""
    found = np.percentile(np.array(values) * 1000, [50, 90, 99])
    return {f"p{share}": round(float(each), 2) for share, each in zip((50, 90, 99), found, strict=True)}


def measure(model: str, clients: int, requests: int, repetitions: int) -> dict[str, Any]:
    """Engine and HTTP by turns; the medians of some repetitions."""
    opened = open_named(model)
    token = secrets.token_hex(16)
    vocabulary = opened.tokenizer.vocabulary_size
    work, warm = work_of(requests, vocabulary), work_of(2 * clients, vocabulary, seed=1)
    own: list[float] = []
    over: list[dict[str, Any]] = []
    with TemporaryDirectory() as state:
        for _ in range(repetitions):
            settings = Settings(token=token, port=0, state=Path(state))
            serving = serve_opened(opened, settings, base="base", waiting=requests)
            alone(serving.worker.engine, warm, clients)
            own.append(alone(serving.worker.engine, work, clients))
            serving = serve_opened(opened, settings, base="base", waiting=requests)
            over.append(_served(serving, token, warm, work, clients))
    seconds = float(np.median([each["seconds"] for each in over]))
    tokens = sum(each for _, each in work)
    return {
        "model": model, "clients": clients, "requests": requests, "repetitions": repetitions, "tokens_said": tokens,
        "tokens_read": sum(len(prompt) for prompt, _ in work),
        "engine_seconds": round(float(np.median(own)), 3), "http_seconds": round(seconds, 3),
        "overhead": round(seconds / float(np.median(own)) - 1, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_ms": shares([each for one in over for each in one["first"]]),
        "between_tokens_ms": shares([each for one in over for each in one["between"]]),
    }  # fmt: skip


def _served(serving: Serving, token: str, warm: Sequence[Work], work: Sequence[Work], clients: int) -> dict[str, Any]:
    ports: list[int] = []
    there = threading.Event()

    def ready(port: int) -> None:
        ports.append(port)
        there.set()

    thread = threading.Thread(target=listen, args=(serving,), kwargs={"ready": ready})
    thread.start()
    there.wait()
    try:
        through_http(ports[0], token, warm, clients, "base")
        return through_http(ports[0], token, work, clients, "base")
    finally:
        serving.worker.loop.call_soon_threadsafe(serving.worker.on_end)
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="seedling", help="run, model folder or hub id")
    parser.add_argument("--clients", type=int, default=64, help="connections, and requests of the engine at a time")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.model, chosen.clients, chosen.requests, chosen.repetitions), indent=1))


if __name__ == "__main__":
    main()
