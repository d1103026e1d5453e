"""An engine that says what it is told to, and a server that runs in a thread of the test."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from luthier.adapters.lora import LoRA
from luthier.infer.reader import Counts
from luthier.infer.request import News, Request, Said
from luthier.model.files.adapter_files import save_adapter
from luthier.recipes.opening.opened import Opened, open_named
from luthier.server.listen import listen
from luthier.server.names import Names
from luthier.server.serving import Serving
from luthier.server.settings import Limits, Settings
from luthier.server.worker import Worker
from tests import forests

TOKEN = "a-token-for-tests"


@dataclass
class FakeEngine:
    """Says the tokens of `script` for a prompt, one a step and choice; `pause` is how long a step takes."""

    script: Callable[[Request], Sequence[int]]
    pause: float = 0.0
    fail: Callable[[], Exception | None] = lambda: None
    running: dict[int, list[list[int]]] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    steps: int = 0

    @property
    def busy(self) -> bool:
        return bool(self.running)

    @property
    def counts(self) -> Counts:
        return Counts(0, len(self.running), pages=8, held=len(self.running))

    def add(self, request: Request) -> int:
        number = len(self.requests)
        self.requests[number] = request
        self.running[number] = [list(self.script(request)) for _ in range(request.choices)]
        return number

    def step(self) -> list[News]:
        self.steps += 1
        if self.pause:
            time.sleep(self.pause)
        if (failure := self.fail()) is not None:
            raise failure
        news = []
        for number, choices in list(self.running.items()):
            for choice, left in enumerate(choices):
                if left:
                    token = left.pop(0)
                    news.append(News(number, choice, (Said(token, -1.0),), "" if left else "stop"))
            if not any(choices):
                del self.running[number]
        return news

    def cancel(self, request: int) -> bool:
        self.cancelled.append(request)
        return self.running.pop(request, None) is not None


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    serving: Serving
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.serving.settings.token}"}

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers=self.headers, timeout=30)


@contextlib.contextmanager
def running(serving: Serving) -> Iterator[Running]:
    """Let it listen at a free port until the block ends."""
    ports: list[int] = []
    there = threading.Event()

    def ready(port: int) -> None:
        ports.append(port)
        there.set()

    thread = threading.Thread(target=listen, args=(serving,), kwargs={"ready": ready}, daemon=True)
    thread.start()
    assert there.wait(20)
    try:
        yield Running(serving, ports[0])
    finally:
        if thread.is_alive():
            serving.worker.loop.call_soon_threadsafe(serving.worker.on_end)
        thread.join(20)
        assert not thread.is_alive()


def fake_serving(
    opened: Opened, engine: FakeEngine, *, rows: int = 64, waiting: int = 256, buffer: int = 1024,
    limits: Limits | None = None,
) -> Serving:  # fmt: skip
    """A server before a fake engine, with the words of a real model."""
    settings = Settings(token=TOKEN, port=0, limits=limits or Limits())
    return Serving(opened, Worker(engine, rows=rows, waiting=waiting, buffer=buffer), Names("seedling"), settings)


def save_adapters(folder: Path, names: Sequence[str]) -> None:
    """Adapters of the seedling below a folder, each of which says something else."""
    opened = open_named("seedling", precision="float32")
    for seed, name in enumerate(names):
        method = LoRA(rank=4 + seed)
        attachment = opened.model.attach(method.attach(opened.model.sites), name=name)
        forests.shake(attachment.named_parameters().values(), seed=seed, std=0.05)
        config, extras = method.peft_config(opened.model.sites), {"base_digest": opened.model.digest}
        save_adapter(folder / name, attachment, peft_type="LORA", config=config, base="seedling", extras=extras)
        opened.model.detach(name)
