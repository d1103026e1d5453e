"""Drafts over HTTP: the text is the same, and the numbers say what they were worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.recipes.opening.opened import Opened
from luthier.server.opening import Wanted, open_serving, require_drafts
from luthier.server.settings import Settings
from tests.server.fakes import TOKEN, Running, running

PROMPT = "one two three four one two three four one two three"


@pytest.fixture(scope="module", params=["seedling", None], ids=["model", "text"])
def drafting(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The seedling, looked ahead by itself or by what the text has said."""
    settings = Settings(token=TOKEN, port=0, state=tmp_path_factory.mktemp("drafting") / "state")
    wanted = Wanted(name="seedling", precision="float32", tokens=4096, drafts=4, draft_model=request.param)
    with running(open_serving(wanted, settings)) as listening:
        yield listening


def said(server: Running, **more: Any) -> str:
    body = {"model": "seedling", "prompt": PROMPT, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **more}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.text if body.get("stream") else str(answer.json()["choices"][0]["text"])


def counted(server: Running) -> tuple[int, int]:
    with server.client() as client:
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[:1] != "#")
    return int(lines["luthier_tokens_drafted_total"]), int(lines["luthier_tokens_accepted_total"])


@pytest.mark.parametrize("more", [
    {},
    {"temperature": 0.8, "seed": 7, "top_p": 0.9},
    {"guided_choice": ["four five six seven eight", "four one two three four"]},
    {"stop": ["\n", "five"]},
])  # fmt: skip
def test_the_text_is_the_same_and_drafts_are_counted(drafting: Running, server: Running, more: dict[str, Any]) -> None:
    """Breaks when a draft is believed, when none is made, or when a request cannot do without."""
    expected, before = said(server, **more), counted(drafting)
    assert said(drafting, **more, drafts=0) == expected and counted(drafting) == before
    assert said(drafting, **more) == expected
    drafted, accepted = counted(drafting)
    assert before[0] < drafted and before[1] <= accepted <= drafted
    assert counted(server) == (0, 0)


def test_streams_and_conversations_are_looked_ahead_too(drafting: Running) -> None:
    """Breaks when one of the routes forgets how the server was started."""
    for path, asked in (
        ("/v1/completions", {"prompt": PROMPT, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ):
        before = counted(drafting)
        body = {"model": "seedling", "temperature": 0, "max_tokens": 24, "ignore_eos": True, **asked}
        with drafting.client() as client:
            assert client.post(path, json=body).status_code == 200
        assert counted(drafting)[0] > before[0]


def test_more_than_the_server_was_started_with_is_refused(drafting: Running, server: Running) -> None:
    for place, most in ((drafting, 4), (server, 0)):
        with place.client() as client:
            answer = client.post("/v1/completions", json={"model": "seedling", "prompt": "x", "drafts": most + 1})
        error = answer.json()["error"]
        assert answer.status_code == 400 and f"at most {most}" in error["message"] and "--drafts" in error["message"]


def test_drafts_that_no_request_could_have_are_refused_at_the_start(opened: Opened) -> None:
    for drafts in (-1, 65):
        with pytest.raises(RecipeError, match=r"0 \(off\) to 64"):
            Wanted(name="seedling", drafts=drafts)
    like: Any = SimpleNamespace(task=opened.model.task, executor=SimpleNamespace(kind="unrolled"), source="tiny/mamba")
    recurrent = replace(opened, model=like)
    require_drafts(recurrent, 0)
    with pytest.raises(RecipeError, match="tiny/mamba has no keys in pages"):
        require_drafts(recurrent, 2)
