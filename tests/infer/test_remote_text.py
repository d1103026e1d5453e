"""A judge behind HTTP: what is sent, what is read from next tokens, and what is said when an engine is otherwise."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from luthier.core.errors import RecipeError
from luthier.data.sample import Sample
from luthier.infer.remote_text import RemoteTextModel
from luthier.infer.wire import RemoteError, UnavailableError, Wire
from luthier.recipes.reinforcing import tools
from luthier.recipes.reinforcing.tools import judge_named, require_judge
from luthier.rewards import RewardError, Tools
from luthier.rewards.judge import Comparison, Judge


class Engine(ThreadingHTTPServer):
    """It prefers what stands first, and "calm" far more than that."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.models = ["big", "small"]
        self.odd: dict[str, Any] | None = None
        self.away: list[tuple[int, dict[str, str]]] = []
        self.words = "too much to do"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": " it is calm."}, "finish_reason": "stop"}
        if body.get("logprobs"):
            text = body["messages"][0]["content"]
            first = 0.9 if text.index("calm") < text.index("LOUD") else 0.2
            likeliest = [{"token": "1", "logprob": math.log(first * 0.5)},
                         {"token": " 2", "logprob": math.log((1 - first) * 0.5)}]  # fmt: skip
            choice = {"message": {"content": "1"}, "logprobs": {"content": [{"token": "1", "top_logprobs": likeliest}]}}
        self._answer(self.server.odd or {"choices": [choice]})

    def _answer(self, values: Any) -> None:
        status, headers = self.server.away.pop(0) if self.server.away else (200, {})
        content = json.dumps(values if status == 200 else {"error": self.server.words}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *told: object) -> None:
        """Say nothing."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def compared(engine: Engine, **knobs: Any) -> Any:
    judge = Tools(judge=judge_named(f"{engine.url}/v1#big"))
    [found] = Judge(scale="pair", **knobs).compare([Sample(prompt="Hello?", answer="calm")], ["LOUD"], judge)
    return found


def test_a_pair_is_judged_by_an_engine_in_both_orders(engine: Engine) -> None:
    """Breaks when what is read from next tokens is not what they say, or a verdict stands behind no rationale."""
    found = compared(engine, most_tokens=9)
    assert isinstance(found, Comparison)
    assert (found.shown_first, found.shown_second) == (pytest.approx(0.9), pytest.approx(0.8))
    assert found.mass == pytest.approx(0.5, abs=1e-6) and found.rationales[0].startswith("Rationale: it is calm.")
    said, scored = engine.asked[0], engine.asked[-1]
    assert said["max_tokens"] == 9 and said["temperature"] == 0 and said["model"] == "big"
    assert scored["max_tokens"] == 1 and scored["top_logprobs"] == 20 and scored["continue_final_message"] is True
    assert scored["messages"][-1]["role"] == "assistant"
    assert scored["messages"][-1]["content"].endswith("Preferred response=")


def test_what_cannot_be_read_from_one_token_is_refused(engine: Engine) -> None:
    """Breaks when a rating is made of the first digits of numbers."""
    judge = Tools(judge=judge_named(f"{engine.url}#big"))
    with pytest.raises(RecipeError, match="'10' is cannot be read"):
        Judge(rationale=False).score([Sample(prompt="Hello?", answer="calm")], judge)


def test_an_engine_that_is_otherwise_is_told(engine: Engine) -> None:
    """Breaks when a judge is asked by a name that it does not have, or what is no answer is taken for one."""
    require_judge(f"{engine.url}#small")
    for name in ("none", ""):
        with pytest.raises(RecipeError, match="has no model"):
            require_judge(f"{engine.url}#{name}")
    engine.odd = {"choices": [{"message": {"content": "1"}}]}
    with pytest.raises(RemoteError, match="no log-probabilities"):
        compared(engine, rationale=False)
    engine.odd = {"choices": []}
    with pytest.raises(RemoteError, match="answered 200"):
        compared(engine)
    one = RemoteTextModel(Wire(engine.url), "big")
    assert one.go_on([], most_tokens=1, temperature=0.0, seed=0) == []
    engine.models = []
    with pytest.raises(RemoteError, match="/v1/models"):
        one.require()


@pytest.mark.parametrize(
    "words",
    ["This model's maximum context length is 256 tokens. However, you requested 297 tokens",
     "The input (297 tokens) is longer than the model's context length (256 tokens).",
     "the request exceeds the available context size, try increasing it"],
)  # fmt: skip
@pytest.mark.parametrize("rationale", [True, False])
def test_a_question_that_is_too_long_for_the_engine_is_no_verdict(engine: Engine, words: str, rationale: bool) -> None:
    """Breaks when one long answer ends the run, or what else an engine refuses is taken for that."""
    engine.words, engine.away = words, [(200, {}), (400, {}), (400, {})]
    found = compared(engine, most_tokens=9, rationale=rationale)
    assert isinstance(found, RewardError) and not found.again
    assert f"the judge {engine.url}" in found.received and words in str(found)
    engine.words, engine.away = "no such parameter: seed", [(200, {}), (400, {})]
    with pytest.raises(RemoteError, match="no such parameter"):
        compared(engine, rationale=rationale)


def test_a_judge_that_is_away_for_a_while_is_asked_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when one 503 ends a run, when a judge is asked sooner than it wants, or when it is waited for for ever."""
    plain = compared(engine, most_tokens=9)
    engine.away = [(503, {}), (429, {"Retry-After": "0"}), (502, {"Retry-After": "1"})]
    began = time.monotonic()
    assert compared(engine, most_tokens=9) == plain and not engine.away
    assert time.monotonic() - began >= 1
    engine.away = [(503, {"Retry-After": "130"})]
    with pytest.raises(UnavailableError, match="not to be asked for 130 seconds, more than the 120 there are"):
        compared(engine)
    monkeypatch.setattr(tools, "PATIENCE", 0.0)
    engine.away = [(503, {})] * 99
    with pytest.raises(UnavailableError, match="answered 503: too much to do"):
        compared(engine)
