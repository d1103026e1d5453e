"""Many clients at once (R11): normal ones, ones that leave in the middle, slow ones, and ones that send nonsense.

Meanwhile one adapter takes the place of another under a name. Every answer is the one that a client alone gets, none is
lost, and afterwards nothing is held. The long form behind the
slow marker is the mark of the benchmark: 200 clients, 20,000 requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from luthier.recipes.opening.opened import open_named
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from tests.server.fakes import TOKEN, Running, running, save_adapters

PROMPTS = ["The ship", "One, two,", "My name is", "In the morning", "Seven plus five", "A cat and a dog"]
ADAPTERS = ("french", "code")
HEAD = "\r\n".join([
    "POST %s HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}", "Content-Type: application/json", "",
])  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    own = open_named("seedling", precision="float32")
    adapters = tmp_path_factory.mktemp("adapters")
    save_adapters(adapters, ADAPTERS)
    settings = Settings(token=TOKEN, port=0, state=tmp_path_factory.mktemp("state"), adapters=adapters)
    with running(serve_opened(own, settings, base="seedling", tokens=4096, waiting=1000)) as listening:
        yield listening


def body(prompt: int, *, stream: bool) -> dict[str, Any]:
    greedy = prompt % 2 == 0
    return {"model": "seedling", "prompt": PROMPTS[prompt], "max_tokens": 6 + 2 * prompt, "stream": stream,
            "temperature": 0 if greedy else 1, "seed": prompt}  # fmt: skip


async def asked(port: int, sent: bytes, *, slow: bool = False, leave_after: int = 0) -> bytes:
    """What comes back for raw bytes; all of it, a few bytes at a time, or the first few before the client leaves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2048)
    try:
        writer.write(sent)
        await writer.drain()
        if leave_after:
            return await reader.read(leave_after)
        got = b""
        while piece := await reader.read(64 if slow else 65536):
            got += piece
            if slow:
                await asyncio.sleep(0.002)
        return got
    finally:
        writer.close()


def request(values: dict[str, Any] | bytes, path: str = "/v1/completions") -> bytes:
    content = values if isinstance(values, bytes) else json.dumps(values).encode()
    return f"{HEAD % path}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


def text_of(answer: bytes, *, stream: bool) -> str:
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer[:300]
    if not stream:
        return str(json.loads(rest)["choices"][0]["text"])
    assert b"data: [DONE]" in rest, rest[-300:]
    chunks = [line[6:] for line in rest.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for each in chunks for choice in json.loads(each)["choices"])


async def client(port: int, number: int, requests: int, wanted: list[str], seen: Counter[str]) -> None:
    draws = random.Random(number)
    for _ in range(requests):
        kind = draws.choices(["normal", "leaves", "slow", "nonsense"], [70, 15, 10, 5])[0]
        prompt, stream = draws.randrange(len(PROMPTS)), draws.random() < 0.5
        sent = request(body(prompt, stream=stream))
        if kind == "nonsense":
            answer = await asked(port, request(draws.randbytes(40)))
            assert answer.startswith(b"HTTP/1.1 4"), answer[:200]
        elif kind == "leaves":
            await asked(port, request(body(prompt, stream=True) | {"max_tokens": 300, "ignore_eos": True}),
                        leave_after=draws.randrange(1, 700))  # fmt: skip
        else:
            answer = await asked(port, sent, slow=kind == "slow")
            assert text_of(answer, stream=stream) == wanted[prompt]
        seen[kind] += 1


async def load(port: int, name: str, path: str) -> None:
    """Let a name stand for an adapter, whatever it stood for."""
    values = {"lora_name": name, "lora_path": path, "load_inplace": True}
    answer = await asked(port, request(values, "/v1/load_lora_adapter"))
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


async def swapping(port: int, over: asyncio.Event, wanted: dict[str, str]) -> int:
    """One adapter after another under the same name, each asked at once; how often."""
    count = 0
    while not over.is_set():
        name = ADAPTERS[count % 2]
        await load(port, "swapped", name)
        answer = await asked(port, request(body(0, stream=False) | {"model": "swapped"}))
        assert text_of(answer, stream=False) == wanted[name]
        count += 1
    return count


async def storm(running_: Running, clients: int, requests: int) -> Counter[str]:
    said: dict[str, str] = {}
    for name in ADAPTERS:
        await load(running_.port, name, name)
        answer = await asked(running_.port, request(body(0, stream=False) | {"model": name}))
        said[name] = text_of(answer, stream=False)
    assert len(set(said.values())) == len(ADAPTERS)
    alone = [await asked(running_.port, request(body(n, stream=False))) for n in range(len(PROMPTS))]
    wanted = [text_of(each, stream=False) for each in alone]
    seen: Counter[str] = Counter()
    over = asyncio.Event()
    swaps = asyncio.ensure_future(swapping(running_.port, over, said))
    await asyncio.gather(*(client(running_.port, n, requests, wanted, seen) for n in range(clients)))
    over.set()
    assert await swaps > 1
    worker = running_.serving.worker
    for _ in range(200):
        if not worker.open and not worker.counts.running and not worker.counts.held:
            break
        await asyncio.sleep(0.05)
    assert worker.open == 0 and worker.counts.running == worker.counts.waiting == worker.counts.held == 0
    return seen


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


def test_many_clients_get_what_each_alone_gets(loaded: Running) -> None:
    before = open_files()
    seen = asyncio.run(storm(loaded, clients=200, requests=2))
    assert sum(seen.values()) == 400 and set(seen) == {"normal", "leaves", "slow", "nonsense"}
    assert open_files() <= before + 8
    assert not any(status >= 500 for _, status in loaded.serving.metrics.requests)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_thousand_requests(loaded: Running) -> None:
    asyncio.run(storm(loaded, clients=50, requests=2))
    process = psutil.Process(os.getpid())
    files, memory = open_files(), process.memory_info().rss
    seen = asyncio.run(storm(loaded, clients=200, requests=100))
    assert sum(seen.values()) == 20_000
    assert open_files() <= files + 8 and process.memory_info().rss < 1.05 * memory + 64 * 2**20
    assert not any(status >= 500 for _, status in loaded.serving.metrics.requests)
