"""Servers that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from luthier.recipes.opening.opened import Opened, open_named
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from tests.server.fakes import TOKEN, Running, running


@pytest.fixture(scope="session")
def opened() -> Opened:
    """The seedling, loaded once, with modules that tests can call: they are the oracle."""
    return open_named("seedling", precision="float32", own_modules=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The seedling and the real engine behind a port."""
    folder: Path = tmp_path_factory.mktemp("served")
    (folder / "adapters").mkdir()
    settings = Settings(token=TOKEN, port=0, adapters=folder / "adapters", state=folder / "state")
    own = open_named("seedling", precision="float32")
    with running(serve_opened(own, settings, base="seedling", tokens=8192)) as listening:
        yield listening


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    """The official client before it."""
    with OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=60) as made:
        yield made
