"""Past the layers or through them: nothing is answered differently."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from luthier.core.errors import StorageError
from luthier.recipes.opening.opened import Opened
from luthier.server.asking import sampling_of
from tests.server.fakes import TOKEN, FakeEngine, Running, fake_serving, running

HEAD = {"Authorization": f"Bearer {TOKEN}"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = '"model": "seedling", "messages": [{"role": "user", "content": "hello"}]'
BODIES = {
    "a text": (TEXT, '{"model": "seedling", "prompt": "x", "max_tokens": 3}', 200),
    "tokens, as they grow": (TEXT, '{"model": "seedling", "prompt": [5, 6], "stream": true, "max_tokens": 3}', 200),
    "texts": (TEXT, '{"model": "seedling", "prompt": ["x", "é\\u00e9\\ud83d\\ude00"], "echo": true}', 200),
    "a conversation": (CHAT, f"{{{HELLO}}}", 200),
    "a whole number where others are allowed": (CHAT, f'{{{HELLO}, "temperature": 1, "top_p": 1.0}}', 200),
    "a name twice": (TEXT, '{"model": "no", "prompt": "x", "model": "seedling", "n": 9, "n": 2}', 200),
    "a mark before it": (TEXT, '\ufeff{"model": "seedling", "prompt": "x"}', 200),
    "numbers that are none": (CHAT, f'{{{HELLO}, "temperature": NaN}}', 400),
    "endless numbers": (CHAT, f'{{{HELLO}, "temperature": 1e999}}', 400),
    "a fraction of tokens": (TEXT, '{"model": "seedling", "prompt": "x", "max_tokens": 3.0}', 400),
    "a number in quotes": (TEXT, '{"model": "seedling", "prompt": "x", "max_tokens": "3"}', 400),
    "a truth that is a number": (TEXT, '{"model": "seedling", "prompt": "x", "stream": 1}', 400),
    "nothing for a list": (TEXT, '{"model": "seedling", "prompt": null}', 400),
    "a huge number": (TEXT, f'{{"model": "seedling", "prompt": "x", "seed": 1{"0" * 400}}}', 400),
    "texts and tokens": (TEXT, '{"model": "seedling", "prompt": ["x", 5]}', 400),
    "a name that nobody knows": (TEXT, '{"model": "seedling", "prompt": "x", "max_token": 3}', 400),
    "many stops": (TEXT, json.dumps({"model": "seedling", "prompt": "x", "stop": ["a"] * 17}), 400),
    "another model": (TEXT, '{"model": "other", "prompt": "x"}', 404),
    "too many tokens": (TEXT, '{"model": "seedling", "prompt": "x", "max_tokens": 100000}', 400),
    "half a body": (CHAT, '{"model": "seedling", "mess', 400),
    "something behind it": (TEXT, '{"model": "seedling", "prompt": "x"} x', 400),
    "a line break in a text": (TEXT, '{"model": "seedling", "prompt": "a\nb"}', 400),
    "a list": (CHAT, "[]", 400),
    "nothing": (TEXT, "", 400),
}


@pytest.fixture(scope="module")
def serving(opened: Opened) -> Iterator[Running]:
    with running(fake_serving(opened, FakeEngine(lambda _: [40, 41, 42]))) as listening:
        yield listening


def told(running_: Running, path: str, body: str, kind: str) -> tuple[int, Any]:
    """The status, and what is the same each time."""
    answer = httpx2.post(f"{running_.url}{path}", content=body.encode(), headers={**HEAD, "Content-Type": kind})
    text = answer.text.replace("data: [DONE]", "").replace("data: ", "")
    found = [json.loads(line) for line in text.splitlines() if line]
    return answer.status_code, [{name: value for name, value in each.items() if name not in ("id", "created")}
                                for each in found]  # fmt: skip


def counted(running_: Running, path: str, status: int) -> int:
    """How many answers of one kind there were; each is counted right after it was given."""
    time.sleep(0.05)
    return running_.serving.metrics.requests[path, status]


@pytest.mark.parametrize("name", BODIES)
def test_what_is_asked_both_ways_is_answered_once(
    serving: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a body is read past the layers as FastAPI would not read it, or told another error."""
    path, body, status = BODIES[name]
    passed: list[str] = []
    call = FastAPI.__call__

    async def noted(self: FastAPI, scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])
        await call(self, scope, receive, send)

    monkeypatch.setattr(FastAPI, "__call__", noted)
    # The layers know that this is JSON too; the shortcut does not look so closely.
    slow = told(serving, path, body, "application/json; charset=utf-8")
    assert passed == [path] and slow[0] == status
    before = counted(serving, path, status)
    quick = told(serving, path, body, "application/json")
    assert quick == slow and counted(serving, path, status) == before + 1
    fits = (status == 200 and not body.startswith("\ufeff")) or name in ("another model", "too many tokens")
    assert len(passed) == 1 + (not fits)


def test_a_query_is_for_the_layers(serving: Running) -> None:
    """Breaks when a parameter in the query is passed over, or is told what only bodies know."""
    body = '{"model": "seedling", "prompt": "x"}'
    for query, words in (("stream=true", "'stream' in the query; put it into the body"), ("x=1", "'x' in the query")):
        status, [answer] = told(serving, f"{TEXT}?{query}", body, "application/json")
        assert status == 400 and answer["error"]["code"] == "unknown_parameter"
        assert answer["error"]["message"] == f"unknown parameter {words}"
    assert told(serving, TEXT, body, "text/plain")[0] == 400


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8"])
@pytest.mark.parametrize("failure", [KeyError("/a/path/of/ours"), StorageError("/a/path/of/ours is full", do="x")])
def test_what_breaks_in_a_route_is_told_as_ever(
    serving: Running, monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: str
) -> None:
    """Breaks when it ends the connection, tells our paths, or is told in plain words."""

    def broken(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(sampling_of.__module__ + ".sampling_of", broken)
    before = counted(serving, TEXT, 500)
    status, [answer] = told(serving, TEXT, '{"model": "seedling", "prompt": "x"}', kind)
    assert status == 500 and "/a/path" not in str(answer)
    assert answer["error"]["code"] == ("unexpected" if isinstance(failure, KeyError) else "storage")
    assert counted(serving, TEXT, 500) == before + 1
