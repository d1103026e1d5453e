"""The OpenAPI description holds (R12): schemathesis sends what it allows and what it does not; nothing breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from luthier.recipes.opening.opened import Opened
from luthier.server.app import routes_of, routes_that_speak
from luthier.server.jobs import Jobs
from luthier.server.names import Names
from luthier.server.serving import Serving
from luthier.server.settings import Limits, Settings
from luthier.server.worker import Worker
from tests.server.fakes import TOKEN, FakeEngine, Running, running
from tests.server.test_guard import walked

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def fuzzed(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    engine = FakeEngine(lambda request: [5] * min(3, request.sampling.max_new_tokens))
    settings_ = Settings(token=TOKEN, port=0, state=folder, limits=Limits(body_seconds=2))
    serving = Serving(opened, Worker(engine), Names("seedling"), settings_)
    with pytest.MonkeyPatch.context() as patched, running(serving) as listening:
        # A job is taken and told, and none of them is trained.
        patched.setattr(Jobs, "_enqueue", lambda *_: None)
        yield listening


def test_it_names_every_route_and_no_other(fuzzed: Running) -> None:
    made = httpx2.get(f"{fuzzed.url}/openapi.json", headers=HEADERS).json()
    described = {(method.upper(), path) for path, each in made["paths"].items() for method in each}
    routes = {(method, route.path.replace(":path}", "}"))
              for route in walked(routes_of(fuzzed.serving, routes_that_speak(fuzzed.serving)).routes)
              for method in route.methods or ()
              if method != "HEAD" and route.path != "/openapi.json"}  # fmt: skip
    assert described == routes
    for path, operations in made["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"] and "401" in operation["responses"]
            assert operation["security"] == ([] if path == "/health" else [{"token": []}])
            assert operation["description"]


def fuzz(fuzzed: Running, examples: int) -> int:
    """How many requests were sent; raises what a check found."""
    schema = schemathesis.openapi.from_dict(httpx2.get(f"{fuzzed.url}/openapi.json", headers=HEADERS).json())
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = operation.as_strategy()

        @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(strategy)
        def each(case: Any) -> None:
            nonlocal sent
            case.call_and_validate(base_url=fuzzed.url, headers=HEADERS, checks=CHECKS, timeout=20)
            sent += 1

        each()
    return sent


def test_what_it_allows_and_what_it_does_not(fuzzed: Running) -> None:
    assert fuzz(fuzzed, 8) > 100
    assert httpx2.get(f"{fuzzed.url}/health").json() == {"status": "ok"}
    assert fuzzed.serving.worker.open == 0


@pytest.mark.slow
def test_for_long(fuzzed: Running) -> None:
    assert fuzz(fuzzed, 150) > 2000
    assert httpx2.get(f"{fuzzed.url}/health").json() == {"status": "ok"}
