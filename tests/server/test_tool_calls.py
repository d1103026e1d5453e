"""Tool calls: read out of text however it is cut, whole and in streams; what is no call stays text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as some
from openai import OpenAI

from luthier.data.tool_calls import Called, CallReader
from luthier.recipes.opening.opened import Opened
from tests.server.fakes import TOKEN, FakeEngine, Running, fake_serving, running

ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": "x<y"}}\n</tool_call>'
TWO = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
TEXTS = {
    "no call at all": ["no call at all"],
    ONE: [("add", {"a": 7, "b": "x<y"})],
    "Let me see. " + ONE: ["Let me see. ", ("add", {"a": 7, "b": "x<y"})],
    ONE + "\n" + TWO: [("add", {"a": 7, "b": "x<y"}), ("now", {})],
    ONE + "\nthen " + TWO + " done": [("add", {"a": 7, "b": "x<y"}), "then ", ("now", {}), "done"],
    "<tool_call>{broken</tool_call> and on": ["<tool_call>{broken</tool_call> and on"],
    "<tool_call>[1]</tool_call>": ["<tool_call>[1]</tool_call>"],
    "a < b <tool": ["a < b <tool"],
    ONE.removesuffix("</tool_call>"): [("add", {"a": 7, "b": "x<y"})],
    "<tool_call>{": ["<tool_call>{"],
}


def read(text: str, cuts: list[int], **more: Any) -> list[Any]:
    """What comes of a text in pieces, neighbouring text joined."""
    reader, found = CallReader(**more), []
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(edges)]
    for one in [each for piece in pieces for each in reader.push(piece)] + reader.end():
        if isinstance(one, Called):
            found.append((one.name, json.loads(one.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return found


@pytest.mark.parametrize("text", TEXTS)
@given(cuts=some.lists(some.integers(0, 300), max_size=12))
def test_however_it_is_cut(text: str, cuts: list[int]) -> None:
    assert [one for one in read(text, cuts) if one] == TEXTS[text]


def test_a_single_call_and_a_forced_one() -> None:
    assert read(ONE + TWO, [], single=True) == [("add", {"a": 7, "b": "x<y"})]
    assert read('{"name": "add", "arguments": {"a": 1}}', [5, 9], forced=True) == [("add", {"a": 1})]
    assert read('{"name": "add", "argu', [], forced=True) == ['{"name": "add", "argu']


@pytest.fixture(scope="module")
def scripted(opened: Opened) -> Iterator[Running]:
    said = opened.tokenizer.encode("I look. " + ONE)[0].tolist()
    with running(fake_serving(opened, FakeEngine(lambda _: said))) as listening:
        yield listening


def test_calls_of_a_model_reach_the_client(scripted: Running) -> None:
    more: dict[str, Any] = {
        "model": "seedling", "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    }  # fmt: skip
    with OpenAI(base_url=f"{scripted.url}/v1", api_key=TOKEN, max_retries=0) as client:
        [choice] = client.chat.completions.create(**more).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "I look. "
        assert choice.message.tool_calls and choice.message.tool_calls[0].type == "function"
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 7, "b": "x<y"}
        text, calls, reason = "", [], None
        with client.chat.completions.create(**more, stream=True) as stream:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                calls += chunk.choices[0].delta.tool_calls or []
                reason = chunk.choices[0].finish_reason or reason
        assert text == "I look. " and reason == "tool_calls"
        [call] = calls
        assert call.index == 0 and call.function and call.function.name == "add"
        plain = client.chat.completions.create(**{**more, "tool_choice": "none"}).choices[0]
        assert plain.message.tool_calls is None and ONE in (plain.message.content or "")


def test_who_leaves_is_cancelled_and_who_reads_slowly_is_told(opened: Opened) -> None:
    engine = FakeEngine(lambda request: [100] * request.sampling.max_new_tokens, pause=0.0005)
    with running(fake_serving(opened, engine, buffer=50)) as listening, listening.client() as client:
        body = {"model": "seedling", "prompt": "x", "max_tokens": 4000}
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            next(stream.iter_lines())
        _until(lambda: not engine.running)
        assert engine.cancelled == [0] and listening.serving.worker.open == 0
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.1)
        _until(lambda: not engine.running)
        assert engine.cancelled == [0, 1], "one that is not streamed is cancelled too"
        assert client.post("/v1/completions", json={**body, "max_tokens": 5}).status_code == 200


def _until(true: Any, seconds: float = 10) -> None:
    import time

    latest = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < latest
        time.sleep(0.005)
