"""Serving over HTTP: time to the first token under load, and what HTTP costs beside the engine's own time.

    python benchmarks/serve.py --model seedling --clients 64 --requests 512
    python benchmarks/serve.py --no-engine                  # what HTTP alone costs: on a busy machine too

The same requests (prompts of many lengths, streamed answers of many lengths) go to the engine alone, all there is at
once, and through HTTP from `clients` connections of another process, after a warm-up each. Both run `clients` requests
at a time. Prints one JSON object: seconds of each, tokens per second, the overhead,
times to the first token and between pieces at 50, 90 and 99 %, and processor time a token: of the thread that speaks
HTTP, of the rest of the server, and of the clients, who take the same cores on a small machine. `overhead` is of wall
time and has the clients in it; `overhead_of_server` is the processor time of the HTTP thread by the engine's seconds:
what it would be if nothing of it ran beside the engine. Run it on a quiet machine; processor times bear a busy one.
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
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np
from counts import count, not_below_zero

from luthier.core.child import WAIT_POLICY
from luthier.infer.reader import Counts
from luthier.infer.request import News, Request, Said
from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import open_named
from luthier.server.listen import listen
from luthier.server.names import Names
from luthier.server.opening import serve_opened
from luthier.server.serving import Serving
from luthier.server.settings import Settings
from luthier.server.worker import Steps, Worker

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
                last, tail = 0.0, b""
                # A client that costs next to nothing: blocks as they come, of which only the end is looked for.
                while not tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                    block = await reader.read(65536)
                    tail = tail[-64:] + block
                    if b"data: {" in block:
                        now = time.perf_counter()
                        (between if last else first).append(now - (last or begun))
                        last = now
                said += tokens
            writer.close()

        start, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"seconds": time.perf_counter() - start, "first": first, "between": between, "said": said,
                "cpu": time.process_time() - cpu}  # fmt: skip

    return asyncio.run(all_of())


def _bytes(token: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return (f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n").encode() + content  # fmt: skip


def shares(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds at 50, 90 and 99 %."""
    found = np.percentile(np.array(values or [0.0]) * 1000, [50, 90, 99])
    return {f"p{share}": round(float(each), 2) for share, each in zip((50, 90, 99), found, strict=True)}


@final
class Nothing:
    """An engine that computes nothing: a token for each request and step, and `pause` seconds a step."""

    def __init__(self, vocabulary: int, pause: float) -> None:
        self._draws = random.Random(0)
        self._left: dict[int, int] = {}
        self._next = 0
        self.vocabulary = vocabulary
        self.pause = pause

    @property
    def busy(self) -> bool:
        return bool(self._left)

    @property
    def counts(self) -> Counts:
        return Counts(0, len(self._left))

    def add(self, request: Request) -> int:
        self._next += 1
        self._left[self._next] = request.sampling.max_new_tokens
        return self._next

    def step(self) -> list[News]:
        time.sleep(self.pause)
        self._left = {number: left - 1 for number, left in self._left.items()}
        said = [News(number, 0, (Said(self._draws.randrange(3, self.vocabulary), -1.0),), "" if left else "length")
                for number, left in self._left.items()]  # fmt: skip
        self._left = {number: left for number, left in self._left.items() if left}
        return said

    def cancel(self, request: int) -> bool:
        return self._left.pop(request, None) is not None


def measure(model: str, clients: int, requests: int, repetitions: int, *, pause: float | None = None) -> dict[str, Any]:
    """Engine and HTTP by turns; the medians of some repetitions. With `pause` an engine of nothing takes its place."""
    # As `luthier serve` opens it.
    opened = open_named(model, speaks=True)
    token = secrets.token_hex(16)
    vocabulary = opened.tokenizer.vocabulary_size
    work, warm = work_of(requests, vocabulary), work_of(2 * clients, vocabulary, seed=1)
    own: list[float] = []
    over: list[dict[str, Any]] = []

    def made(state: str) -> Serving:
        settings = Settings(token=token, port=0, state=Path(state))
        if pause is None:
            return serve_opened(opened, settings, base="base", waiting=requests)
        return Serving(opened, Worker(Nothing(vocabulary, pause), waiting=requests), Names("base"), settings)

    with TemporaryDirectory() as state:
        for _ in range(repetitions):
            engine = made(state).worker.engine
            alone(engine, warm, clients)
            own.append(alone(engine, work, clients))
            over.append(_served(made(state), token, warm, work, clients))
    return {"model": model, "engine": pause is None, "clients": clients, "requests": requests,
            "repetitions": repetitions, **figures(own, over, work)}  # fmt: skip


def figures(own: Sequence[float], over: Sequence[dict[str, Any]], work: Sequence[Work]) -> dict[str, Any]:
    """The medians: seconds, what HTTP costs, and times as clients see them."""
    tokens = sum(each for _, each in work)

    def middle(name: str) -> float:
        return float(np.median([each[name] for each in over]))

    seconds, engine = middle("seconds"), float(np.median(own))
    return {
        "tokens_said": tokens, "tokens_read": sum(len(prompt) for prompt, _ in work),
        "engine_seconds": round(engine, 3), "http_seconds": round(seconds, 3),
        "overhead": round(seconds / engine - 1, 4),
        "overhead_of_server": round(middle("http_cpu") / engine, 4),
        "microseconds_a_token": {name: round(middle(f"{name}_cpu") / tokens * 1e6, 1) for name in
                                 ("http", "engine", "other", "client")},
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_ms": shares([each for one in over for each in one["first"]]),
        "between_pieces_ms": shares([each for one in over for each in one["between"]]),
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
        before = _spent(thread)
        found = through_http(ports[0], token, work, clients, "base")
        return {**found, **{name: after - before[name] for name, after in _spent(thread).items()},
                "client_cpu": found["cpu"]}  # fmt: skip
    finally:
        serving.worker.loop.call_soon_threadsafe(serving.worker.on_end)
        thread.join()


def _spent(http: threading.Thread) -> dict[str, float]:
    """Processor seconds so far: of the HTTP thread, of the engine's, and of all other threads (products, words)."""
    engine = next(each for each in threading.enumerate() if each.name == "engine" and each.is_alive())
    http_cpu, engine_cpu = (time.clock_gettime(time.pthread_getcpuclockid(each.ident or 0)) for each in (http, engine))
    return {"http_cpu": http_cpu, "engine_cpu": engine_cpu, "other_cpu": time.process_time() - http_cpu - engine_cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="seedling", help="run, model folder or hub id")
    parser.add_argument("--clients", type=count, default=64, help="connections, and requests of the engine at a time")
    parser.add_argument("--requests", type=count, default=512)
    parser.add_argument("--repetitions", type=count, default=3)
    parser.add_argument("--no-engine", action="store_true", help="say tokens without computing them, a step of --pause")
    parser.add_argument("--pause", type=not_below_zero, default=0.008, help="seconds a step takes with --no-engine")
    chosen = parser.parse_args()
    if WAIT_POLICY not in os.environ:
        # As `luthier serve` has it; torch, which is loaded by now, has read another.
        os.environ[WAIT_POLICY] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    pause = chosen.pause if chosen.no_engine else None
    found = measure(chosen.model, chosen.clients, chosen.requests, chosen.repetitions, pause=pause)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
